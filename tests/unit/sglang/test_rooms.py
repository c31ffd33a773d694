"""What a server knows of the requests that are crossing, over a pump that does what the test says."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import FailureReason, LeaseGrant, Outcome, TransferKind
from prfaas.pump_client import Transfer
from prfaas.sglang import rooms as rooms_module
from prfaas.sglang.planning import Segments
from prfaas.sglang.rooms import LeasedRoom, LeasedRooms, Part, Remembered, SendingRoom, SendingRooms
from prfaas.sglang.staging import Places


class FakePump:
    """Notes what is submitted and cancelled; the test ends transfers."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Transfer, dict[str, Any]]] = []
        self.cancelled: list[Transfer] = []

    def submit(
        self, grant: LeaseGrant, sources: Any, destinations: Any, lengths: Any, **how: Any
    ) -> Transfer:
        transfer = Transfer(len(self.submitted) + 1)
        self.submitted.append((transfer, {"grant": grant, "bytes": int(np.sum(lengths)), **how}))
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        self.cancelled.append(transfer)
        transfer.end(Outcome(False, FailureReason.CANCELLED, "by this server"))


def grant(room: int, lease_id: int = 1) -> LeaseGrant:
    return LeaseGrant("h:1", lease_id, b"t" * 16, room, 1, 1 << 20)


def segments(n_bytes: int) -> Segments:
    one = np.array([n_bytes], dtype=np.uint64)
    return Segments(one * 0 + 4096, one * 0 + 8192, one) if n_bytes else Segments(one[:0], one[:0], one[:0])


class Prefill:
    def __init__(self) -> None:
        self.pump = FakePump()
        self.concluded: list[tuple[int, str | None]] = []
        self.released: list[int] = []
        self.rooms = SendingRooms(self.pump, "rank 0", self._conclude)  # type: ignore[arg-type]

    def _conclude(self, room: SendingRoom, failure: str | None) -> None:
        self.concluded.append((room.room, failure))

    def send(self, room: int, parts: Sequence[tuple[str, TransferKind, int]], last: bool) -> bool:
        made = [Part(s, kind, segments(n), lambda n=n: self.released.append(n)) for s, kind, n in parts]  # type: ignore[misc]
        return self.rooms.send(room, made, last, 30.0)

    def end(self, i: int, ok: bool = True, reason: FailureReason | None = None) -> None:
        self.pump.submitted[i][0].end(Outcome(ok, reason, "why"))


@pytest.fixture
def prefill() -> Prefill:
    return Prefill()


def test_room_concludes_when_its_last_part_is_acknowledged_in_whatever_order(prefill: Prefill) -> None:
    prefill.rooms.granted("s", grant(7))
    prefill.send(7, [("s", TransferKind.KV, 100)], last=False)
    prefill.end(0)
    assert prefill.concluded == []
    prefill.send(
        7, [("s", TransferKind.KV, 50), ("s", TransferKind.STATE, 9), ("s", TransferKind.AUX, 3)], True
    )
    prefill.end(3)
    prefill.end(1)
    assert prefill.concluded == []
    prefill.end(2)
    assert prefill.concluded == [(7, None)]
    assert len(prefill.rooms) == 0


def test_kinds_of_one_request_are_handed_over_side_by_side(prefill: Prefill) -> None:
    prefill.rooms.granted("s", grant(7))
    prefill.send(
        7, [("s", TransferKind.KV, 50), ("s", TransferKind.STATE, 9), ("s", TransferKind.AUX, 3)], True
    )
    assert [how["kind"] for _, how in prefill.pump.submitted] == ["kv", "state", "aux"]
    assert [how["last"] for _, how in prefill.pump.submitted] == [False, False, True]


def test_each_peers_own_last_part_says_so(prefill: Prefill) -> None:
    prefill.rooms.granted("a", grant(7, 1))
    prefill.rooms.granted("b", grant(7, 2))
    prefill.send(7, [("a", TransferKind.KV, 5), ("a", TransferKind.AUX, 1), ("b", TransferKind.AUX, 1)], True)
    assert [(h["grant"].lease_id, h["last"]) for _, h in prefill.pump.submitted] == [
        (1, False),
        (1, True),
        (2, True),
    ]


