"""What a server knows of the requests that are crossing: on the prefill side what is being sent, on the
decode side what is leased. No SGLang, no transport of its own: callers' locks, clocks and handles.

A *generation* tells two lives of one room apart: SGLang uses a room again when a retracted request is
computed anew.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial

from prfaas.model.transfer import LeaseGrant, TransferKind
from prfaas.pump_client import Lease, Offer, PumpClient, Transfer
from prfaas.sglang.planning import Segments
from prfaas.sglang.staging import Places

K_REMEMBERED_ROOMS = 65536


@dataclass(frozen=True)
class Part:
    """Something to send to one peer of a room."""

    session: str
    kind: TransferKind
    segments: Segments
    release: Callable[[], None] = lambda: None
    """Called once when its source is not needed any more."""


@dataclass
class SendingRoom:
    """A prefill server's room: transfers handed over, and what they came to."""

    room: int
    grants: dict[str, LeaseGrant] = field(default_factory=dict)
    """The leases it fills, by the peer's session."""
    places: dict[str, Places] = field(default_factory=dict)
    """Where the pages of peers that stage them lie, by their session."""
    open: dict[int, Transfer] = field(default_factory=dict)
    bytes_by_kind: dict[TransferKind, int] = field(default_factory=dict)
    all_handed_over: bool = False
    failure: str | None = None
    concluded: bool = False


class SendingRooms:
    """All rooms of a prefill server. `conclude(room, failure)` is called once a room, without the lock:
    failure is None when every peer has all of it, else what went wrong first. A room that this side cancelled
    isn't concluded. `offer_of(room, session)`: the place that the link's ledger gave its bytes."""

    def __init__(
        self,
        pump: PumpClient,
        source: str,
        conclude: Callable[[SendingRoom, str | None], None],
        offer_of: Callable[[int, str], Offer | None] = lambda room, session: None,
    ) -> None:
        self._pump, self._source, self._conclude, self._offer_of = pump, source, conclude, offer_of
        self._lock = threading.Lock()
        self._rooms: dict[int, SendingRoom] = {}

    def granted(self, session: str, grant: LeaseGrant, places: Places | None = None) -> None:
        """A peer has leased pages to a room. A newer generation replaces the one before."""
        with self._lock:
            room = self._rooms.setdefault(grant.room, SendingRoom(grant.room))
            room.grants[session] = grant
            room.places.pop(session, None)
            if places is not None:
                room.places[session] = places
            if len(self._rooms) > K_REMEMBERED_ROOMS:
                # Peers that granted and died before their request came here; the oldest first.
                idle = next((number for number, old in self._rooms.items() if not old.open), None)
                if idle is not None:
                    del self._rooms[idle]

    def grant_of(self, room_id: int, session: str) -> LeaseGrant | None:
        """The lease that a peer has given the room now."""
        with self._lock:
            room = self._rooms.get(room_id)
            return room.grants.get(session) if room else None

    def places_of(self, room_id: int, session: str) -> Places | None:
        """Where the pages lie that a peer has leased to the room, if it stages them."""
        with self._lock:
            room = self._rooms.get(room_id)
            return room.places.get(session) if room else None

    def send(
        self,
        room_id: int,
        parts: list[Part],
        last: bool,
        deadline_s: float,
        under: LeaseGrant | None = None,
    ) -> bool:
        """Hand over parts; `last`: there will be no more of this room; `under`: only if that is its peers'
        lease still. Whether the room still takes them: if not, none of them is sent, and all are released."""
        full = [part for part in parts if len(part.segments)]
        last_of = {part.session: i for i, part in enumerate(full)}
        started: list[tuple[Part, Transfer]] = []
        room: SendingRoom | None = None
        try:
            with self._lock:
                room = self._rooms.get(room_id)
                if room is not None and under is not None:
                    room = room if all(room.grants.get(part.session) is under for part in parts) else None
                if room is not None:
                    for i, part in enumerate(full):
                        is_last = last and last_of[part.session] == i
                        started.append((part, self._submit(room, part, is_last, deadline_s)))
                    room.all_handed_over = last
        finally:
            # Also where the pump could take some of them only: nothing stays taken for the others.
            sent = {id(part) for part, _ in started}
            for part in parts:
                if id(part) not in sent:
                    part.release()
            for part, transfer in started:
                transfer.add_done_callback(partial(self._done, room, part))
        return room is not None

    def _submit(self, room: SendingRoom, part: Part, last: bool, deadline_s: float) -> Transfer:
        transfer = self._pump.submit(
            room.grants[part.session],
            part.segments.source,
            part.segments.destination,
            part.segments.length,
            kind=part.kind,
            deadline_s=deadline_s,
            last=last,
            source=self._source,
            offer=self._offer_of(room.room, part.session),
        )
        room.open[transfer.transfer_id] = transfer
        room.bytes_by_kind[part.kind] = room.bytes_by_kind.get(part.kind, 0) + part.segments.total_bytes
        return transfer

    def _done(self, room: SendingRoom | None, part: Part, transfer: Transfer) -> None:
        outcome = transfer.outcome
        assert outcome is not None
        assert room is not None
        part.release()
        others: list[Transfer] = []
        with self._lock:
            room.open.pop(transfer.transfer_id, None)
            if room.concluded:
                return
            if not outcome.ok and room.failure is None:
                room.failure = describe(part.kind, outcome.reason, outcome.detail)
                others = list(room.open.values())
            if room.failure is None and (room.open or not room.all_handed_over):
                return
            room.concluded = True
            self._forget(room)
        for other in others:
            self._pump.cancel(other)
        self._conclude(room, room.failure)

    def drained(self, room_id: int, timeout_s: float) -> bool:
        """Wait until all that has been handed over of a room has ended; whether it has in time."""
        with self._lock:
            room = self._rooms.get(room_id)
            transfers = list(room.open.values()) if room else []
        end_s = time.monotonic() + timeout_s
        return all(transfer.wait(max(0.0, end_s - time.monotonic())) is not None for transfer in transfers)

    def cancel(self, room_id: int, reason: str) -> None:
        """The room is over on this side: when this returns its pages aren't read any more."""
        with self._lock:
            room = self._rooms.pop(room_id, None)
            if room is None:
                return
            room.concluded = True
            room.failure = room.failure or reason
            transfers = list(room.open.values())
        for transfer in transfers:
            self._pump.cancel(transfer)

    def _forget(self, room: SendingRoom) -> None:
        if self._rooms.get(room.room) is room:
            del self._rooms[room.room]

    def __len__(self) -> int:
        return len(self._rooms)


