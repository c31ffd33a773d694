"""A server's caches as rows, copied to and from host memory: an item is a page of full attention with all its
layers, or a request's recurrent state with all its layers and parts.

An item's bytes are those of its buffers one after the other, so that what two servers exchange is the same
whatever their pools' sizes and rows are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from prfaas.model.errors import PrfaasError
from prfaas.sglang import compat

K_PAGES, K_STATES = "pages", "states"


class Pool:
    """Buffers (torch tensors, rows first) that are indexed alike."""

    def __init__(self, buffers: Sequence[Any], rows_per_item: int) -> None:
        self._buffers, self._rows = list(buffers), rows_per_item
        self.widths = [rows_per_item * buffer[0].numel() * buffer.element_size() for buffer in self._buffers]
        self.item_bytes = sum(self.widths)

    def copy_out(self, rows: Any, address: int) -> None:
        """The items at `rows` (of each item all, in order), to host memory."""
        import torch

        count = len(rows) // self._rows
        parts = [buffer[rows].reshape(count, -1).contiguous().view(torch.uint8) for buffer in self._buffers]
        _host(address, count, self.item_bytes).copy_(torch.cat(parts, dim=1), non_blocking=True)

    def copy_in(self, address: int, rows: Any) -> None:
        """From host memory to these rows."""
        count = len(rows) // self._rows
        device = self._buffers[0].device
        items = _host(address, count, self.item_bytes).to(device, non_blocking=True)
        for buffer, part in zip(self._buffers, items.split(self.widths, dim=1), strict=True):
            # A copy: a view as numbers wants bytes that begin where numbers may.
            buffer[rows] = part.clone().view(buffer.dtype).reshape(len(rows), *buffer.shape[1:])


def _host(address: int, count: int, item_bytes: int) -> Any:
    """[count, item_bytes] of host memory as torch takes it in."""
    import torch

    array = np.ctypeslib.as_array((ctypes.c_uint8 * (count * item_bytes)).from_address(address))
    return torch.from_numpy(array).view(count, item_bytes)


def pools_of(params: Any) -> dict[str, Pool]:
    """Those of a server's caches, from what SGLang makes its prefix cache of. Raises PrfaasError for caches
    that can't be copied so.
    """
    kvcache = params.token_to_kv_pool_allocator.get_kvcache()
    full = getattr(kvcache, "full_kv_pool", kvcache)
    if any(getattr(full, name, None) is not None for name in ("k_scale_buffer", "native_k_scale_buffer")):
        raise PrfaasError("prefixes: KV with scales of its own isn't supported")
    if type(full) is compat.MHATokenToKVPool:
        buffers = [*full.k_buffer, *full.v_buffer]
    elif type(full) is compat.MLATokenToKVPool:
        buffers = list(full.kv_buffer)
    else:
        raise PrfaasError(f"prefixes: caches of {type(full).__name__} aren't supported")
    found = {K_PAGES: Pool(buffers, params.page_size)}
    states = getattr(params.req_to_token_pool, "mamba_pool", None)
    if states is not None:
        beside = params.req_to_token_pool
        if (
            type(states) is not compat.MambaPool
            or beside.mamba_ckpt_pool is not None
            or beside.short_conv_pool.enabled
            or beside.ngram_pool.enabled
        ):
            raise PrfaasError(
                "prefixes: states in unified memory, or with others beside them, aren't supported"
            )
        cache = states.mamba_cache
        parts = [part for part in (cache.temporal, *cache.conv) if part.numel()]
        layers = range(states.num_mamba_layers)
        found[K_STATES] = Pool([part[layer] for part in parts for layer in layers], 1)
    return found
