"""What SGLang calls: its seam for an external cache, with a store in this process behind it.

    --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic
    --unified-cache-external-linker-config
        '{"linker": "PrefixLinker", "linker_module_path": "prfaas.sglang.prefixes.linker"}'

What the prefix tree takes in is copied to the store (`offload`), and what the tree lacks of a prompt and the
store has is copied back (`load`): what came from another site, and what was evicted here. The scheduler never
waits for a network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from prfaas.config.backend import K_ENVIRONMENT, load_backend_config
from prfaas.config.pump import split_address
from prfaas.model.errors import PrfaasError
from prfaas.pump_client import LocalPumpClient
from prfaas.sglang import compat, layout
from prfaas.sglang.passage import Passage
from prfaas.sglang.prefixes import face
from prfaas.sglang.prefixes.exchange import K_KEPT_S, Exchange, Own, Same, address_of
from prfaas.sglang.prefixes.pools import K_PAGES, K_STATES, Pool, pools_of
from prfaas.sglang.prefixes.store import Chunk, Key, PrefixStore
from prfaas.sglang.staging import CudaMemory, HostMemory, Staging

logger = logging.getLogger(__name__)

K_KEY_BYTES = 16
"""Of a hash of 32: two pages of a million million have one key by chance once in 10^14."""


class PrefixLinker(compat.UnifiedCacheLinker):  # type: ignore[misc]
    """One a rank. All but the exchange's answers run on the scheduler's thread."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any],
        forward_stream: Any = None,
    ) -> None:
        config = load_backend_config(os.environ.get(K_ENVIRONMENT))
        if config.prefixes is None:
            raise PrfaasError(f"the linker needs `prefixes:` in the file that {K_ENVIRONMENT} names")
        if extra_config:
            raise PrfaasError("linker_extra_config: expected none, its settings are the section `prefixes:`")
        _must_suit(server_args, params, components)
        names = compat.PoolName
        self.forward_stream = forward_stream
        self._pools = {
            {K_PAGES: names.KV, K_STATES: names.MAMBA}[name]: (name, pool)
            for name, pool in pools_of(params).items()
        }
        self.pools = dict.fromkeys(self._pools)
        self.layer_done_counter = compat.LayerWiseLoadCounter(_layers_of(params))
        if names.MAMBA in self.pools:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        on_gpu = str(server_args.device).startswith("cuda")
        gpu = torch.cuda.current_device() if on_gpu else 0
        memory = CudaMemory(gpu) if on_gpu else HostMemory()
        self._stream = torch.cuda.Stream(device=gpu) if on_gpu else None
        self._copies: deque[tuple[Any, list[Chunk]]] = deque()
        """Under way to the store, with what tells that they are there."""
        self._staging = Staging(config.prefixes.store_bytes, memory)
        self._store = PrefixStore(self._staging)
        self._pending: dict[str, list[Any]] = {}
        rank, ranks = _rank_of(params)
        self._client = LocalPumpClient.open(config.pump, name=f"sglang prefixes {rank}")
        self._client.register([(self._staging.address, self._staging.size_bytes)])
        sizes = {name: pool.item_bytes for name, pool in self._pools.values()}
        same = Same(
            model=layout.last_word(server_args.served_model_name or server_args.model_path),
            page_tokens=params.page_size,
            item_bytes=sizes,
            ranks=ranks,
        )
        first = config.prefixes.listen
        # Its own: a plain server, and one of another backend, has no manager of ours that would make it one.
        leads = None if config.control is None else Passage(self._client, config.control.pumps)
        ask = face.asker(leads, [address_of(first, one) for one in range(ranks)])
        self.exchange = Exchange(Own(same, rank, first), self._client, self._store, self._keys_of, ask)
        listen = address_of(first, rank)
        self._face = face.Face(listen, self.exchange.take, self.exchange.give)
        if config.control is not None:
            self._client.expose(*split_address(listen))
        self._page_tokens = params.page_size
        logger.info("prfaas: prefixes at %s, items of %s bytes", listen, sizes)

    def _keys_of(self, ids: Sequence[int]) -> list[Key]:
        """A prefix's keys as SGLang has them, one a whole page."""
        whole = len(ids) // self._page_tokens * self._page_tokens
        if not whole:
            return []
        key = compat.RadixKey(array("q", ids[:whole]))
        return _short(compat.get_storage_hash_str(key, None, page_size=self._page_tokens))

    # What a prompt finds

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        keep_until_s = time.monotonic() + K_KEPT_S
        keys = _short(next(one.keys for one in transfers if one.name == compat.PoolName.KV))
        pages = self._store.leading(K_PAGES, keys, keep_until_s)
        if compat.PoolName.MAMBA not in self._pools:
            return list(range(1, pages + 1))
        ends = [at for at in range(1, pages + 1) if self._store.holds(K_STATES, keys[at - 1])]
        if ends:
            self._store.leading(K_STATES, [keys[ends[-1] - 1]], keep_until_s)
        return ends

    def load(self, rid: str, transfers: list[Any]) -> bool:
        # True whatever has been evicted since `lookup`: all ranks must go the same way. What isn't there any
        # more fails the load, which ranks are told of together.
        self._pending[rid] = transfers
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        return self._pending.pop(rid, None) is not None

    def start_layer_wise_loading(self) -> int:
        if not self._pending:
            return -1
        pending, self._pending = self._pending, {}
        index: int = self.layer_done_counter.update_producer()
        try:
            for transfers in pending.values():
                self._copy_in(transfers)
        except Exception as error:
            if not isinstance(error, KeyError):
                logger.exception("prfaas: a prefix can't be copied into its pages")
            self.layer_done_counter.fail(index, error)
            return index
        for layer in range(self.layer_done_counter.num_layers):
            self.layer_done_counter.complete(index, layer)
        return index

    def _copy_in(self, transfers: list[Any]) -> None:
        with contextlib.ExitStack() as reads:
            if self._stream is not None:
                reads.enter_context(torch.cuda.stream(self._stream))
            for one in transfers:
                name, pool = self._pools[one.name]
                for run in reads.enter_context(self._store.reading(name, _short(one.keys))):
                    pool.copy_in(run.address, _rows_of(one, pool, run.first, run.count))
            if self._stream is not None:
                self._stream.synchronize()

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        landed: bool = self.layer_done_counter.finish(counter_index)
        return landed

    # What the tree takes in

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Whether a copy is under way, for which the node must stay as it is. What is here already counts as
        used; SGLang offers a node again whenever a request comes by it, since `pop_completed_offload` says
        that nothing is stored for good."""
        now_s = time.monotonic()
        chunks = []
        for one in transfers:
            name, pool = self._pools[one.name]
            keys = _short(one.keys)
            held = self._store.leading(name, keys)
            if held == len(keys):
                continue
            chunk = self._store.room(name, keys[held:], pool.item_bytes, now_s)
            if chunk is not None:
                chunks.append((chunk, pool, _rows_of(one, pool, held, len(keys) - held)))
        if not chunks:
            return False
        if self._stream is None:
            for chunk, pool, rows in chunks:
                pool.copy_out(rows, chunk.address)
                self._store.keep(chunk)
            return False
        for event in self.record_offload_ready():
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            for chunk, pool, rows in chunks:
                pool.copy_out(rows, chunk.address)
            self._copies.append((self._stream.record_event(), [chunk for chunk, _, _ in chunks]))
        return True

    def num_completed_offloads(self) -> int:
        done = 0
        for event, _ in self._copies:
            if not event.query():
                break
            done += 1
        return done

    def pop_completed_offload(self) -> bool:
        event, chunks = self._copies.popleft()
        event.synchronize()
        for chunk in chunks:
            self._store.keep(chunk)
        return False

    # Its end

    def reset(self) -> None:
        while self._copies:
            self.pop_completed_offload()
        self._pending.clear()
        self._store.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        self._face.close()
        self._client.close()
        while self._copies:
            self.pop_completed_offload()
        self._staging.close()


def _short(keys: Sequence[str]) -> list[Key]:
    """SGLang's keys, SHA-256 in hex, as the store has them."""
    return [bytes.fromhex(key[: 2 * K_KEY_BYTES]) for key in keys]


