"""Transfers between two pumps on loopback: every byte lands, and what may not be written isn't."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from prfaas.config.pump import split_address
from prfaas.model.errors import LocalProtocolError
from prfaas.model.transfer import FailureReason, LeaseGrant, TransferKind
from prfaas.transfer.frames import K_BLOCK_MAX_BYTES

K_WAIT_S = 30


def scatter(src, dst, segment, seed=1):
    """All of src in segments, to shuffled places in dst: (sources, destinations, lengths, order)."""
    n = len(src) // segment
    order = np.random.default_rng(seed).permutation(n)
    offsets = np.arange(n, dtype=np.uint64) * np.uint64(segment)
    return src.ctypes.data + offsets, dst.ctypes.data + offsets[order], np.full(n, segment, np.uint64), order


def equal(src, dst, segment, order):
    return np.array_equal(dst.reshape(-1, segment)[order], src.reshape(-1, segment))


def lease_on(client, array, room=1, generation=0, **kwargs):
    return client.grant_lease(room, generation, [(array.ctypes.data, len(array))], 30, **kwargs)


def send_kv(client, grant, src, dst, length, **kwargs):
    kwargs = {"kind": TransferKind.KV, "deadline_s": 20, "last": True, **kwargs}
    return client.submit(grant, src, dst, length, **kwargs)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("size", "segment"), [(64, 64), (1 << 16, 64), (1 << 20, 4096), (1 << 23, 65536), (999, 333)]
)
def test_a_leased_transfer_lands_byte_for_byte(pair, size, segment):
    pumps, east, west = pair
    src, dst = pumps.memory(east, size), pumps.memory(west, size, fill=0)
    lease = lease_on(west, dst)
    sources, destinations, lengths, order = scatter(src, dst, segment)
    outcome = send_kv(east, lease.grant, sources, destinations, lengths).wait(K_WAIT_S)
    assert outcome is not None
    assert (outcome.ok, outcome.payload_bytes) == (True, size)
    assert lease.wait(K_WAIT_S)
    assert equal(src, dst, segment, order)
    lease.revoke()


def test_a_hundred_thousand_segments_go_in_one_call(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 100_000 * 80), pumps.memory(west, 100_000 * 80, fill=0)
    sources, destinations, lengths, order = scatter(src, dst, 80)
    outcome = east.submit_raw(west.session_id, sources, destinations, lengths, deadline_s=30).wait(K_WAIT_S)
    assert outcome is not None
    assert outcome.ok
    assert equal(src, dst, 80, order)


@pytest.mark.parametrize("kind", [TransferKind.KV, TransferKind.STATE])
def test_two_ranks_slices_of_each_token_meet_in_one_ranks_tokens_and_part_again(pair, kind):
    pumps, east, west = pair
    tokens, size = 20_001, 100  # no part of a block's bytes
    halves = [pumps.memory(east, tokens * size + i) for i in (0, 1)]
    whole, back = pumps.memory(west, 2 * tokens * size, fill=0), pumps.memory(east, tokens * size, fill=0)
    lease = lease_on(west, whole, room=21, expected_sources=2)
    close, apart = (np.arange(tokens, dtype=np.uint64) * np.uint64(n * size) for n in (1, 2))
    lengths = np.full(tokens, size, np.uint64)
    sent = [
        send_kv(
            east, lease.grant, half.ctypes.data + close, whole.ctypes.data + i * size + apart, lengths,
            kind=kind, source=str(i),
        )
        for i, half in enumerate(halves)
    ]  # fmt: skip
    assert [transfer.wait(K_WAIT_S).ok for transfer in sent] == [True, True]
    assert lease.wait(K_WAIT_S)
    for i, half in enumerate(halves):
        assert np.array_equal(whole.reshape(tokens, 2, size)[:, i].reshape(-1), half[: tokens * size])
    lease.revoke()

    lease = lease_on(east, back, room=22)
    source = whole.ctypes.data + size + apart
    outcome = send_kv(west, lease.grant, source, back.ctypes.data + close, lengths, kind=kind).wait(K_WAIT_S)
    assert outcome.ok
    assert np.array_equal(back, halves[1][: tokens * size])
    lease.revoke()


def test_a_lease_is_complete_when_every_source_has_sent_all_its_kinds(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 6000), pumps.memory(west, 6000, fill=0)
    lease = lease_on(west, dst, room=5, expected_sources=2)
    kinds = list(TransferKind)[:3]
    transfers = []
    for rank in range(2):
        for i, kind in enumerate(kinds):
            assert not lease.complete
            at = 1000 * (3 * rank + i)
            transfers.append(
                send_kv(
                    east,
                    lease.grant,
                    [src.ctypes.data + at],
                    [dst.ctypes.data + at],
                    [1000],
                    kind=kind,
                    last=i == 2,
                    source=f"rank {rank}",
                )
            )
    assert all(t.wait(K_WAIT_S).ok for t in transfers)
    assert lease.wait(K_WAIT_S)
    assert sorted({a.kind for a in lease.arrivals}) == sorted(k.value for k in kinds)
    assert np.array_equal(src, dst)
    lease.revoke()


def test_many_transfers_at_once_all_complete(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 1 << 21), pumps.memory(west, 1 << 21, fill=0)
    n = 200
    size = len(src) // n
    leases, transfers = [], []
    for i in range(n):
        lease = west.grant_lease(i, 0, [(dst.ctypes.data + i * size, size)], 30)
        leases.append(lease)
        transfers.append(
            send_kv(east, lease.grant, [src.ctypes.data + i * size], [dst.ctypes.data + i * size], [size])
        )
    assert all(t.wait(K_WAIT_S).ok for t in transfers)
    assert np.array_equal(src[: n * size], dst[: n * size])
    for lease in leases:
        lease.revoke()


def forged(grant: LeaseGrant, **changes: object) -> LeaseGrant:
    return dataclasses.replace(grant, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token": os.urandom(16)}, FailureReason.LEASE_MISMATCH),
        ({"room": 99}, FailureReason.LEASE_MISMATCH),
        ({"generation": 99}, FailureReason.LEASE_MISMATCH),
        ({"lease_id": 12345}, FailureReason.LEASE_UNKNOWN),
    ],
)
def test_a_lease_takes_bytes_only_by_its_token_room_and_generation(pair, changes, reason):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=7)
    lease = lease_on(west, dst)
    wrong = send_kv(east, forged(lease.grant, **changes), [src.ctypes.data], [dst.ctypes.data], [4096])
    assert wrong.wait(K_WAIT_S).reason is reason
    assert (dst == 7).all()
    # The peer isn't blacklisted for it: the right grant works at once.
    assert send_kv(east, lease.grant, [src.ctypes.data], [dst.ctypes.data], [4096]).wait(K_WAIT_S).ok
    lease.revoke()


def test_addresses_outside_of_the_lease_or_of_registered_memory_are_refused(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 8192), pumps.memory(west, 8192, fill=7)
    half = west.grant_lease(1, 0, [(dst.ctypes.data, 4096)], 30)
    for destination, length in ((dst.ctypes.data + 4096, 4096), (dst.ctypes.data + 1, 4096), (64, 8)):
        outcome = send_kv(east, half.grant, [src.ctypes.data], [destination], [length]).wait(K_WAIT_S)
        assert outcome.reason is FailureReason.ADDRESS_REFUSED
    raw = east.submit_raw(west.session_id, [src.ctypes.data], [1 << 46], [8], deadline_s=20).wait(K_WAIT_S)
    assert raw.reason is FailureReason.ADDRESS_REFUSED
    source = east.submit_raw(west.session_id, [1 << 46], [dst.ctypes.data], [8], deadline_s=20).wait(K_WAIT_S)
    assert source.reason is FailureReason.SOURCE_REFUSED
    assert (dst == 7).all()
    half.revoke()


@pytest.mark.parametrize(
    ("sources", "destinations", "lengths"),
    [
        ([0], [0], [0]),
        ([0, 64], [0, 32], [64, 64]),
        ([0], [(1 << 64) - 8], [64]),
        ([0, 1], [0], [8]),
        ([], [], []),
    ],
)
def test_impossible_segments_end_as_bad_requests(pair, sources, destinations, lengths):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=7)
    sources = [src.ctypes.data + s for s in sources]
    destinations = [d if d > 4096 else dst.ctypes.data + d for d in destinations]
    outcome = east.submit_raw(west.session_id, sources, destinations, lengths, deadline_s=20).wait(K_WAIT_S)
    assert outcome.reason in (FailureReason.BAD_REQUEST, FailureReason.SOURCE_REFUSED)
    assert (dst == 7).all()


def test_memory_that_is_not_registered_cannot_be_leased(pair):
    _, _, west = pair
    with pytest.raises(LocalProtocolError):
        west.grant_lease(1, 0, [(4096, 4096)], 30)


def test_deregistered_memory_is_no_longer_written(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=7)
    west.deregister([dst.ctypes.data])
    outcome = east.submit_raw(
        west.session_id, [src.ctypes.data], [dst.ctypes.data], [4096], deadline_s=20
    ).wait(K_WAIT_S)
    assert outcome.reason is FailureReason.ADDRESS_REFUSED
    assert (dst == 7).all()


def test_source_memory_that_has_gone_fails_its_transfer_alone(pair):
    import mmap

    pumps, east, west = pair
    dst = pumps.memory(west, 8192, fill=7)
    gone = mmap.mmap(-1, 8192)
    address = np.frombuffer(gone, np.uint8).ctypes.data
    east.register([(address, 8192)])
    gone.close()
    outcome = east.submit_raw(west.session_id, [address], [dst.ctypes.data], [8192], deadline_s=20).wait(
        K_WAIT_S
    )
    assert outcome.reason is FailureReason.SOURCE_GONE
    east.deregister([address])
    src = pumps.memory(east, 8192)
    again = east.submit_raw(west.session_id, [src.ctypes.data], [dst.ctypes.data], [8192], deadline_s=20)
    assert again.wait(K_WAIT_S).ok


def test_a_revoked_lease_refuses_and_says_so_to_the_sender(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=7)
    lease = lease_on(west, dst)
    lease.revoke()
    outcome = send_kv(east, lease.grant, [src.ctypes.data], [dst.ctypes.data], [4096]).wait(K_WAIT_S)
    assert outcome.reason is FailureReason.LEASE_ENDED
    assert (dst == 7).all()
    assert not lease.complete


def test_a_lease_past_its_time_refuses(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=7)
    lease = west.grant_lease(1, 0, [(dst.ctypes.data, 4096)], 0.0)
    while True:
        outcome = send_kv(east, lease.grant, [src.ctypes.data], [dst.ctypes.data], [4096]).wait(K_WAIT_S)
        if not outcome.ok:
            break
    assert outcome.reason is FailureReason.LEASE_ENDED
    lease.revoke()


def test_nobody_at_the_address_fails_by_the_deadline_and_harms_no_other(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        lease = lease_on(west, dst)
        nobody = forged(lease.grant, address=f"127.0.0.1:{taken.getsockname()[1]}")
        lost = send_kv(east, nobody, [src.ctypes.data], [dst.ctypes.data], [4096], deadline_s=1.0)
        assert send_kv(east, lease.grant, [src.ctypes.data], [dst.ctypes.data], [4096]).wait(K_WAIT_S).ok
        assert lost.wait(K_WAIT_S).reason is FailureReason.DEADLINE
        lease.revoke()


def test_a_cancelled_transfer_ends_at_both_ends(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 1 << 24), pumps.memory(west, 1 << 24, fill=0)
    lease = lease_on(west, dst)
    # Its streams are open, so that it is on its way at once.
    assert east.submit_raw(
        west.session_id, [src.ctypes.data], [dst.ctypes.data], [64], deadline_s=20
    ).wait(K_WAIT_S).ok  # fmt: skip

    def is_under_way() -> bool:
        return any(p["address"] == west.address and p["in_flight_bytes"] for p in east.stats()["peers"])  # type: ignore[attr-defined]

    with stopped(pumps.pid("west")):  # or it may be through before it is cancelled
        transfer = send_kv(east, lease.grant, [src.ctypes.data], [dst.ctypes.data], [1 << 24])
        pumps.until(is_under_way)
        east.cancel(transfer)
    assert transfer.outcome is not None
    assert transfer.outcome.reason is FailureReason.CANCELLED
    assert not lease.wait(K_WAIT_S)
    assert lease.failure is not None
    assert lease.failure.reason == FailureReason.CANCELLED.value
    lease.revoke()


def test_a_transfer_is_over_when_cancel_returns_though_the_pumps_word_came_first(pair, monkeypatch):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 1 << 24), pumps.memory(west, 1 << 24, fill=0)
    lease = lease_on(west, dst)
    heard, returned = threading.Event(), threading.Event()
    withdraw = east._guards.withdraw

    def slow(slot, word):
        withdraw(slot, word)
        if threading.current_thread() is east._thread:
            heard.set()
            returned.wait(0.3)
        else:
            assert heard.wait(K_WAIT_S)

    monkeypatch.setattr(east._guards, "withdraw", slow)
    with stopped(pumps.pid("west")):
        transfer = send_kv(east, lease.grant, [src.ctypes.data], [dst.ctypes.data], [1 << 24])
        east.cancel(transfer)
        outcome = transfer.outcome
        returned.set()
    assert outcome is not None
    assert outcome.reason is FailureReason.CANCELLED
    lease.revoke()


def test_garbage_at_the_port_is_refused_and_the_pump_serves_on(pair):
    pumps, east, west = pair
    host, port = split_address(west.address)
    for garbage in (b"GET / HTTP/1.0\r\n\r\n" * 10, os.urandom(4096), b"PRFA" + bytes(60), b""):
        with socket.create_connection((host, port), timeout=10) as sock:
            sock.sendall(garbage)
            sock.settimeout(10)
            try:
                while garbage and sock.recv(4096):
                    pass
            except ConnectionError:
                pass
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=0)
    lease = lease_on(west, dst)
    assert send_kv(east, lease.grant, [src.ctypes.data], [dst.ctypes.data], [4096]).wait(K_WAIT_S).ok
    lease.revoke()
    assert west.stats()["inbound"]["refusals"]["handshake"] >= 3  # type: ignore[index]


def test_counters_account_for_every_byte_on_the_wire(pair):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 1 << 22), pumps.memory(west, 1 << 22, fill=0)

    def sent() -> dict[str, int]:
        peers = east.stats()["peers"]
        peer = next((p for p in peers if p["address"] == west.address), {})  # type: ignore[attr-defined]
        return {k: v for k, v in peer.items() if isinstance(v, int)}

    before = sent()
    sources, destinations, lengths, _ = scatter(src, dst, 4096)
    outcome = east.submit_raw(west.session_id, sources, destinations, lengths, deadline_s=20).wait(K_WAIT_S)
    assert outcome.ok

    def growth() -> dict[str, int]:
        after = sent()
        return {k: after[k] - before.get(k, 0) for k in after}

    def first_and_named(grown: dict[str, int]) -> tuple[int, int]:
        first = grown["tcp_bytes_sent"] - grown["retransmitted_bytes"]
        return first, sum(grown[f"{kind}_bytes_sent"] for kind in ("payload", "framing", "control"))

    def agree() -> bool:
        first, named = first_and_named(growth())
        return first == pytest.approx(named, rel=0.02)

    # TCP_INFO is read every 0.1 s or more: what the last stats saw may be a moment old.
    pumps.until(agree)
    grown = growth()
    # On a busy machine a block may be late, and repeated by another stream.
    repeated_bytes = grown["payload_bytes_sent"] - (1 << 22)
    assert 0 <= repeated_bytes <= outcome.resent_blocks * K_BLOCK_MAX_BYTES
    assert grown["framing_bytes_sent"] < 0.01 * (1 << 22)


def test_a_call_that_no_message_holds_is_refused_here_and_costs_no_other_transfer(pair, monkeypatch):
    pumps, east, west = pair
    src, dst = pumps.memory(east, 1 << 16), pumps.memory(west, 1 << 16, fill=0)
    lease = lease_on(west, dst)
    free = len(east._guards._free)
    monkeypatch.setattr("prfaas.pump_client.messages.K_MESSAGE_MAX_BYTES", 50_000)
    # In no order, and so not told as runs.
    places = np.random.default_rng(1).permutation(1 << 12).astype(np.uint64) * np.uint64(16)
    sizes = np.full(len(places), 16)
    with pytest.raises(LocalProtocolError, match="fewer segments"):
        send_kv(east, lease.grant, places + src.ctypes.data, places + dst.ctypes.data, sizes)
    assert len(east._guards._free) == free
    half = slice(0, None, 4)
    outcome = send_kv(
        east, lease.grant, places[half] + src.ctypes.data, places[half] + dst.ctypes.data, sizes[half]
    ).wait(K_WAIT_S)
    assert outcome.ok
    lease.revoke()