def test_empty_parts_are_not_sent_and_dont_count_as_last(prefill: Prefill) -> None:
    prefill.rooms.granted("s", grant(7))
    prefill.send(7, [("s", TransferKind.AUX, 3), ("s", TransferKind.KV, 0)], True)
    assert len(prefill.pump.submitted) == 1
    assert prefill.pump.submitted[0][1]["last"]


def test_one_broken_part_fails_its_room_with_the_reason_and_stops_the_rest(prefill: Prefill) -> None:
    prefill.rooms.granted("s", grant(7))
    prefill.rooms.granted("s", grant(8))
    prefill.send(8, [("s", TransferKind.KV, 5)], True)
    prefill.send(7, [("s", TransferKind.KV, 50), ("s", TransferKind.AUX, 3)], True)
    prefill.end(1, ok=False, reason=FailureReason.LEASE_ENDED)
    assert prefill.concluded == [(7, "KV transfer aborted: KV: lease ended (why)")]
    assert [t.transfer_id for t in prefill.pump.cancelled] == [3]
    # The same peer's other room goes on.
    prefill.end(0)
    assert prefill.concluded[-1] == (8, None)


def test_cancelled_room_concludes_nothing_and_takes_no_more(prefill: Prefill) -> None:
    prefill.rooms.granted("s", grant(7))
    prefill.send(7, [("s", TransferKind.KV, 50)], False)
    prefill.rooms.cancel(7, "aborted")
    prefill.send(7, [("s", TransferKind.AUX, 3)], True)
    assert len(prefill.pump.submitted) == 1
    assert prefill.concluded == []


def test_rooms_whose_requests_never_come_are_bounded(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms_module, "K_REMEMBERED_ROOMS", 3)
    prefill.rooms.granted("s", grant(0))
    prefill.send(0, [("s", TransferKind.KV, 5)], False)
    for room in range(1, 10):
        prefill.rooms.granted("s", grant(room))
    assert len(prefill.rooms) == 3
    prefill.send(0, [("s", TransferKind.AUX, 5)], True)  # what is under way stays
    prefill.end(0)
    prefill.end(1)
    assert prefill.concluded == [(0, None)]


def test_where_a_peers_pages_are_staged_is_known_as_long_as_its_room_and_of_its_present_lease(
    prefill: Prefill,
) -> None:
    rooms, places = prefill.rooms, Places.laid_out(np.array([[100, 10]], dtype=np.uint64), 5000)
    for end in (
        lambda: rooms.cancel(7, "aborted"),
        lambda: (prefill.send(7, [("s", TransferKind.AUX, 5)], True), prefill.end(-1)),
        lambda: rooms.granted("s", grant(7, 2)),
    ):
        rooms.granted("s", grant(7), places)
        assert rooms.places_of(7, "s") is places
        assert rooms.places_of(7, "another") is None
        end()  # type: ignore[no-untyped-call]
        assert rooms.places_of(7, "s") is None


def test_source_is_released_when_its_transfer_ends_or_at_once_when_it_is_not_sent(prefill: Prefill) -> None:
    assert not prefill.send(7, [("s", TransferKind.KV, 50)], False)
    assert prefill.released == [50]
    prefill.rooms.granted("s", grant(7))
    assert prefill.send(
        7, [("s", TransferKind.KV, 60), ("s", TransferKind.KV, 0), ("s", TransferKind.KV, 70)], True
    )
    assert prefill.released == [50, 0]
    prefill.end(1)
    prefill.rooms.cancel(7, "aborted")
    assert prefill.released == [50, 0, 70, 60]


def test_part_that_ended_before_the_next_was_handed_over_still_counts(prefill: Prefill) -> None:
    prefill.rooms.granted("s", grant(7))
    prefill.send(7, [("s", TransferKind.KV, 50)], False)
    prefill.end(0, ok=False, reason=FailureReason.DEADLINE)
    assert prefill.concluded == [(7, "KV transfer aborted: KV: deadline (why)")]
    prefill.send(7, [("s", TransferKind.AUX, 3)], True)
    assert len(prefill.pump.submitted) == 1


