"""The receiving side: leases, the transfers that write to them, and what may be done with a block that
arrives.

A lease is open until it ends: revoked by its owner, past its time, or its owner gone. It never opens again.
Whether it is still open at the moment of the copy is for the caller's lock to say (see pump/memory.py); this
core says whether a block may be tried at all, and counts what was applied. A block is applied once: a second
copy is only acknowledged.

Only the peer that opened a transfer may add to it. Everything refused changes nothing and carries its reason.
"""

from __future__ import annotations

import hmac
from collections.abc import Hashable
from dataclasses import dataclass, field

from prfaas.model.errors import LocalProtocolError
from prfaas.model.transfer import FailureReason
from prfaas.transfer.frames import Open
from prfaas.transfer.remembered import Remembered
from prfaas.transfer.segments import Ranges
from prfaas.transfer.strides import Pieces, holds, payload_bytes

K_TRANSFERS_PER_LEASE = 4096
K_REMEMBERED = 8192
"""Most ended transfers, and most ended leases, whose ids are kept to know late copies of their blocks."""


_Right = tuple[str, int, bytes, int]


def _right(site: str, opening: Open) -> _Right:
    """By which a transfer is known again: who may write what."""
    return site, opening.lease_id, opening.token, opening.n_blocks


@dataclass(slots=True)
class Lease:
    """The right to write to some of an owner's pages, for one room and generation."""

    lease_id: int
    token: bytes
    room: int
    generation: int
    ranges: Ranges
    expires_s: float
    owner: Hashable
    site: str = ""
    """Only this site may write; empty: whoever shows the token."""
    guard: tuple[int, int] = (0, 0)
    """Slot and value in the owner's guard table."""
    transfers: dict[int, Incoming] = field(default_factory=dict)


@dataclass(slots=True)
class Incoming:
    """A transfer that a peer has opened."""

    transfer_id: int
    peer: Hashable
    site: str
    opening: Open
    owner: Hashable
    ranges: Ranges
    lease: Lease | None
    expires_s: float
    applied: set[int] = field(default_factory=set)
    applied_bytes: int = 0
    done: bool = False

    @property
    def right(self) -> _Right:
        return _right(self.site, self.opening)


@dataclass(frozen=True, slots=True)
class Apply:
    """The block may be copied to its pieces, under the guard."""

    incoming: Incoming


@dataclass(frozen=True, slots=True)
class Known:
    """The block was applied before: acknowledge it again."""


@dataclass(frozen=True, slots=True)
class Refused:
    reason: FailureReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Received:
    """A transfer is whole: every block checked and applied. For the owner."""

    incoming: Incoming


@dataclass(frozen=True, slots=True)
class Broken:
    """A transfer to a lease ended without success. For the owner, and for the peer if `tell_peer`."""

    incoming: Incoming
    reason: FailureReason
    detail: str
    tell_peer: bool


ReceiveEvent = Received | Broken


@dataclass(slots=True)
class _Past:
    """What is kept of a transfer that has ended: little, as thousands are."""

    peer: Hashable
    right: _Right
    done: bool


