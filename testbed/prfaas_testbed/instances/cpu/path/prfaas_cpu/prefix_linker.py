"""Prefixes from another site's prefill server, into this one's cache: SGLang's seam for an external cache
("direct linker", `--unified-cache-external-linker-backend dynamic`), over our pumps.

    --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic
    --unified-cache-external-linker-config '{"linker": "PrefixLinker",
        "linker_module_path": "prfaas_cpu.prefix_linker",
        "linker_extra_config": {"pump": {…}, "listen": "HOST:PORT", "peer": "http://HOST:PORT"}}'

Every server says what it holds and gives it (`listen`); one that lacks part of a prompt asks its `peer`
before it computes, grants a lease on the very slots of its pools, and waits for the bytes there. KV of full
attention goes by pages, a recurrent state whole, at the lengths where the giver has one. Where the peer isn't
there, all is computed; a peer that ends while it gives costs the request, which SGLang aborts.

It is what shows on CPU that a moved prefix is used; it asks for each prompt over the network while the
scheduler waits, so that it isn't for use.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import urllib.request
from collections import deque
from collections.abc import Sequence
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import DevicePoolEntry, DevicePoolGroup
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker

from prfaas.config.loading import check
from prfaas.config.pump import PumpConfig
from prfaas.model.transfer import LeaseGrant, TransferKind
from prfaas.pump_client import LocalPumpClient

log = logging.getLogger("prfaas.prefix_linker")

K_TIMEOUT_S = 30.0
K_KEPT_NODES = 256
"""Of its tree that a server keeps for others at most; the oldest may be evicted then."""
Piece = tuple[str, str]
"""A pool, and the key of a page or state in it."""


class PrefixLinker(UnifiedCacheLinker):
    """See the module."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any],
        forward_stream: Any = None,
    ) -> None:
        self.forward_stream = forward_stream
        kvcache = params.token_to_kv_pool_allocator.get_kvcache()
        self.group = pools_of(kvcache, params)
        self.pools = self.group.entry_map
        self.layer_done_counter = LayerWiseLoadCounter(self.group.num_layers)
        if PoolName.MAMBA in self.pools:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        config = check(extra_config["pump"], PumpConfig, "linker_extra_config.pump")
        self._client = LocalPumpClient.open(config, name="prefixes")
        storages = {}
        for pool in self.pools.values():
            for buffer in pool.get_hybrid_pool_buffer():
                storage = buffer.untyped_storage()
                storages[int(storage.data_ptr())] = int(storage.nbytes())
        self._client.register(list(storages.items()))
        self._peer: str | None = extra_config.get("peer")
        self._pending: dict[str, list[PoolTransfer]] = {}
        self._lock = threading.Lock()
        """Over what is held, for as long as it is given: nothing is evicted under a transfer."""
        self._held: dict[Piece, int] = {}
        self._nodes: deque[list[Piece]] = deque()
        self.given_bytes = 0
        """To others, each byte once."""
        host, _, port = extra_config["listen"].rpartition(":")
        self._server = ThreadingHTTPServer((host, int(port)), _handler(self))
        threading.Thread(target=self._server.serve_forever, daemon=True, name="prefixes").start()

    # What others ask

    def have(self, keys: Sequence[str]) -> dict[str, list[int]]:
        """The first of these that every pool of pages holds, and which of them have a state."""
        with self._lock:
            paged = [name.value for name, source in self.group.sources.items() if source == PoolName.KV]
            pages = 0
            while pages < len(keys) and all((pool, keys[pages]) in self._held for pool in paged):
                pages += 1
            states = [at for at, key in enumerate(keys[:pages]) if (PoolName.MAMBA.value, key) in self._held]
        return {"pages": [pages], "states": states}

    def give(self, pieces: Sequence[Piece], grant: str, targets: list[int], sizes: list[int]) -> None:
        """Send them there. Raises KeyError where one isn't held any more, ValueError where they can't go."""
        with self._lock:
            sources, own_sizes = self._places([(*piece, self._held[piece]) for piece in pieces])
            if own_sizes != sizes:
                raise ValueError("their pieces are of another size: another model, or another layout")
            transfer = self._client.submit(
                LeaseGrant.from_text(grant), sources, targets, sizes,
                kind=TransferKind.KV, deadline_s=K_TIMEOUT_S, last=True,
            )  # fmt: skip
            outcome = transfer.wait(K_TIMEOUT_S)
        if outcome is None or not outcome.ok:
            raise ValueError(f"not sent: {outcome}")
        self.given_bytes += outcome.payload_bytes

    def _places(self, rows: Sequence[tuple[str, str, int]]) -> tuple[list[int], list[int]]:
        """Addresses and sizes of these pieces at their rows, layer by layer."""
        addresses, sizes = [], []
        for name, _, row in rows:
            pool = self.pools[PoolName(name)]
            for layer in range(self.group.num_layers):
                found = pool.get_prepared_layer_range_meta([row], layer)
                for own, lengths in zip(found[0], found[1], strict=True) if found is not None else ():
                    addresses += own
                    sizes += lengths
        return addresses, sizes

    # SGLang's contract

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        if self._peer is None:
            return []
        keys = list(next(one for one in transfers if one.name == PoolName.KV).keys)
        try:
            found = _post(f"{self._peer}/have", {"keys": keys})
        except (OSError, HTTPException, ValueError) as error:  # gone, gone half way, another program
            log.warning("%s: %r", self._peer, error)
            return []
        if PoolName.MAMBA in self.pools:
            return [at + 1 for at in found["states"]]
        return list(range(1, found["pages"][0] + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        expanded = self.group.resolve_transfers(transfers, allow_partial=True, allow_missing_kv=True)
        if expanded:
            self._pending[rid] = expanded
        return bool(expanded)

    def cancel_queued_load(self, rid: str) -> bool:
        return self._pending.pop(rid, None) is not None

    def start_layer_wise_loading(self) -> int:
        if not self._pending:
            return -1
        batch, self._pending = list(self._pending.values()), {}
        index = self.layer_done_counter.update_producer()
        self._load(index, batch)  # at once: the CPU's kernels of recurrent layers don't wait for a layer
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return self.layer_done_counter.finish(counter_index)

    def _load(self, index: int, batch: list[list[PoolTransfer]]) -> None:
        try:
            self._bring(self._rows([one for transfers in batch for one in transfers]))
        except Exception as error:
            log.exception("a prefix didn't come")
            self.layer_done_counter.fail(index, error)
            return
        for layer in range(self.group.num_layers):
            self.layer_done_counter.complete(index, layer)

    def _rows(self, transfers: Sequence[PoolTransfer]) -> list[tuple[str, str, int]]:
        return [
            (one.name.value, key, row)
            for one in transfers
            for key, row in zip(
                one.keys, self.pools[one.name].prepare_locations(one.host_indices), strict=True
            )
        ]

    def _bring(self, rows: Sequence[tuple[str, str, int]]) -> None:
        addresses, sizes = self._places(rows)
        regions = list(zip(addresses, sizes, strict=True))
        lease = self._client.grant_lease(random.getrandbits(62), 1, regions, K_TIMEOUT_S)
        try:
            asked = {
                "pieces": [row[:2] for row in rows],
                "grant": lease.grant.to_text(),
                "targets": addresses,
                "sizes": sizes,
            }
            _post(f"{self._peer}/give", asked)
            if not lease.wait(K_TIMEOUT_S):
                raise ValueError(f"not whole: {lease.failure}")
        finally:
            lease.revoke()

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Nothing is copied: the node stays where it is, for as long as this offload isn't done."""
        rows = self._rows(self.group.resolve_transfers(transfers, allow_partial=True))
        with self._lock:
            self._held |= {(pool, key): row for pool, key, row in rows}
            self._nodes.append([(pool, key) for pool, key, _ in rows])
        return True

    def num_completed_offloads(self) -> int:
        return max(0, len(self._nodes) - K_KEPT_NODES)

    def pop_completed_offload(self) -> bool:
        with self._lock:
            for piece in self._nodes.popleft():
                self._held.pop(piece, None)
        return False  # it may be evicted, and is nowhere else

    def reset(self) -> None:
        with self._lock:
            self._held.clear()
            self._nodes.clear()
        self._pending.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        self._server.shutdown()
        self._client.close()


def pools_of(kvcache: Any, params: Any) -> DevicePoolGroup:
    """Full attention of either kind, and recurrent states. SGLang's own list has latents with states only."""
    full = getattr(kvcache, "full_kv_pool", kvcache)
    mapping = getattr(kvcache, "full_attention_layer_id_mapping", None)
    if mapping is None:
        mapping = {layer: layer for layer in range(full.layer_num)}
    if hasattr(full, "k_buffer"):
        count = len(full.k_buffer)
        buffers = [*full.k_buffer, *full.v_buffer]
        layers = {layer: (own, count + own) for layer, own in mapping.items()}
    else:
        buffers, layers = full.kv_buffer, dict(mapping)
    entries = [
        DevicePoolEntry(
            name=PoolName.KV, indices_from_pool=PoolName.KV, device_pool=full, components=[buffers],
            layer_mapping=layers, page_size=params.page_size, rows_are_pages=False,
        )
    ]  # fmt: skip
    states = getattr(params.req_to_token_pool, "mamba_pool", None)
    if states is not None:
        cache = states.mamba_cache
        parts = [part for part in (cache.temporal, *cache.conv) if part.numel()]
        entries.append(
            DevicePoolEntry(
                name=PoolName.MAMBA, indices_from_pool=PoolName.MAMBA, device_pool=states,
                components=[[part[own] for own in range(states.num_mamba_layers)] for part in parts],
                layer_mapping=dict(params.req_to_token_pool.mamba_map), page_size=1, rows_are_pages=True,
            )
        )  # fmt: skip
    last = max(layer for entry in entries for layer in entry.layer_mapping)
    return DevicePoolGroup(entries, last + 1, params.page_size)


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=K_TIMEOUT_S) as response:
        return json.load(response)


def _handler(linker: PrefixLinker) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                found: Any = {}
                if self.path == "/have":
                    found = linker.have(body["keys"])
                elif self.path == "/give":
                    pieces = [(pool, key) for pool, key in body["pieces"]]
                    linker.give(pieces, body["grant"], body["targets"], body["sizes"])
                elif self.path == "/given":
                    found = {"bytes": linker.given_bytes}
            except (KeyError, ValueError) as error:
                self.send_error(409, explain=repr(error))
                return
            data = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            return None

    return Handler
