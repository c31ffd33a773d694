"""One link's promises: so many bytes by such a deadline, to whom, and no more than the link is believed to
carry.

A transfer is offered before its bytes leave (and before its prefill starts). It is

* admitted, when it and everything admitted before meet their deadlines by EDF at the promisable rate;
* queued, when it could meet its deadline on the link alone, only not beside what is promised now: it is
  admitted by itself once room appears, and expires when it can't any more (waiting never holds a byte of
  the link, so that nothing waits for what waits: no deadlock);
* refused, with a reason and when to ask again. A refusal leaves no trace.

Invariant after every call that returns events: at the promisable rate EDF keeps every promise. When the
capacity falls (or a transfer is slower than promised) as few promises as possible are broken (Moore and
Hodgson: of those due by the first deadline that fails, the largest); each is promised anew behind all
others, so that what is admitted later can't push it out again, and the shell is told.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prfaas.admission.edf import K_EPSILON_S, Promise, finish_times, to_give_up
from prfaas.model.decisions import AdmissionDecision, RefusalReason, Verdict
from prfaas.model.errors import LocalProtocolError
from prfaas.model.ids import LinkId

K_ANEW = 1.1  # a second promise allows this much more than predicted, or the least lag would break it again
K_SOONEST_RETRY_S = 0.05  # s, lower bound of retry_after_s
K_ROUNDING_S = 1e-6  # s by which a promise's slack is understated, against rounding
K_DOWN_RETRY_S = 1.0  # s, retry_after_s while the link is down


@dataclass(frozen=True, slots=True)
class Admitted:
    """A queued transfer now holds a promise."""

    link: LinkId
    transfer: Hashable
    at_s: float
    finish_by_s: float


@dataclass(frozen=True, slots=True)
class Expired:
    """A queued transfer can't meet its deadline any more and is forgotten: a late refusal."""

    link: LinkId
    transfer: Hashable
    at_s: float
    reason: RefusalReason


@dataclass(frozen=True, slots=True)
class PromiseBroken:
    """An admitted transfer won't meet its deadline. It goes on; the shell may give it up and release it."""

    link: LinkId
    transfer: Hashable
    at_s: float
    finish_by_s: float
    """The new promise; inf while the link is down."""


LedgerEvent = Admitted | Expired | PromiseBroken


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """What a ledger holds at one moment."""

    rate_bps: float
    """Promisable rate."""
    admitted: int
    late: int
    queued: int
    promised_bytes: int
    """Remaining bytes of all admitted transfers, late ones included."""
    refusals: Mapping[RefusalReason, int]
    broken: int
    """Promises broken since the start."""


