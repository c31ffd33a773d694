"""Which bytes a request covers, and what SGLang's own mapping comes to when an engine only writes it down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.sglang.layout import Layout, differences, leased_pieces
from prfaas.sglang.planning import (
    Column,
    InlineExecutor,
    RecordingEngine,
    Segments,
    as_column,
    page_pieces,
)


@given(
    indices=st.lists(st.integers(0, 200), max_size=60),
    pointers=st.lists(st.integers(1, 1000), max_size=3).map(lambda xs: [x << 20 for x in xs]),
    item=st.integers(1, 300),
)
def test_pieces_cover_each_item_of_each_buffer_once_and_nothing_else(
    indices: list[int], pointers: list[int], item: int
) -> None:
    pieces = page_pieces(pointers, [item] * len(pointers), indices)
    covered = sorted(b for a, n in pieces.tolist() for b in range(a, a + n))
    wanted = sorted(
        b for p in pointers for i in set(indices) for b in range(p + i * item, p + (i + 1) * item)
    )
    assert covered == wanted


def test_neighbouring_pages_are_one_piece() -> None:
    assert page_pieces([1 << 20], [10], [7, 5, 6]).tolist() == [[(1 << 20) + 50, 30]]


@dataclass
class Args:
    """As SGLang's KVArgs."""

    kv_data_ptrs: list[int] = field(default_factory=lambda: [1 << 20, 2 << 20])
    kv_item_lens: list[int] = field(default_factory=lambda: [16, 16])
    aux_data_ptrs: list[int] = field(default_factory=lambda: [9 << 20])
    aux_item_lens: list[int] = field(default_factory=lambda: [8])
    state_types: list[Any] = field(default_factory=list)
    state_data_ptrs: list[list[int]] = field(default_factory=list)
    state_data_lens: list[list[int]] = field(default_factory=list)
    state_item_lens: list[list[int]] = field(default_factory=list)


def test_lease_covers_pages_states_and_the_auxiliary_slot() -> None:
    args = Args(
        state_types=["mamba", "dsa_tail"],
        state_data_ptrs=[[5 << 20], [6 << 20]],
        state_data_lens=[[4096], [512]],
        state_item_lens=[[64], [32]],
    )
    pieces = leased_pieces(args, np.array([3], dtype=np.int32), 2, [[4], [1, 2]])
    assert sorted(map(tuple, pieces.tolist())) == sorted(
        [
            ((1 << 20) + 48, 16),
            ((2 << 20) + 48, 16),
            ((5 << 20) + 256, 64),
            (6 << 20, 512),  # its indices don't name items: the whole component
            ((9 << 20) + 16, 8),
        ]
    )


def test_a_request_that_lacks_no_page_still_leases_its_auxiliary_slot() -> None:
    pieces = leased_pieces(Args(), np.array([], dtype=np.int32), 0, None)
    assert pieces.tolist() == [[9 << 20, 8]]


def layout(**changes: Any) -> Layout:
    fields: dict[str, Any] = {
        "model": "m",
        "page_size": 1,
        "dtype": "bfloat16",
        "tp": 1,
        "kv_item_bytes": [128] * 8,
        "state_types": [],
        "state_item_bytes": [],
        "aux_item_bytes": [4, 64],
    }
    return Layout(**{**fields, **changes})


@pytest.mark.parametrize(
    ("prefill", "decode"), [("m", "m"), ("/models/m", "/data/hub/m/"), ("org/m", "m"), ("m", ""), ("", "m")]
)
def test_equal_layouts_agree_wherever_the_model_was_loaded_from(prefill: str, decode: str) -> None:
    assert differences(layout(model=prefill), layout(model=decode)) == ""


def test_two_models_whose_caches_lie_alike_are_refused_by_their_names() -> None:
    assert differences(layout(model="/models/a"), layout(model="/models/b")) == (
        "model: prefill serves 'a', decode 'b'; if it is one, name it alike by --served-model-name"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"page_size": 64}, "page size: prefill has 1, decode has 64"),
        ({"dtype": "float8"}, "KV dtype: prefill has bfloat16, decode has float8"),
        ({"state_types": ["mamba"]}, "kinds of state: prefill has [], decode has ['mamba']"),
        ({"kv_item_bytes": [256] * 8}, "KV bytes an item"),
        ({"kv_item_bytes": [128] * 6}, "buffers of KV: prefill has 8, decode has 6"),
    ],
)
def test_layouts_that_differ_are_refused_by_the_value_and_the_side(change: dict[str, Any], says: str) -> None:
    assert says in differences(layout(), layout(**change))


def test_slices_for_unequal_parallelism_are_left_to_sglang() -> None:
    assert differences(layout(tp=2, kv_item_bytes=[64] * 8), layout()) == ""


def test_layout_survives_the_wire() -> None:
    assert Layout.from_bytes(layout().to_bytes()) == layout()


class FakePump:
    def __init__(self) -> None:
        self.registered: list[tuple[int, int]] = []

    def register(self, regions: list[tuple[int, int]]) -> None:
        self.registered += regions

    def deregister(self, addresses: list[int]) -> None:
        self.registered = [r for r in self.registered if r[0] not in addresses]


def test_engine_writes_down_what_is_asked_while_recording() -> None:
    pump = FakePump()
    engine = RecordingEngine(pump, "h:1")  # type: ignore[arg-type]
    engine.batch_register([100, 200], [10, 20])
    engine.batch_deregister([100])
    assert pump.registered == [(200, 20)]
    with engine.recording() as recorder:
        task = InlineExecutor().submit(engine.batch_transfer_sync, "peer", [1, 2], [11, 12], [5, 0])
        assert task.result() == 0
        assert engine.batch_transfer_sync("peer", [3], [13], [7]) == 0
    planned = recorder.segments()
    assert planned.source.tolist() == [1, 3]  # an empty piece is no piece
    assert planned.destination.tolist() == [11, 13]
    assert planned.total_bytes == 12


def test_engine_refuses_a_transfer_that_nobody_planned() -> None:
    engine = RecordingEngine(FakePump(), "h:1")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="outside of a plan"):
        engine.batch_transfer_sync("peer", [1], [2], [3])


def test_inline_executor_keeps_a_tasks_exception_for_whoever_asks() -> None:
    with pytest.raises(ZeroDivisionError):
        InlineExecutor().submit(lambda: 1 // 0).result()


@pytest.mark.parametrize("n", [0, 1, 5])
def test_indices_that_stay_arrays_are_planned_as_lists_of_them_are(n: int) -> None:
    """The steps that SGLang's mapping of slices takes."""
    indices = np.arange(n, dtype=np.int32)[::-1]

    def planned(indices: Any) -> Segments:
        engine = RecordingEngine(FakePump(), "h:1")  # type: ignore[arg-type]
        with engine.recording() as recorder:
            slots = (indices.reshape(-1, 1).astype(np.int64) * 256 + np.array([[0, 64]])).reshape(-1).tolist()
            if slots:
                engine.batch_transfer_sync("peer", slots, slots, [64] * len(slots))
        return recorder.segments()

    found, wanted = planned(indices.view(Column)), planned(indices)
    for name in ("source", "destination", "length"):
        column = getattr(found, name)
        assert type(column) is np.ndarray
        assert column.dtype == np.uint64
        assert column.tolist() == getattr(wanted, name).tolist()
    assert len(found) == 2 * n


def test_lengths_are_read_one_by_one_where_they_differ() -> None:
    for lengths in ([], [5], [5, 5, 5], [5, 5, 6], [6, 5, 5]):
        assert as_column(lengths).tolist() == lengths
