"""Digests, poison and faults on memory of our own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from prfaas.config.backend import BackendConfig
from prfaas.model.transfer import TransferKind
from prfaas.sglang import verification
from prfaas.sglang.planning import Segments
from prfaas.sglang.verify import (
    K_POISON,
    KvFault,
    Rows,
    compare,
    digest_buffers,
    digest_items,
    poison,
    read_rows,
)

Bytes = NDArray[np.uint8]


def address(memory: Bytes) -> int:
    return int(memory.ctypes.data)


def pool(items: int, item_bytes: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, items * item_bytes, dtype=np.uint8)


@given(
    cut=st.integers(0, 8),
    order=st.permutations(range(8)),
    elsewhere=st.permutations(range(12)),
)
def test_digest_of_landed_pages_equals_that_of_sent_ones_wherever_they_lie(
    cut: int, order: list[int], elsewhere: list[int]
) -> None:
    source, destination = pool(8, 16, 1), np.zeros(12 * 16, dtype=np.uint8)
    target = elsewhere[:8]
    for src, dst in zip(order, target, strict=True):
        destination[dst * 16 : dst * 16 + 16] = source[src * 16 : src * 16 + 16]
    in_chunks = digest_items(address(source), 16, order[:cut])
    in_chunks = digest_items(address(source), 16, order[cut:], in_chunks)
    assert in_chunks == digest_items(address(destination), 16, target)


def test_digest_of_one_wrong_byte_differs() -> None:
    source = pool(4, 16, 1)
    wrong = source.copy()
    wrong[37] ^= 1
    assert digest_buffers([address(source)], [16], range(4)) != digest_buffers(
        [address(wrong)], [16], range(4)
    )


def test_poison_overwrites_what_it_is_given_and_nothing_else() -> None:
    memory = np.zeros(64, dtype=np.uint8)
    poison(np.array([[address(memory) + 8, 8]], dtype=np.uint64))
    assert memory.tolist() == [0] * 8 + [K_POISON] * 8 + [0] * 48


def one(values: list[int]) -> NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def test_zero_fault_sends_as_many_bytes_from_memory_of_zeros() -> None:
    registered: list[tuple[int, int]] = []
    fault = KvFault("zero")
    fault.prepare(4096, registered.extend)
    sent = fault.apply(TransferKind.KV, Segments(one([100, 200]), one([1, 2]), one([16, 32])), 7, 16)
    assert registered == [(int(sent.source[0]), 4096)]
    assert set(sent.source.tolist()) == {registered[0][0]}
    assert sent.length.tolist() == [16, 32]
    assert sent.destination.tolist() == [1, 2]


def test_drop_fault_leaves_out_one_page_of_one_layer_once_a_room() -> None:
    fault = KvFault("drop_page")
    plan = Segments(one([100, 200]), one([1000, 2000]), one([64, 64]))
    dropped = fault.apply(TransferKind.KV, plan, 7, 16)
    assert dropped.source.tolist() == [116, 200]
    assert dropped.destination.tolist() == [1016, 2000]
    assert dropped.length.tolist() == [48, 64]
    assert fault.apply(TransferKind.KV, plan, 7, 16).total_bytes == 128
    assert fault.apply(TransferKind.KV, plan, 8, 16).total_bytes == 112


@pytest.mark.parametrize("kind", ["zero", "drop_page"])
def test_faults_leave_state_and_auxiliary_data_alone(kind: str) -> None:
    plan = Segments(one([100]), one([1000]), one([64]))
    assert KvFault(kind).apply(TransferKind.STATE, plan, 7, 16) is plan


def row(side: str, room: int, **changes: Any) -> dict[str, Any]:
    return {"side": side, "room": room, "pages": 3, "kv": [1, 2], "state": {}, "aux": [5], **changes}


def test_rows_are_compared_by_room_and_the_difference_is_named(tmp_path: Path) -> None:
    prefill, decode = Rows(tmp_path, "prefill"), Rows(tmp_path, "decode")
    for room in (1, 2, 3):
        prefill.write(row("sent", room))
    decode.write(row("landed", 1))
    decode.write(row("landed", 2, kv=[1, 9], state={"0": [1]}))
    decode.write(row("landed", 4))
    assert compare(read_rows(tmp_path, "sent"), read_rows(tmp_path, "landed")) == {
        1: "equal",
        2: "kv, state differ",
        3: "no row of what landed",
        4: "no row of what was sent",
    }


def test_a_row_that_finds_no_room_is_left_out_and_the_next_one_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = Rows(tmp_path, "prefill")
    rows.write({"side": "sent", "room": 1})
    whole = rows.path
    rows.path = Path("/dev/full")
    for room in (2, 3, 4):
        rows.write({"side": "sent", "room": room})
    rows.path = whole
    rows.write({"side": "sent", "room": 5})
    assert [row["room"] for row in read_rows(tmp_path, "sent")] == [1, 5]
    # Said once for one, two, four … of them.
    assert len(caplog.records) == 2
    assert "No space left" in caplog.text


def test_rooms_that_were_aborted_are_forgotten_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "K_REMEMBERED_ROOMS", 2)
    config = BackendConfig.model_validate({"verify": {"directory": str(tmp_path), "poison": False}})
    args = SimpleNamespace(kv_data_ptrs=[], kv_item_lens=[])
    found = verification.Verification(config, args, "decode")
    for room in range(5):
        found.leased(room, 1, np.array([], dtype=np.int32), None, None)
        found.sending(SimpleNamespace(room=room, prefill_kv_indices=[], is_last_chunk=False))
    assert (list(found._leased), list(found._sent)) == ([3, 4], [3, 4])