class Ledger:
    """Promises of one link. `capacity_bps` is what may be promised.

    The estimate less reserve and headroom.
    """

    def __init__(self, link: LinkId, capacity_bps: float, *, queue_limit: int = 64) -> None:
        self.link = link
        self._rate_bps = max(0.0, capacity_bps)
        self._queue_limit = queue_limit
        self._held: dict[Hashable, Promise] = {}
        self._waiting: dict[Hashable, Promise] = {}
        self._refusals: dict[RefusalReason, int] = dict.fromkeys(RefusalReason, 0)
        self._broken = 0
        self._serial = 0
        self._kept_until_s = -float("inf")
        """Until then no promise can turn out broken, unless the capacity changes or another is made.

        Starting the same work d seconds later ends each part of it at most d seconds later, and less work
        ends no later: so the least slack of the last full look, counted from that look, bounds it.
        """

    def set_capacity(self, capacity_bps: float, *, now: float) -> list[LedgerEvent]:
        """The link's promisable rate is another one from now on; 0 while it is down."""
        self._rate_bps = max(0.0, capacity_bps)
        self._kept_until_s = -float("inf")
        return self.poll(now)

    def offer(
        self,
        transfer: Hashable,
        size_bytes: int,
        deadline_s: float,
        *,
        now: float,
        first_s: float | None = None,
        ready_s: float | None = None,
        may_queue: bool = True,
    ) -> AdmissionDecision:
        """Asks for `size_bytes` to be through by `deadline_s`; they come into being from first_s to ready_s
        (default: now). Never raises; a refusal changes nothing but the count of refusals.
        """
        first = now if first_s is None else first_s
        ready = max(first, now if ready_s is None else ready_s)
        wrong = self._obstacle(transfer, size_bytes, deadline_s, ready, now)
        if wrong is not None:
            return self._refuse(wrong, K_DOWN_RETRY_S if wrong is RefusalReason.LINK_DOWN else None, now)
        new = Promise(transfer, float(size_bytes), deadline_s, first, ready, self._serial + 1)
        finish = self._finish_if_kept(new, now)
        if finish is not None:
            self._serial += 1
            self._held[transfer] = new
            return AdmissionDecision(Verdict.ADMITTED, self.link, now, finish_by_s=finish)
        alone = finish_times([new], self._rate_bps, now)[transfer]
        if alone > deadline_s + K_EPSILON_S:
            return self._refuse(RefusalReason.DEADLINE, None, now)
        if may_queue and len(self._waiting) < self._queue_limit:
            self._serial += 1
            self._waiting[transfer] = new
            return AdmissionDecision(
                Verdict.QUEUED, self.link, now, retry_after_s=self._retry_after(new, now)
            )
        reason = RefusalReason.QUEUE_FULL if may_queue else RefusalReason.WOULD_BREAK_OTHERS
        return self._refuse(reason, self._retry_after(new, now), now)

    def restore(
        self,
        transfer: Hashable,
        size_bytes: int,
        deadline_s: float,
        *,
        now: float,
        first_s: float | None = None,
        ready_s: float | None = None,
    ) -> list[LedgerEvent]:
        """Takes over what was promised elsewhere (before this ledger began, or while it was out of reach):
        its bytes will be sent, so it always gets a place. Where its deadline can't be kept beside what is
        promised here, that is broken, and no other. Raises LocalProtocolError if it is known or isn't sane.
        """
        first = now if first_s is None else first_s
        ready = max(first, now if ready_s is None else ready_s)
        wrong = self._obstacle(transfer, size_bytes, deadline_s, ready, now)
        if wrong in (RefusalReason.BAD_REQUEST, RefusalReason.DUPLICATE):
            raise LocalProtocolError(f"{self.link}: {transfer!r} can't be restored: {wrong.value}")
        self._serial += 1
        new = Promise(transfer, float(size_bytes), deadline_s, first, ready, self._serial)
        if wrong is None and self._finish_if_kept(new, now) is not None:
            self._held[transfer] = new
            return []
        new.late, new.deadline_s = True, float("inf")
        self._held[transfer] = new
        self._kept_until_s = -float("inf")
        self._broken += 1
        return [*self._promise_anew([new], now)]

    def on_progress(self, transfer: Hashable, remaining_bytes: int, *, now: float) -> list[LedgerEvent]:
        """So many bytes of it are still to be acknowledged.

        Raises LocalProtocolError if it isn't admitted.
        """
        promise = self._held.get(transfer)
        if promise is None:
            raise LocalProtocolError(f"{self.link}: progress of {transfer!r}, which holds no promise")
        promise.remaining_bytes = min(promise.remaining_bytes, float(max(0, remaining_bytes)))
        return self.poll(now)

    def on_progress_of_all(self, left_bytes: Mapping[Hashable, int], *, now: float) -> list[LedgerEvent]:
        """The same for many at once, looked at once. Those that aren't admitted are ignored."""
        for transfer, remaining_bytes in left_bytes.items():
            promise = self._held.get(transfer)
            if promise is not None:
                promise.remaining_bytes = min(promise.remaining_bytes, float(max(0, remaining_bytes)))
        return self.poll(now)

    def release(self, transfer: Hashable, *, now: float) -> list[LedgerEvent]:
        """Through, failed or given up: its promise or its place in the queue is free.

        Raises LocalProtocolError if it has neither.
        """
        if self._held.pop(transfer, None) is None and self._waiting.pop(transfer, None) is None:
            raise LocalProtocolError(f"{self.link}: release of {transfer!r}, which holds nothing")
        return self.poll(now)

    def poll(self, now: float) -> list[LedgerEvent]:
        """Re-examines everything at `now`: breaks what can't be kept, expires and admits what waits."""
        return self._break(now) + self._serve_queue(now)

    def next_poll_at(self, now: float) -> float | None:
        """When poll may have something to say although nothing else happened; None: never."""
        times = [one.deadline_s - self._alone_s(one) for one in self._waiting.values()]
        times += [one.deadline_s for one in self._held.values()]
        soonest_s = min(times, default=float("inf"))
        return None if soonest_s == float("inf") else max(now, soonest_s)

    def holds(self, transfer: Hashable) -> Verdict | None:
        """ADMITTED, QUEUED, or None for what it doesn't know."""
        if transfer in self._held:
            return Verdict.ADMITTED
        return Verdict.QUEUED if transfer in self._waiting else None

    def is_late(self, transfer: Hashable) -> bool:
        """Whether it is admitted, and its first promise was broken."""
        one = self._held.get(transfer)
        return one is not None and one.late

    def finish_by(self, transfer: Hashable, now: float) -> float:
        """When an admitted transfer is through; what was promised anew, if it is late (inf while the link is
        down). Raises LocalProtocolError if it isn't admitted.
        """
        one = self._held.get(transfer)
        if one is None:
            raise LocalProtocolError(f"{self.link}: {transfer!r} holds no promise")
        return (
            one.deadline_s if one.late else finish_times(self._held.values(), self._rate_bps, now)[transfer]
        )

    def statistics(self) -> LedgerStatistics:
        held = self._held.values()
        return LedgerStatistics(
            rate_bps=self._rate_bps,
            admitted=len(held),
            late=sum(one.late for one in held),
            queued=len(self._waiting),
            promised_bytes=int(sum(one.remaining_bytes for one in held)),
            refusals=dict(self._refusals),
            broken=self._broken,
        )

    def promised_by(self, deadline_s: float) -> float:
        """Bytes promised by then."""
        return sum(one.remaining_bytes for one in self._held.values() if one.deadline_s <= deadline_s)

    def _obstacle(
        self, transfer: Hashable, size_bytes: int, deadline_s: float, ready_s: float, now: float
    ) -> RefusalReason | None:
        if size_bytes < 0 or deadline_s != deadline_s or ready_s != ready_s or ready_s == float("inf"):
            return RefusalReason.BAD_REQUEST
        if transfer in self._held or transfer in self._waiting:
            return RefusalReason.DUPLICATE
        if deadline_s <= now:
            return RefusalReason.DEADLINE_PASSED
        if self._rate_bps <= 0:
            return RefusalReason.LINK_DOWN
        return None

    def _refuse(self, reason: RefusalReason, retry_after_s: float | None, now: float) -> AdmissionDecision:
        self._refusals[reason] += 1
        return AdmissionDecision(Verdict.REFUSED, self.link, now, reason=reason, retry_after_s=retry_after_s)

    def _finish_if_kept(self, new: Promise, now: float) -> float | None:
        """When `new` would be through if admitted and no promise broke by it; None if one would."""
        together = [*self._held.values(), new]
        done = finish_times(together, self._rate_bps, now)
        return done[new.transfer] if self._all_kept(done, together, now) else None

    def _all_kept(self, done: Mapping[Hashable, float], promises: Iterable[Promise], now: float) -> bool:
        """Whether all would be through in time; if so, remembers for how long that surely holds."""
        least_s, undated = float("inf"), False
        for one in promises:
            slack_s = one.deadline_s - done[one.transfer]
            if slack_s < least_s:
                if slack_s < -K_EPSILON_S:
                    return False
                least_s = slack_s
            elif one.deadline_s == float("inf"):  # the next look gives it a date
                undated = True
        self._kept_until_s = -float("inf") if undated else now + least_s - K_ROUNDING_S
        return True

    def _alone_s(self, one: Promise) -> float:
        return one.remaining_bytes * 8 / self._rate_bps if self._rate_bps > 0 else 0.0

    def _retry_after(self, new: Promise, now: float) -> float:
        """Seconds until what is promised ahead of it, or breaks by it, has drained enough: an upper bound."""
        ahead = sum(one.remaining_bytes for one in self._held.values())
        over_s = (ahead + new.remaining_bytes) * 8 / self._rate_bps - (new.deadline_s - now)
        return max(K_SOONEST_RETRY_S, over_s)

    def _break(self, now: float) -> list[LedgerEvent]:
        if now <= self._kept_until_s:
            return []
        held = self._held.values()
        anew = [one for one in held if one.deadline_s == float("inf")] if self._rate_bps > 0 else []
        events: list[LedgerEvent] = [*self._promise_anew(anew + self._give_up(now), now)]
        if self._rate_bps > 0:
            self._all_kept(finish_times(held, self._rate_bps, now), held, now)
        return events

    def _give_up(self, now: float) -> list[Promise]:
        """As few as possible, so that the others are kept. They have no deadline any more."""
        given_up: list[Promise] = []
        while more := to_give_up(self._held.values(), self._rate_bps, now):
            for one in more:
                one.deadline_s = float("inf")
                if not one.late:
                    one.late = True
                    self._broken += 1
            given_up += more
        return given_up

    def _promise_anew(self, ones: Sequence[Promise], now: float) -> list[PromiseBroken]:
        """Behind all others, in order of arrival; they have no deadline."""
        if not ones:
            return []
        done = finish_times(self._held.values(), self._rate_bps, now)
        for one in ones:
            one.deadline_s = now + (done[one.transfer] - now) * K_ANEW
        return [PromiseBroken(self.link, one.transfer, now, one.deadline_s) for one in ones]

    def _serve_queue(self, now: float) -> list[LedgerEvent]:
        events: list[LedgerEvent] = []
        if not self._waiting:
            return events
        for transfer, new in sorted(self._waiting.items(), key=lambda item: item[1].deadline_s):
            if self._rate_bps <= 0:
                # waits out an outage as long as its deadline lies ahead
                if new.deadline_s <= now:
                    del self._waiting[transfer]
                    events.append(Expired(self.link, transfer, now, RefusalReason.LINK_DOWN))
                continue
            finish = self._finish_if_kept(new, now)
            if finish is not None:
                del self._waiting[transfer]
                self._held[transfer] = new
                events.append(Admitted(self.link, transfer, now, finish))
            elif finish_times([new], self._rate_bps, now)[transfer] > new.deadline_s + K_EPSILON_S:
                del self._waiting[transfer]
                events.append(Expired(self.link, transfer, now, RefusalReason.DEADLINE))
        return events
