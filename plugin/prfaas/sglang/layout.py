"""How a server's caches lie in memory: what two peers must agree on, and which bytes a request's lease
covers.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from prfaas.sglang.planning import page_pieces

K_WHOLE_REGION_STATES = ("dsa_tail", "swa_ring", "c128_state", "request_row")
"""Kinds of state whose indices don't name items one by one: their lease covers the component's memory."""


class Layout(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a decode server tells a prefill server at first contact."""

    model: str
    page_size: int
    dtype: str
    tp: int
    kv_item_bytes: list[int]
    state_types: list[str]
    state_item_bytes: list[list[int]]
    aux_item_bytes: list[int]

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """Raises msgspec.MsgspecError."""
        return msgspec.msgpack.decode(data, type=cls)


def describe(manager: Any) -> Layout:
    """This rank's layout."""
    args = manager.kv_args
    return Layout(
        model=str(getattr(manager.server_args, "served_model_name", "") or ""),
        page_size=int(args.page_size),
        dtype=str(args.kv_cache_dtype_str),
        tp=int(manager.attn_tp_size),
        kv_item_bytes=[int(n) for n in args.kv_item_lens],
        state_types=[str(getattr(kind, "value", kind)) for kind in args.state_types],
        state_item_bytes=[[int(n) for n in lengths] for lengths in args.state_item_lens],
        aux_item_bytes=[int(n) for n in args.aux_item_lens],
    )


def differences(ours: Layout, theirs: Layout) -> str:
    """What keeps a decode server (`theirs`) from using a prefill server's (`ours`) caches, in one line;
    empty: nothing.

    Slices for unequal tensor parallelism and pipeline stages are SGLang's to map, so lengths are compared
    where parallelism is equal.
    """
    wrong = [
        f"{what}: prefill has {mine}, decode has {other}"
        for what, mine, other in (
            ("page size", ours.page_size, theirs.page_size),
            ("KV dtype", ours.dtype, theirs.dtype),
            ("kinds of state", ours.state_types, theirs.state_types),
            ("auxiliary items", ours.aux_item_bytes, theirs.aux_item_bytes),
        )
        if mine != other
    ]
    if (mine := last_word(ours.model)) != (other := last_word(theirs.model)) and mine and other:
        # Caches of two models can lie alike, and mixed up they give wrong answers without an error.
        wrong.append(
            f"model: prefill serves {mine!r}, decode {other!r}; if it is one, name it alike by "
            "--served-model-name"
        )
    if ours.tp == theirs.tp and len(ours.kv_item_bytes) == len(theirs.kv_item_bytes):
        wrong += [
            f"{what} bytes an item: prefill has {mine}, decode has {other}"
            for what, mine, other in (
                ("KV", ours.kv_item_bytes, theirs.kv_item_bytes),
                ("state", ours.state_item_bytes, theirs.state_item_bytes),
            )
            if mine != other
        ]
    elif len(ours.kv_item_bytes) > len(theirs.kv_item_bytes):
        wrong.append(
            f"buffers of KV: prefill has {len(ours.kv_item_bytes)}, decode has {len(theirs.kv_item_bytes)}"
        )
    return "; ".join(wrong)


def last_word(name: str) -> str:
    """Of a served model's name, which by default is the path that it was loaded from."""
    return name.rstrip("/").rpartition("/")[2]


def whole_regions(args: Any) -> list[str]:
    """Kinds of this server's state that can't be staged: copied into its pages, a lease's memory would be
    everybody's.
    """
    kinds = {str(getattr(kind, "value", kind)) for kind in args.state_types}
    return sorted(kinds & set(K_WHOLE_REGION_STATES))


def leased_pieces(
    args: Any, kv_indices: Any, aux_index: int | None, state_indices: list[Any] | None
) -> NDArray[np.uint64]:
    """Rows (address, length) of all that a request's senders may write: its pages, states and auxiliary
    slot.
    """
    rows = [page_pieces(args.kv_data_ptrs, args.kv_item_lens, kv_indices)]
    for i, indices in enumerate(state_indices or []):
        if indices is None or i >= len(args.state_data_ptrs):
            continue
        pointers, lengths = args.state_data_ptrs[i], args.state_item_lens[i]
        kind = str(getattr(args.state_types[i], "value", args.state_types[i]))
        if kind in K_WHOLE_REGION_STATES:
            regions = zip(pointers, args.state_data_lens[i], strict=True)
            rows.append(np.array([row for row in regions if row[1]], dtype=np.uint64).reshape(-1, 2))
        else:
            rows.append(page_pieces(pointers, lengths, indices))
    rows.append(aux_pieces(args, aux_index))
    return np.concatenate(rows)


def aux_pieces(args: Any, aux_index: int | None) -> NDArray[np.uint64]:
    """Rows (address, length) of a request's auxiliary slot."""
    return page_pieces(args.aux_data_ptrs, args.aux_item_lens, [] if aux_index is None else [aux_index])
