"""What a receiver keeps of transfers that have ended."""

import gc
import tracemalloc

import numpy as np
import pytest

from prfaas.model.transfer import FailureReason
from prfaas.transfer.frames import Open
from prfaas.transfer.receiving import Known, Lease, Received, Receiving, Refused
from prfaas.transfer.segments import Ranges

K_BYTES = 4096
K_RUNS = 32
K_REGISTERED = Ranges(np.array([[0, 1 << 40]], dtype=np.uint64))


def opening(lease: int, token: bytes) -> Open:
    return Open(
        room=lease, generation=0, lease_id=lease, token=token, kind="kv",
        total_bytes=K_RUNS * K_BYTES, n_blocks=1, deadline_s=9.0,
    )  # fmt: skip


def play(receiving: Receiving, number: int) -> Open:
    """A lease on scattered pages, one transfer of one block to them, and the lease's end."""
    token = number.to_bytes(16, "big")
    runs = np.array([[(number * K_RUNS + i) * 2 * K_BYTES, K_BYTES] for i in range(K_RUNS)], dtype=np.uint64)
    ranges = Ranges(runs)
    receiving.grant(Lease(number, token, number, 0, ranges, 1e9, "owner"), K_REGISTERED)
    said = opening(number, token)
    assert receiving.on_open("peer", "east", number, said, 0.0) is None
    apply = receiving.on_block("peer", number, 0, runs)
    assert isinstance(receiving.applied(apply.incoming, 0, K_RUNS * K_BYTES), Received)
    receiving.end(number, FailureReason.LEASE_ENDED)
    return said


def test_an_ended_transfer_costs_little_memory_however_scattered_its_pages_were() -> None:
    receiving = Receiving(max_transfers=4)
    play(receiving, 1)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(2, 1002):
            play(receiving, number)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 1000 < 1024


def test_what_is_kept_of_ended_transfers_and_leases_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pump under load grows until it remembers so many, and no further; what has ended goes at once, for a
    collection of a process that holds much comes seldom.
    """
    monkeypatch.setattr("prfaas.transfer.receiving.K_REMEMBERED", 200)
    receiving, kept = Receiving(max_transfers=4), []
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for number in range(1, 1401):
            play(receiving, number)
            if number % 700 == 0:
                kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept[1] - kept[0] < 10_000


def test_an_ended_transfers_late_copies_are_known_and_its_id_is_nobody_elses() -> None:
    receiving = Receiving(max_transfers=4)
    said = play(receiving, 1)
    pieces = np.array([[0, K_BYTES]], dtype=np.uint64)
    assert isinstance(receiving.on_block("peer", 1, 0, pieces), Known)
    assert isinstance(receiving.on_block("another", 1, 0, pieces), Refused)
    # The same sender, over a new connection, says again that it opened it.
    assert receiving.on_open("peer again", "east", 1, said, 1.0) is None
    assert isinstance(receiving.on_block("peer again", 1, 0, pieces), Known)
    refused = receiving.on_open("peer", "elsewhere", 1, said, 1.0)
    assert isinstance(refused, Refused)
    assert refused.reason is FailureReason.BAD_REQUEST