def _rows_of(transfer: Any, pool: Pool, first: int, count: int) -> Any:
    """Of items `first` to `first + count` of a transfer."""
    per = len(transfer.device_indices) // len(transfer.keys)
    return transfer.device_indices[first * per : (first + count) * per]


def _layers_of(params: Any) -> int:
    """One more than the number of the last layer that waits for its part."""
    kvcache = params.token_to_kv_pool_allocator.get_kvcache()
    mapping = getattr(kvcache, "full_attention_layer_id_mapping", None)
    full = getattr(kvcache, "full_kv_pool", kvcache)
    layers = set(range(full.layer_num)) if mapping is None else set(mapping)
    if getattr(params.req_to_token_pool, "mamba_pool", None) is not None:
        layers |= set(params.req_to_token_pool.mamba_map)
    return max(layers) + 1


def _must_suit(server_args: Any, params: Any, components: Any) -> None:
    """Raises PrfaasError for a server that prefixes can't be kept of."""
    if compat.ComponentType.SWA in components:
        raise PrfaasError("prefixes: models with sliding windows aren't supported")
    for what, size in (
        ("pipeline", params.pp_size),
        ("attention context", params.attn_cp_size),
        ("data", server_args.dp_size),
    ):
        if size > 1:
            raise PrfaasError(f"prefixes: {what} parallelism isn't supported; tensor parallelism is")
    if server_args.nnodes > 1:
        raise PrfaasError("prefixes: servers of several nodes aren't supported")


def _rank_of(params: Any) -> tuple[int, int]:
    """This rank, and how many there are."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    group = params.attn_tp_cache_group or params.tp_cache_group
    return distributed.get_rank(group=group), distributed.get_world_size(group=group)