@dataclass
class LeasedRoom:
    """A decode server's room with a lease."""

    room: int
    generation: int
    lease: Lease
    places: Places | None = None
    """Where its pages' bytes land, if not in the pages."""
    release: Callable[[], None] = lambda: None
    """Called once when the lease has ended: gives back what it stood on beside the pages."""
    share_bytes: int = 0
    """What each of its senders has to bring."""
    aux_index: int | None = None
    """SGLang's slot for the request's auxiliary data: no other's, as long as the request lives."""
    landing: threading.Event | None = None
    """Set once all that landed is where it belongs; None while nothing has landed."""


class LeasedRooms:
    """All rooms of a decode server that hold a lease."""

    def __init__(self) -> None:
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

    def land(self, leased: LeasedRoom, finish: Callable[[], None]) -> bool:
        """All has landed: end the lease, then `finish`, during which `end` waits. Whether it was still held;
        if not, nothing is done."""
        with self._lock:
            if self._rooms.get(leased.room) is not leased or leased.landing is not None:
                return False
            leased.landing = threading.Event()
        try:
            leased.lease.revoke()
            finish()
        finally:
            with self._lock:
                if self._rooms.get(leased.room) is leased:
                    del self._rooms[leased.room]
            leased.release()
            leased.landing.set()
        return True

    def end(self, room: int) -> None:
        """When this returns no byte is written to the room's pages any more, by a peer or by ourselves. Waits
        for a copy that is running, never for a peer."""
        with self._lock:
            leased = self._rooms.get(room)
            if leased is None:
                return
            landing = leased.landing
            if landing is None:
                del self._rooms[room]
        if landing is not None:
            landing.wait()
            return
        leased.lease.revoke()
        leased.release()

    def __len__(self) -> int:
        return len(self._rooms)


class Remembered:
    """The last rooms that were refused or aborted before this side had heard of them, or peers that can't be
    served, and why; bounded.
    """

    def __init__(self, most: int = K_REMEMBERED_ROOMS) -> None:
        self._lock = threading.Lock()
        self._most = most
        self._reasons: OrderedDict[Hashable, str] = OrderedDict()

    def put(self, room: Hashable, reason: str) -> None:
        """The first reason stays: what is said later follows from it."""
        with self._lock:
            self._reasons.setdefault(room, reason)
            self._reasons.move_to_end(room)
            while len(self._reasons) > self._most:
                self._reasons.popitem(last=False)

    def __contains__(self, room: Hashable) -> bool:
        return room in self._reasons

    def get(self, room: Hashable) -> str | None:
        """Who is asked about isn't the next to be forgotten."""
        with self._lock:
            reason = self._reasons.get(room)
            if reason is not None:
                self._reasons.move_to_end(room)
            return reason

    def take(self, room: Hashable) -> str | None:
        with self._lock:
            return self._reasons.pop(room, None)


K_WHAT: dict[str, str] = {
    TransferKind.KV: "KV",
    TransferKind.STATE: "state",
    TransferKind.AUX: "auxiliary data",
}


def describe(kind: str, reason: str | None, detail: str = "") -> str:
    """What a transfer's failure says to whoever reads a log or an HTTP error."""
    what = K_WHAT.get(kind, kind)
    why = (reason or "unknown reason").replace("_", " ")
    return f"KV transfer aborted: {what}: {why}" + (f" ({detail})" if detail else "")
