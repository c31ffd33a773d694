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

from prfaas.model.transfer import LeaseGrant, TransferKind
from prfaas.pump_client import Lease, PumpClient, Transfer
from prfaas.sglang.planning import Segments

K_REMEMBERED_ROOMS = 65536


@dataclass
class SendingRoom:
    """A prefill server's room: transfers handed over, and what they came to."""

    room: int
    grants: dict[str, LeaseGrant] = field(default_factory=dict)
    """The leases it fills, by the peer's session."""
    open: dict[int, Transfer] = field(default_factory=dict)
    bytes_by_kind: dict[TransferKind, int] = field(default_factory=dict)
    all_handed_over: bool = False
    failure: str | None = None
    concluded: bool = False


class SendingRooms:
    """All rooms of a prefill server. `conclude(room, failure)` is called once a room, without the lock:
    failure is None when every peer has all of it, else what went wrong first. A room that this side cancelled
    isn't concluded."""

    def __init__(
        self, pump: PumpClient, source: str, conclude: Callable[[SendingRoom, str | None], None]
    ) -> None:
        self._pump, self._source, self._conclude = pump, source, conclude
        self._lock = threading.Lock()
        self._rooms: dict[int, SendingRoom] = {}

    def granted(self, session: str, grant: LeaseGrant) -> None:
        """A peer has leased pages to a room. A newer generation replaces the one before."""
        with self._lock:
            room = self._rooms.setdefault(grant.room, SendingRoom(grant.room))
            room.grants[session] = grant

    def send(
        self, room_id: int, parts: list[tuple[str, TransferKind, Segments]], last: bool, deadline_s: float
    ) -> None:
        """Hand over a chunk's parts, (session, kind, segments) each; `last`: there will be no more of this
        room.
        """
        parts = [part for part in parts if len(part[2])]
        last_of = {session: i for i, (session, _, _) in enumerate(parts)}
        started: list[tuple[TransferKind, Transfer]] = []
        with self._lock:
            room = self._rooms.get(room_id)
            if room is None:
                return
            for i, (session, kind, segments) in enumerate(parts):
                transfer = self._pump.submit(
                    room.grants[session],
                    segments.source,
                    segments.destination,
                    segments.length,
                    kind=kind,
                    deadline_s=deadline_s,
                    last=last and last_of[session] == i,
                    source=self._source,
                )
                room.open[transfer.transfer_id] = transfer
                room.bytes_by_kind[kind] = room.bytes_by_kind.get(kind, 0) + segments.total_bytes
                started.append((kind, transfer))
            room.all_handed_over = last
        for kind, transfer in started:
            transfer.add_done_callback(lambda ended, kind=kind: self._done(room, kind, ended))  # type: ignore[misc]

    def _done(self, room: SendingRoom, kind: TransferKind, transfer: Transfer) -> None:
        outcome = transfer.outcome
        assert outcome is not None
        others: list[Transfer] = []
        with self._lock:
            room.open.pop(transfer.transfer_id, None)
            if room.concluded:
                return
            if not outcome.ok and room.failure is None:
                room.failure = describe(kind, outcome.reason, outcome.detail)
                others = list(room.open.values())
            if room.failure is None and (room.open or not room.all_handed_over):
                return
            room.concluded = True
            self._forget(room)
        for other in others:
            self._pump.cancel(other)
        self._conclude(room, room.failure)

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
    room: int
    generation: int
    lease: Lease


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

    def end(self, room: int, generation: int | None = None) -> bool:
        """Revoke the room's lease: when this returns no byte is written to its pages any more. Whether there
        was one (of that generation, if one is named)."""
        with self._lock:
            leased = self._rooms.get(room)
            if leased is None or generation not in (None, leased.generation):
                return False
            del self._rooms[room]
        leased.lease.revoke()
        return True

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
