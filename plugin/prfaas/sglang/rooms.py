"""What a server knows of the requests that are crossing: on the prefill side what is being sent, on the
decode side what is leased. No SGLang, no transport of its own: callers' locks, clocks and handles.

A *generation* tells two lives of one room apart: SGLang uses a room again when a retracted request is
computed anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from prfaas.model.transfer import LeaseGrant, Outcome, TransferKind
from prfaas.sglang.transport import Lease, Order, Segments, Sending, Transport

K_REMEMBERED_ROOMS = 65536


@dataclass
class Destination:
    """One lease that a room of ours fills, and how far that has come."""

    grant: LeaseGrant
    index: int = 0
    """Transfers handed over so far: the place of the next one."""


@dataclass
class SendingRoom:
    """A prefill server's room: transfers handed over, and what they came to."""

    room: int
    destinations: dict[str, Destination] = field(default_factory=dict)
    """By the peer's session."""
    open: dict[int, Sending] = field(default_factory=dict)
    bytes_by_kind: dict[TransferKind, int] = field(default_factory=dict)
    all_handed_over: bool = False
    failure: str | None = None
    concluded: bool = False


class SendingRooms:
    """All rooms of a prefill server. `conclude(room, failure)` is called once a room, outside of the lock:
    failure is None when every peer has all of it, else what went wrong first."""

    def __init__(
        self, transport: Transport, source: str, conclude: Callable[[SendingRoom, str | None], None]
    ) -> None:
        self._transport, self._source, self._conclude = transport, source, conclude
        self._lock = threading.Lock()
        self._rooms: dict[int, SendingRoom] = {}
        self._next = 0

    def granted(self, session: str, grant: LeaseGrant) -> None:
        """A peer has leased pages to a room. A newer generation replaces the one before."""
        with self._lock:
            room = self._rooms.get(grant.room)
            if room is None or room.concluded:
                room = self._rooms[grant.room] = SendingRoom(grant.room)
            room.destinations[session] = Destination(grant)

    def known(self, room: int) -> bool:
        with self._lock:
            return room in self._rooms

    def send(
        self,
        room_id: int,
        parts: list[tuple[str, TransferKind, Segments]],
        last: bool,
        deadline_s: float,
    ) -> None:
        """Hand over a chunk's parts, (session, kind, segments) each; `last`: there will be no more of this
        room.
        """
        orders: list[tuple[int, Order]] = []
        with self._lock:
            room = self._rooms.get(room_id)
            if room is None or room.failure is not None or room.concluded:
                return
            totals: dict[str, int] = {}
            parts = [part for part in parts if len(part[2])]
            for session, _, _ in parts:
                totals[session] = totals.get(session, room.destinations[session].index) + 1
            for session, kind, segments in parts:
                to = room.destinations[session]
                count = totals[session] if last else 0
                order = Order(to.grant, kind, segments, deadline_s, self._source, to.index, count)
                to.index += 1
                orders.append((self._next, order))
                self._next += 1
                room.bytes_by_kind[kind] = room.bytes_by_kind.get(kind, 0) + segments.total_bytes
            room.all_handed_over = last
            # Reserved before they start, so that the first to end doesn't conclude the room.
            for number, _ in orders:
                room.open[number] = _NotStarted()
        for number, order in orders:
            self._start(room, number, order)
        self._maybe_conclude(room)

    def _start(self, room: SendingRoom, number: int, order: Order) -> None:
        sending = self._transport.send(order, lambda outcome: self._done(room, number, order.kind, outcome))
        with self._lock:
            if number in room.open:
                room.open[number] = sending
            cancelled = room.failure is not None
        if cancelled:
            sending.cancel()

    def _done(self, room: SendingRoom, number: int, kind: TransferKind, outcome: Outcome) -> None:
        others: list[Sending] = []
        with self._lock:
            room.open.pop(number, None)
            if not outcome.ok and room.failure is None:
                room.failure = describe(kind, outcome)
                others = list(room.open.values())
        for sending in others:
            sending.cancel()
        self._maybe_conclude(room)

    def _maybe_conclude(self, room: SendingRoom) -> None:
        with self._lock:
            if room.concluded or (room.failure is None and (room.open or not room.all_handed_over)):
                return
            room.concluded = True
            if self._rooms.get(room.room) is room:
                del self._rooms[room.room]
        self._conclude(room, room.failure)

    def cancel(self, room_id: int, reason: str) -> None:
        """The room is over on this side: what is on its way stops. Nothing is concluded: the caller knows."""
        with self._lock:
            room = self._rooms.pop(room_id, None)
            if room is None:
                return
            room.concluded = True
            room.failure = room.failure or reason
            sendings = list(room.open.values())
        for sending in sendings:
            sending.cancel()

    def __len__(self) -> int:
        return len(self._rooms)


class _NotStarted(Sending):
    def cancel(self) -> None:
        pass


@dataclass
class LeasedRoom:
    room: int
    generation: int
    lease: Lease


class LeasedRooms:
    """All rooms of a decode server that hold a lease."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._rooms: dict[int, LeasedRoom] = {}
        self._generation = 0

    def next_generation(self) -> int:
        with self._lock:
            self._generation += 1
            return self._generation

    def hold(self, leased: LeasedRoom) -> None:
        with self._lock:
            self._rooms[leased.room] = leased

    def find(self, room: int) -> LeasedRoom | None:
        with self._lock:
            return self._rooms.get(room)

    def end(self, room: int) -> None:
        """Revoke the room's lease if it has one: when this returns no byte is written to its pages any
        more.
        """
        with self._lock:
            leased = self._rooms.pop(room, None)
        if leased is not None:
            leased.lease.revoke()

    def __len__(self) -> int:
        return len(self._rooms)


class Remembered:
    """The last rooms that were refused or aborted before this side had heard of them, and why; bounded."""

    def __init__(self, most: int = K_REMEMBERED_ROOMS) -> None:
        self._lock = threading.Lock()
        self._most = most
        self._reasons: OrderedDict[Hashable, str] = OrderedDict()

    def put(self, room: Hashable, reason: str) -> None:
        with self._lock:
            self._reasons[room] = reason
            self._reasons.move_to_end(room)
            while len(self._reasons) > self._most:
                self._reasons.popitem(last=False)

    def take(self, room: Hashable) -> str | None:
        with self._lock:
            return self._reasons.pop(room, None)


K_WHAT = {TransferKind.KV: "KV", TransferKind.STATE: "state", TransferKind.AUX: "auxiliary data"}


def describe(kind: TransferKind, outcome: Outcome) -> str:
    """What a failed transfer's outcome says to whoever reads a log or an HTTP error."""
    reason = outcome.reason.value.replace("_", " ") if outcome.reason else "unknown reason"
    return f"KV transfer aborted: {K_WHAT.get(kind, kind.value)}: {reason}" + (
        f" ({outcome.detail})" if outcome.detail else ""
    )
