"""SGLang's checksum of a request's pages and states (`--disaggregation-enable-kv-checksum`) where they are in
host memory: its own is a CUDA kernel. The same Adler-32, over the same items in the same order."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

K_COMPUTE = "sglang.srt.disaggregation.checksum.KvChecksumComputer.compute"


def register(registry: Any, replace: Any) -> None:
    registry.register(K_COMPUTE, compute, replace)


def compute(computer: Any, kv_page_indices_gpu: Any, state_indices_gpu: Any = None) -> int:
    """Of SGLang's KvChecksumComputer: its buffers' items, those of KV and then those of state."""
    value = 1
    for pointers, lengths, indices in (
        (computer._kv_data_ptrs, computer._kv_item_lens, kv_page_indices_gpu),
        (computer._state_data_ptrs, computer._state_item_lens, state_indices_gpu),
    ):
        for pointer, length in zip(pointers, lengths, strict=True):
            value = adler32_of_items(pointer, length, indices.numpy(), value)
    return value


def adler32_of_items(pointer: int, length: int, indices: Sequence[int] | Any, before: int = 1) -> int:
    """Going on from `before`, over items of one length at `pointer`."""
    rows = np.asarray(indices, dtype=np.int64)
    if rows.size == 0 or length == 0:
        return before
    whole = (ctypes.c_uint8 * (length * (int(rows.max()) + 1))).from_address(pointer)
    items = np.ctypeslib.as_array(whole).reshape(-1, length)
    return zlib.adler32(np.ascontiguousarray(items[rows]).data, before)