class Receiving:
    """Leases and incoming transfers of one pump. Single-threaded; times are the caller's monotonic."""

    def __init__(self, max_transfers: int) -> None:
        self._leases: dict[int, Lease] = {}
        self._raw: dict[bytes, tuple[Hashable, Ranges]] = {}
        self._open: dict[int, Incoming] = {}
        self._past: Remembered[int, _Past] = Remembered(K_REMEMBERED)
        self._ended: Remembered[int, FailureReason] = Remembered(K_REMEMBERED)
        self._max_transfers = max_transfers

    @property
    def n_leases(self) -> int:
        return len(self._leases)

    @property
    def n_transfers(self) -> int:
        return len(self._open)

    def peers(self) -> set[Hashable]:
        """Those of whom a transfer is under way."""
        return {incoming.peer for incoming in self._open.values()}

    def lease(self, lease_id: int) -> Lease | None:
        return self._leases.get(lease_id)

    # Owners

    def add_owner(self, owner: Hashable, token: bytes, ranges: Ranges) -> None:
        """An owner whose `ranges` may be written to by whoever shows `token` (raw transfers, without a
        lease).
        """
        self._raw[token] = (owner, ranges)

    def remove_owner(self, owner: Hashable) -> list[ReceiveEvent]:
        """All of an owner's leases and transfers end."""
        self._raw = {token: entry for token, entry in self._raw.items() if entry[0] != owner}
        events: list[ReceiveEvent] = []
        for lease in [x for x in self._leases.values() if x.owner == owner]:
            events += self.end(lease.lease_id, FailureReason.OWNER_GONE)
        for incoming in [x for x in self._open.values() if x.owner == owner]:
            events.append(self._break(incoming, FailureReason.OWNER_GONE, "", tell_peer=True))
        return events

    def grant(self, lease: Lease, registered: Ranges) -> None:
        """Open a lease. Raises LocalProtocolError: a known id, a weak token, memory that isn't registered."""
        if lease.lease_id <= 0 or lease.lease_id in self._leases or lease.lease_id in self._ended:
            raise LocalProtocolError(f"lease {lease.lease_id} isn't new")
        if len(lease.token) < 16:
            raise LocalProtocolError("a lease's token has at least 16 random bytes")
        if not registered.holds_all(lease.ranges):
            raise LocalProtocolError("a lease on memory that isn't registered")
        self._leases[lease.lease_id] = lease

    def end(self, lease_id: int, reason: FailureReason) -> list[ReceiveEvent]:
        """End a lease, for good. Its unfinished transfers break; nothing happens if it has ended."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return []
        self._ended.put(lease_id, reason)
        events: list[ReceiveEvent] = [
            self._break(incoming, FailureReason.LEASE_ENDED, reason.value, tell_peer=True)
            for incoming in list(lease.transfers.values())
            if not incoming.done
        ]
        # They know their lease, and it them: left so, an ended lease would stay until a collection found it.
        lease.transfers.clear()
        return events

    def tick(self, now: float) -> list[ReceiveEvent]:
        """Leases and transfers past their time end."""
        events: list[ReceiveEvent] = []
        for lease in [x for x in self._leases.values() if x.expires_s <= now]:
            events += self.end(lease.lease_id, FailureReason.DEADLINE)
        for incoming in [x for x in self._open.values() if x.expires_s <= now]:
            events.append(self._break(incoming, FailureReason.DEADLINE, "", tell_peer=True))
        return events

    # Peers

    def on_open(
        self, peer: Hashable, site: str, transfer_id: int, opening: Open, now: float
    ) -> Refused | None:
        """A peer opens a transfer, or says again that it did. None: welcome."""
        known = self._open.get(transfer_id) or self._past.get(transfer_id)
        if known is not None:
            if known.right != _right(site, opening):
                return Refused(FailureReason.BAD_REQUEST, "the transfer's id is another's")
            known.peer = peer
            if isinstance(known, Incoming):
                known.opening.count = known.opening.count or opening.count
            return None
        if not 0 < opening.n_blocks <= opening.total_bytes:
            return Refused(FailureReason.BAD_REQUEST, "no bytes, or more blocks than bytes")
        if len(self._open) >= self._max_transfers:
            return Refused(FailureReason.TOO_MANY, f"{self._max_transfers} transfers are under way")
        if not opening.lease_id:
            return self._open_raw(peer, site, transfer_id, opening, now)
        lease = self._leases.get(opening.lease_id)
        if lease is None:
            ended = self._ended.get(opening.lease_id)
            if ended is None:
                return Refused(FailureReason.LEASE_UNKNOWN)
            return Refused(FailureReason.LEASE_ENDED, ended.value)
        if not hmac.compare_digest(lease.token, opening.token) or (lease.site and lease.site != site):
            return Refused(FailureReason.LEASE_MISMATCH, "token or site")
        if (lease.room, lease.generation) != (opening.room, opening.generation):
            return Refused(FailureReason.LEASE_MISMATCH, "room or generation")
        if opening.total_bytes > lease.ranges.total_bytes:
            return Refused(FailureReason.ADDRESS_REFUSED, "more bytes than the lease has")
        if len(lease.transfers) >= K_TRANSFERS_PER_LEASE:
            return Refused(FailureReason.TOO_MANY, f"{K_TRANSFERS_PER_LEASE} transfers on one lease")
        incoming = Incoming(
            transfer_id, peer, site, opening, lease.owner, lease.ranges, lease, lease.expires_s
        )
        self._open[transfer_id] = incoming
        lease.transfers[transfer_id] = incoming
        return None

    def _open_raw(
        self, peer: Hashable, site: str, transfer_id: int, opening: Open, now: float
    ) -> Refused | None:
        entry = self._raw.get(opening.token)
        if entry is None:
            return Refused(FailureReason.LEASE_UNKNOWN, "no such owner here")
        owner, ranges = entry
        expires_s = now + max(0.0, opening.deadline_s)
        self._open[transfer_id] = Incoming(transfer_id, peer, site, opening, owner, ranges, None, expires_s)
        return None

    def on_block(
        self, peer: Hashable, transfer_id: int, block_id: int, pieces: Pieces
    ) -> Apply | Known | Refused:
        """A checked block has arrived, for these pieces of the owner's memory."""
        incoming = self._open.get(transfer_id)
        if incoming is None:
            past = self._past.get(transfer_id)
            if past is not None and past.peer == peer and past.done:
                return Known()
            return Refused(FailureReason.LEASE_ENDED if past is not None else FailureReason.LEASE_UNKNOWN)
        if incoming.peer != peer:
            return Refused(FailureReason.LEASE_MISMATCH, "another peer's transfer")
        if block_id in incoming.applied:
            return Known()
        if not 0 <= block_id < incoming.opening.n_blocks:
            return Refused(FailureReason.BAD_REQUEST, f"block {block_id} of {incoming.opening.n_blocks}")
        if incoming.applied_bytes + payload_bytes(pieces) > incoming.opening.total_bytes:
            return Refused(FailureReason.BAD_REQUEST, "more bytes than the transfer said")
        if not holds(incoming.ranges, pieces):
            return Refused(
                FailureReason.ADDRESS_REFUSED, "outside of the lease" if incoming.lease else "not registered"
            )
        return Apply(incoming)

    def applied(self, incoming: Incoming, block_id: int, payload_bytes: int) -> Received | None:
        """The block's bytes are in their pages. Received: it was the last one."""
        incoming.applied.add(block_id)
        incoming.applied_bytes += payload_bytes
        if len(incoming.applied) < incoming.opening.n_blocks or incoming.done:
            return None
        incoming.done = True
        incoming.applied.clear()
        self._retire(incoming)
        return Received(incoming)

    def on_cancel(
        self, peer: Hashable, transfer_id: int, reason: FailureReason, detail: str
    ) -> Broken | None:
        """The sender gives a transfer up."""
        incoming = self._open.get(transfer_id)
        if incoming is None or incoming.peer != peer:
            return None
        return self._break(incoming, reason, detail, tell_peer=False)

    def break_off(self, incoming: Incoming, reason: FailureReason, detail: str) -> Broken:
        """Our side can't go on with it (its pages are no longer there)."""
        return self._break(incoming, reason, detail, tell_peer=True)

    def _break(self, incoming: Incoming, reason: FailureReason, detail: str, *, tell_peer: bool) -> Broken:
        self._retire(incoming)
        return Broken(incoming, reason, detail, tell_peer)

    def _retire(self, incoming: Incoming) -> None:
        self._open.pop(incoming.transfer_id, None)
        if not incoming.done and incoming.lease is not None:
            incoming.lease.transfers.pop(incoming.transfer_id, None)
        self._past.put(incoming.transfer_id, _Past(incoming.peer, incoming.right, incoming.done))