def test_what_the_pump_cannot_take_leaves_nothing_taken_for_it(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill.rooms.granted("s", grant(7))
    submit = prefill.pump.submit

    def take_one(*args: Any, **how: Any) -> Transfer:
        if prefill.pump.submitted:
            raise PrfaasError("no guard is free")
        return submit(*args, **how)

    monkeypatch.setattr(prefill.pump, "submit", take_one)
    with pytest.raises(PrfaasError, match="no guard"):
        prefill.send(7, [("s", TransferKind.KV, n) for n in (50, 60, 70)], True)
    assert prefill.released == [60, 70]
    # The one that is under way ends with its room.
    prefill.rooms.cancel(7, "can't be sent")
    assert prefill.released == [60, 70, 50]


class FakeLease:
    def __init__(self) -> None:
        self.revoked = 0

    def revoke(self) -> None:
        self.revoked += 1


def held(rooms: LeasedRooms, released: list[str]) -> tuple[LeasedRoom, FakeLease]:
    lease = FakeLease()
    leased = LeasedRoom(7, rooms.next_generation(), lease, release=lambda: released.append("x"))  # type: ignore[arg-type]
    rooms.hold(leased)
    return leased, lease


def test_lease_ends_once_and_gives_back_what_it_stood_on() -> None:
    rooms, released = LeasedRooms(), []  # type: tuple[LeasedRooms, list[str]]
    _, lease = held(rooms, released)
    rooms.end(7)
    rooms.end(7)
    assert (lease.revoked, released, len(rooms)) == (1, ["x"], 0)


def test_landing_ends_the_lease_before_it_finishes_and_only_for_the_rooms_present_life() -> None:
    rooms, released = LeasedRooms(), []  # type: tuple[LeasedRooms, list[str]]
    first, old = held(rooms, released)
    rooms.end(7)
    second, lease = held(rooms, released)
    seen: list[int] = []
    assert not rooms.land(first, lambda: seen.append(old.revoked))
    assert rooms.land(second, lambda: seen.append(lease.revoked))
    assert not rooms.land(second, lambda: seen.append(99))
    assert (seen, released, len(rooms)) == ([1], ["x", "x"], 0)


def test_end_waits_for_what_landed_to_be_in_its_place() -> None:
    rooms, released = LeasedRooms(), []  # type: tuple[LeasedRooms, list[str]]
    leased, lease = held(rooms, released)
    inside, go_on = threading.Event(), threading.Event()

    def finish() -> None:
        inside.set()
        assert go_on.wait(10)

    landing = threading.Thread(target=rooms.land, args=(leased, finish))
    landing.start()
    assert inside.wait(10)
    ending = threading.Thread(target=rooms.end, args=(7,))
    ending.start()
    ending.join(0.05)
    assert ending.is_alive()
    assert released == []
    go_on.set()
    ending.join(10)
    landing.join(10)
    assert not ending.is_alive()
    assert (lease.revoked, released) == (1, ["x"])


def test_a_landing_that_fails_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise PrfaasError("the pump client is closed")

    for of_the_lease in (True, False):
        rooms, released = LeasedRooms(), []  # type: tuple[LeasedRooms, list[str]]
        leased, lease = held(rooms, released)
        monkeypatch.setattr(lease, "revoke", fail if of_the_lease else lambda: None)
        with pytest.raises(PrfaasError):
            rooms.land(leased, (lambda: None) if of_the_lease else fail)
        ending = threading.Thread(target=rooms.end, args=(7,), daemon=True)
        ending.start()
        ending.join(10)
        assert not ending.is_alive()
        assert (released, len(rooms)) == (["x"], 0)


def test_generations_of_a_room_differ() -> None:
    rooms = LeasedRooms()
    assert len({rooms.next_generation() for _ in range(100)}) == 100


def test_remembered_reasons_are_bounded_and_taken_once() -> None:
    remembered = Remembered(most=2)
    for room in range(3):
        remembered.put(room, f"reason {room}")
    assert [remembered.take(room) for room in range(3)] == [None, "reason 1", "reason 2"]
    assert remembered.take(2) is None


def test_a_reason_that_is_asked_for_stays_longer_than_those_that_nobody_asks_for() -> None:
    remembered = Remembered(most=2)
    for session in ("alive", "gone", "another"):
        remembered.put(session, f"of {session}")
        assert remembered.get("alive") == "of alive"
    assert remembered.get("gone") is None
    assert remembered.take("another") == "of another"
