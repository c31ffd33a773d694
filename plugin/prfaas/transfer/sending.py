"""The sending side of transfers to one peer: what is sent, in flight, acknowledged, to be sent again.

A block is pending, in flight on one stream, or acknowledged:

    pending --draw--> in flight --ack--> acknowledged
       ^                 |
       +--nack, stream lost, peer restarted

At a transfer's end, when nothing else can be sent, a block that has been in flight for long is sent once more
over another stream (`hedge_after_s`, and within hedging.py's budget): one stream that lost a packet doesn't
hold up the rest. The receiver applies a block once, whichever copy comes first.

A transfer completes when every block is acknowledged, and fails by its deadline, the receiver's refusal or
its owner's cancelling; either is said once, in one event. A stream's loss costs its unacknowledged blocks. No
block is drawn unless the lease's window has room for it, so a transfer whose receiver stands still leaves the
streams to the others.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import NamedTuple

from prfaas.model.errors import LocalProtocolError
from prfaas.model.transfer import FailureReason
from prfaas.transfer.frames import K_BLOCK_MAX_BYTES, Open
from prfaas.transfer.hedging import HedgeBudget
from prfaas.transfer.line import Line
from prfaas.transfer.order import SendOrder
from prfaas.transfer.plans import Blocks

K_NACKS_MAX = 16
"""A block refused as corrupt so often fails its transfer: something corrupts it every time."""


@dataclass(frozen=True, slots=True)
class Completed:
    transfer_id: int
    payload_bytes: int
    resent_blocks: int
    started_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    transfer_id: int
    reason: FailureReason
    detail: str
    payload_bytes: int
    """Acknowledged before it failed."""
    resent_blocks: int
    started_s: float
    tell_peer: bool
    """Whether the receiver is to be told (it isn't, when it was the one that refused)."""


SendEvent = Completed | Failed


class Draw(NamedTuple):
    """One block to send now. `open_first`: this stream hasn't carried the transfer's OPEN yet."""

    transfer_id: int
    block_id: int
    payload_bytes: int
    open_first: bool


@dataclass(slots=True)
class _Transfer:
    transfer_id: int
    opening: Open
    plan: Blocks
    deadline_s: float
    started_s: float
    fresh: int = 0
    again: list[int] = field(default_factory=list)
    in_flight: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Block to (stream, when it was drawn), the oldest first."""
    doubled: dict[int, list[int]] = field(default_factory=dict)
    """Block to the two streams that carry it, or the one of them that is left."""
    acked: set[int] = field(default_factory=set)
    acked_bytes: int = 0
    opened_on: set[int] = field(default_factory=set)
    nacks: dict[int, int] = field(default_factory=dict)
    resent: int = 0

    def next_block(self) -> int | None:
        while self.again:
            if self.again[0] not in self.acked:
                return self.again[0]
            heapq.heappop(self.again)
        return self.fresh if self.fresh < self.plan.n_blocks else None

    def take(self) -> int:
        if self.again:
            return heapq.heappop(self.again)
        self.fresh += 1
        return self.fresh - 1


class Sending:
    """All transfers to one peer. Single-threaded; times are the caller's monotonic seconds."""

    def __init__(self, raw_window_bytes: int) -> None:
        self._transfers: dict[int, _Transfer] = {}
        self._order: SendOrder[int] = SendOrder()
        self._line: Line[int] = Line()
        """Those of `_order` whose next block their lease's window has room for."""
        self._held_up: dict[int, set[int]] = {}
        """Lease to those of its transfers that wait for room in its window."""
        self._oldest_s = float("inf")
        """No block in flight was drawn before."""
        self._windows: dict[int, int] = {0: raw_window_bytes}
        self._flying: dict[int, int] = {}
        self.hedge_after_s = 1.0
        """How long a block may be in flight before an idle stream carries it as well."""
        self.hedges = HedgeBudget()
        self._leases: dict[int, dict[int, _Transfer]] = {}
        self._block_bytes = 64 * 1024
        """Of the block drawn last."""

    def __len__(self) -> int:
        return len(self._transfers)

    def __contains__(self, transfer_id: int) -> bool:
        return transfer_id in self._transfers

    @property
    def order(self) -> SendOrder[int]:
        return self._order

    @property
    def backlog_bytes(self) -> int:
        """Bytes that have not been sent yet, or are to be sent again."""
        return self._order.backlog_bytes

    @property
    def in_flight_bytes(self) -> int:
        return sum(self._flying.values())

    def carries(self, stream: int) -> bool:
        """Whether a block is in flight on it."""
        ways = self._transfers.values()
        return any(stream in {on for on, _ in t.in_flight.values()}.union(*t.doubled.values()) for t in ways)

    def in_flight_of(self, lease_id: int) -> int:
        """Bytes in flight on one lease, never more than its window."""
        return self._flying.get(lease_id, 0)

    @property
    def acked_bytes(self) -> int:
        """Acknowledged bytes of the transfers that are still under way."""
        return sum(t.acked_bytes for t in self._transfers.values())

    def acknowledged_bytes(self, transfer_id: int) -> int:
        """Bytes of a transfer that the receiver has acknowledged; 0 when it isn't under way."""
        t = self._transfers.get(transfer_id)
        return t.acked_bytes if t is not None else 0

    def plan(self, transfer_id: int) -> Blocks:
        return self._transfers[transfer_id].plan

    def opening(self, transfer_id: int, now: float) -> Open:
        """The OPEN to send now, with the seconds that are left."""
        t = self._transfers[transfer_id]
        t.opening.deadline_s = max(0.0, t.deadline_s - now)
        return t.opening

    def submit(
        self, transfer_id: int, opening: Open, plan: Blocks, window_bytes: int, deadline_s: float, now: float
    ) -> None:
        """Take a transfer. `deadline_s` is on `now`'s clock. Raises LocalProtocolError if its id is taken."""
        if transfer_id in self._transfers:
            raise LocalProtocolError(f"transfer {transfer_id} is under way")
        lease = opening.lease_id
        if lease:
            self._windows.setdefault(lease, window_bytes)
        t = self._transfers[transfer_id] = _Transfer(transfer_id, opening, plan, deadline_s, now)
        self._leases.setdefault(lease, {})[transfer_id] = t
        self._order.add(transfer_id, plan.total_bytes, deadline_s)
        self._look_at(t)

    def draw(self, stream: int, now: float) -> Draw | None:
        """The next block for a stream that can take one, marked as in flight there; None: nothing may be
        sent.
        """
        key = self._line.next(now, self._block_bytes)
        if key is None:
            return self._double(stream, now) if self.can_double(now) else None
        t = self._transfers[key]
        block = t.take()
        size = self._block_bytes = t.plan.block_bytes(block)
        t.in_flight[block] = (stream, now)
        self._oldest_s = min(self._oldest_s, now)
        lease = t.opening.lease_id
        self._flying[lease] = self._flying.get(lease, 0) + size
        self.hedges.sent(size)
        self._line.sent(key, size)
        self._order.sent(now, key, size, (key,))
        self._look_at(t)
        if self._flying[lease] + K_BLOCK_MAX_BYTES > self._windows[lease]:
            self._look_at_all(lease)
        open_first = stream not in t.opened_on
        t.opened_on.add(stream)
        return Draw(key, block, size, open_first)

    def _double(self, stream: int, now: float) -> Draw | None:
        """A second copy of the oldest block in flight of a transfer that has nothing else to send."""
        for key, t in self._transfers.items():
            if not t.in_flight or t.next_block() is not None:
                continue
            block, (first, drawn_s) = next(iter(t.in_flight.items()))
            if first != stream and now - drawn_s >= self.hedge_after_s:
                del t.in_flight[block]
                t.doubled[block] = [first, stream]
                t.resent += 1
                self.hedges.copied(t.plan.block_bytes(block))
                open_first = stream not in t.opened_on
                t.opened_on.add(stream)
                return Draw(key, block, t.plan.block_bytes(block), open_first)
        return None

    def can_double(self, now: float) -> bool:
        """Whether a stream that is idle now has a second copy to carry."""
        if now - self._oldest_s < self.hedge_after_s or not self.hedges.open:
            return False
        drawn_s = [next(iter(t.in_flight.values()))[1] for t in self._transfers.values() if t.in_flight]
        self._oldest_s = min(drawn_s, default=float("inf"))
        return now - self._oldest_s >= self.hedge_after_s

    def _look_at(self, t: _Transfer) -> None:
        """Whether it has a block to send and room for it may have changed."""
        key, lease = t.transfer_id, t.opening.lease_id
        block = t.next_block()
        held_up = self._held_up.get(lease)
        if held_up is not None:
            held_up.discard(key)
        if block is None:
            self._line.leave(key)
        elif self._flying.get(lease, 0) + t.plan.block_bytes(block) <= self._windows[lease]:
            self._line.join(key, self._order.remaining_bytes(key), t.deadline_s)
        else:
            self._line.leave(key)
            self._held_up.setdefault(lease, set()).add(key)

    def _look_at_all(self, lease: int) -> None:
        for t in list(self._leases.get(lease, {}).values()):
            self._look_at(t)

    def _freed(self, lease: int) -> None:
        """There is more room in a lease's window."""
        for key in list(self._held_up.get(lease, ())):
            self._look_at(self._transfers[key])

    def can_send(self) -> bool:
        return len(self._line) > 0

    def on_ack(self, transfer_id: int, block_id: int) -> SendEvent | None:
        """The receiver has applied the block. What is unknown or known already changes nothing."""
        t = self._transfers.get(transfer_id)
        if t is None or block_id in t.acked or not 0 <= block_id < t.plan.n_blocks:
            return None
        size = t.plan.block_bytes(block_id)
        if t.in_flight.pop(block_id, None) is not None or t.doubled.pop(block_id, None) is not None:
            self._flying[t.opening.lease_id] -= size
        elif block_id < t.fresh:
            # Waiting to be sent again, but the first copy landed after all.
            self._unsend(t, -size)
        else:
            return None
        t.acked.add(block_id)
        t.acked_bytes += size
        if len(t.acked) < t.plan.n_blocks:
            if t.again:
                self._look_at(t)
            self._freed(t.opening.lease_id)
            return None
        self._forget(t)
        return Completed(transfer_id, t.acked_bytes, t.resent, t.started_s)

    def on_nack(self, transfer_id: int, block_id: int) -> SendEvent | None:
        """The block arrived corrupt: it will be sent again, up to K_NACKS_MAX times."""
        t = self._transfers.get(transfer_id)
        if t is None or (block_id not in t.in_flight and block_id not in t.doubled):
            return None
        t.nacks[block_id] = t.nacks.get(block_id, 0) + 1
        if t.nacks[block_id] > K_NACKS_MAX:
            return self.fail(
                transfer_id, FailureReason.CORRUPT, f"block {block_id} arrived corrupt {K_NACKS_MAX} times"
            )
        self._again(t, block_id)
        return None

    def on_refuse(self, transfer_id: int, reason: FailureReason, detail: str) -> SendEvent | None:
        return self.fail(transfer_id, reason, detail, tell_peer=False)

    def on_window(self, lease_id: int, window_bytes: int) -> None:
        """The receiver's word on how much may be in flight on a lease."""
        if lease_id in self._windows:
            self._windows[lease_id] = window_bytes
            self._look_at_all(lease_id)

    def on_stream_lost(self, stream: int) -> int:
        """The stream is gone: its blocks in flight will be sent again over others. How many there were."""
        count = 0
        for t in self._transfers.values():
            t.opened_on.discard(stream)
            for block in [b for b, (s, _) in t.in_flight.items() if s == stream]:
                self._again(t, block)
                count += 1
            for block in [b for b, streams in t.doubled.items() if stream in streams]:
                t.doubled[block].remove(stream)
                if not t.doubled[block]:
                    self._again(t, block)
                    count += 1
        return count

    def on_peer_restarted(self) -> None:
        """Another pump answers at the peer's address: it knows none of our transfers, so all their blocks go
        again.
        """
        for t in self._transfers.values():
            t.opened_on.clear()
            for block in [*t.in_flight, *t.doubled]:
                self._again(t, block)
            # One that was to go again when a copy of it landed after all may be in the heap still.
            t.again = sorted({*t.again, *t.acked})
            for block in t.acked:
                self._unsend(t, t.plan.block_bytes(block))
            t.acked.clear()
            t.acked_bytes = 0
            self._look_at(t)

    def fail(
        self, transfer_id: int, reason: FailureReason, detail: str = "", *, tell_peer: bool = True
    ) -> SendEvent | None:
        """End a transfer without success; None if it isn't under way."""
        t = self._transfers.get(transfer_id)
        if t is None:
            return None
        self._forget(t)
        return Failed(transfer_id, reason, detail, t.acked_bytes, t.resent, t.started_s, tell_peer)

    def fail_all(self, reason: FailureReason, detail: str) -> list[SendEvent]:
        ended = (self.fail(key, reason, detail, tell_peer=False) for key in list(self._transfers))
        return [event for event in ended if event is not None]

    def tick(self, now: float) -> list[SendEvent]:
        """Transfers whose deadline has passed fail."""
        late = [key for key, t in self._transfers.items() if t.deadline_s <= now]
        events = [self.fail(key, FailureReason.DEADLINE, "not acknowledged in time") for key in late]
        return [event for event in events if event is not None]

    def _again(self, t: _Transfer, block: int) -> None:
        size = t.plan.block_bytes(block)
        if t.in_flight.pop(block, None) is None:
            del t.doubled[block]
        self._flying[t.opening.lease_id] -= size
        heapq.heappush(t.again, block)
        t.resent += 1
        self._unsend(t, size)
        self._look_at(t)
        self._freed(t.opening.lease_id)

    def _unsend(self, t: _Transfer, more_bytes: int) -> None:
        """The order's bytes left, which may bring a transfer back into it or (negative) end its place."""
        key = t.transfer_id
        if key not in self._order:
            if more_bytes > 0:
                self._order.add(key, more_bytes, t.deadline_s)
        elif self._order.remaining_bytes(key) + more_bytes > 0:
            self._order.add_bytes(key, more_bytes)
        else:
            self._order.remove(key)

    def _forget(self, t: _Transfer) -> None:
        lease = t.opening.lease_id
        del self._transfers[t.transfer_id]
        self._order.remove(t.transfer_id)
        self._flying[lease] = self._flying.get(lease, 0) - sum(
            t.plan.block_bytes(b) for b in (*t.in_flight, *t.doubled)
        )
        self._line.leave(t.transfer_id, for_good=True)
        self._held_up.get(lease, set()).discard(t.transfer_id)
        del self._leases[lease][t.transfer_id]
        if self._leases[lease]:
            self._freed(lease)
        else:
            del self._leases[lease]
            self._held_up.pop(lease, None)
            self._flying.pop(lease, None)
            if lease:
                self._windows.pop(lease, None)
