"""The ledger of one link: what it admits is kept, what it refuses leaves no trace, nothing waits for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prfaas.admission import Admitted, Expired, Ledger, Promise, PromiseBroken, edf, finish_times
from prfaas.admission import ledger as ledger_module
from prfaas.admission.edf import K_PIECES, first_broken
from prfaas.model.decisions import RefusalReason, Verdict
from prfaas.model.errors import LocalProtocolError
from prfaas.model.ids import LinkId

LINK = LinkId("east", "west")
MB = 10**6


def ledger(rate_mbps: float = 8.0, queue_limit: int = 4) -> Ledger:
    """8 Mbit/s carries 1 MB a second."""
    return Ledger(LINK, rate_mbps * 1e6, queue_limit=queue_limit)


def test_admits_what_fits_and_says_when_it_is_through() -> None:
    link = ledger()
    first = link.offer("a", 2 * MB, 10.0, now=0.0)
    second = link.offer("b", 1 * MB, 2.0, now=0.0)
    assert (first.verdict, second.verdict) == (Verdict.ADMITTED, Verdict.ADMITTED)
    assert first.finish_by_s == pytest.approx(2.0)
    assert second.finish_by_s == pytest.approx(1.0)  # its deadline comes first


def test_refuses_what_the_empty_link_could_not_carry_in_time() -> None:
    told = ledger().offer("a", 20 * MB, 10.0, now=0.0)
    assert (told.verdict, told.reason) == (Verdict.REFUSED, RefusalReason.DEADLINE)


def test_a_capacity_below_nothing_is_a_link_that_is_down() -> None:
    for link in (ledger(), ledger(rate_mbps=-8.0)):
        link.offer("before", 1 * MB, 10.0, now=0.0)
        link.set_capacity(-1.0, now=0.0)
        assert link.statistics().rate_bps == 0
        told = link.offer("a", 1 * MB, 10.0, now=0.0)
        assert (told.verdict, told.reason) == (Verdict.REFUSED, RefusalReason.LINK_DOWN)
        link.set_capacity(8e6, now=0.0)
        assert link.offer("a", 1 * MB, 10.0, now=0.0).verdict is Verdict.ADMITTED


def test_queues_what_would_break_others_and_admits_it_once_they_are_through() -> None:
    link = ledger()
    link.offer("a", 5 * MB, 6.0, now=0.0)
    told = link.offer("b", 3 * MB, 6.0, now=0.0)
    assert told.verdict is Verdict.QUEUED
    assert told.retry_after_s == pytest.approx(2.0)
    assert link.on_progress("a", 4 * MB, now=0.5) == []
    events = link.release("a", now=1.0)
    assert events == [Admitted(LINK, "b", 1.0, pytest.approx(4.0))]


def test_without_a_queue_it_refuses_with_a_time_to_try_again() -> None:
    link = ledger()
    link.offer("a", 5 * MB, 6.0, now=0.0)
    told = link.offer("b", 3 * MB, 6.0, now=0.0, may_queue=False)
    assert told.reason is RefusalReason.WOULD_BREAK_OTHERS
    assert told.retry_after_s is not None
    again = 0.0 + told.retry_after_s
    link.on_progress("a", 3 * MB, now=again)
    assert link.offer("b", 3 * MB, 6.0 + again, now=again, may_queue=False).verdict is Verdict.ADMITTED


def test_a_full_queue_refuses() -> None:
    link = ledger(queue_limit=1)
    link.offer("a", 5 * MB, 6.0, now=0.0)
    link.offer("b", 3 * MB, 6.0, now=0.0)
    assert link.offer("c", 3 * MB, 6.0, now=0.0).reason is RefusalReason.QUEUE_FULL


@pytest.mark.parametrize(
    ("size", "deadline", "reason"),
    [
        (1, 0.0, RefusalReason.DEADLINE_PASSED),
        (-1, 9.0, RefusalReason.BAD_REQUEST),
        (1, float("nan"), RefusalReason.BAD_REQUEST),
    ],
)
def test_bad_offers_are_refused_by_name(size: int, deadline: float, reason: RefusalReason) -> None:
    assert ledger().offer("a", size, deadline, now=0.0).reason is reason


def test_the_same_transfer_twice_is_refused_and_the_first_stays() -> None:
    link = ledger()
    link.offer("a", MB, 6.0, now=0.0)
    assert link.offer("a", MB, 6.0, now=0.0).reason is RefusalReason.DUPLICATE
    assert link.holds("a") is Verdict.ADMITTED


def test_a_refusal_leaves_no_trace() -> None:
    link = ledger(queue_limit=0)
    link.offer("a", 5 * MB, 6.0, now=0.0)
    before = link.statistics()
    link.offer("b", 3 * MB, 6.0, now=0.0)
    after = link.statistics()
    assert (after.admitted, after.queued, after.promised_bytes) == (before.admitted, 0, before.promised_bytes)
    assert link.holds("b") is None
    with pytest.raises(LocalProtocolError):
        link.release("b", now=0.0)


def test_a_fall_of_capacity_breaks_as_few_promises_as_possible() -> None:
    link = ledger()
    link.offer("large", 6 * MB, 8.0, now=0.0)
    for k in range(2):
        link.offer(k, MB, 8.0 + k, now=0.0)
    events = link.set_capacity(4e6, now=0.0)
    assert [type(event) for event in events] == [PromiseBroken]
    assert events[0].transfer == "large"
    assert events[0].finish_by_s > 16
    assert link.statistics().late == 1


@pytest.mark.parametrize("spread_s", [0.0, 5.0])
@pytest.mark.parametrize("after", [0.0, 0.6])
def test_a_fall_looks_at_all_promises_a_few_times_not_once_for_each_that_breaks(
    spread_s: float, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, total = random.Random(1), 0
    link = Ledger(LINK, 1e12)
    for k in range(300):
        ready = rng.uniform(0, spread_s)
        total += (size := rng.randint(200_000, 2_000_000))
        link.offer(k, size, ready + rng.uniform(5, 30), now=0.0, first_s=ready / 2, ready_s=ready)
    link.set_capacity(total * 8 / 30, now=0.0)
    looks: list[int] = []
    plain = edf.finish_times
    for module in (edf, ledger_module):
        monkeypatch.setattr(module, "finish_times", lambda *a: looks.append(1) or plain(*a))
    broken = link.set_capacity(total * 8 / 30 * after, now=0.0)
    assert len(broken) > 30
    assert len(looks) < 15
    looks.clear()
    link.set_capacity(total * 8 / 30, now=1.0)
    assert len(looks) < 15, "an outage is over"


def test_down_link_refuses_keeps_what_it_holds_and_serves_it_again() -> None:
    link = ledger()
    link.offer("a", MB, 5.0, now=0.0)
    events = link.set_capacity(0.0, now=1.0)
    assert events == [PromiseBroken(LINK, "a", 1.0, float("inf"))]
    assert link.offer("b", MB, 9.0, now=1.0).reason is RefusalReason.LINK_DOWN
    assert link.next_poll_at(1.0) is None
    back = link.set_capacity(8e6, now=20.0)
    assert [type(event) for event in back] == [PromiseBroken]
    assert back[0].finish_by_s < 22
    assert link.offer("b", MB, 29.0, now=20.0).verdict is Verdict.ADMITTED
    link.release("a", now=21.0)


def test_a_queued_transfer_expires_when_it_can_not_make_it() -> None:
    link = ledger()
    link.offer("a", 5 * MB, 6.0, now=0.0)
    link.offer("b", 3 * MB, 6.0, now=0.0)
    due = link.next_poll_at(0.0)
    assert due == pytest.approx(3.0)
    link.on_progress("a", 3 * MB, now=2.0)
    assert link.on_progress("a", 2 * MB, now=3.0) == []
    assert [type(event) for event in link.poll(3.1)] == [Expired]
    assert link.holds("b") is None


def test_what_breaks_is_promised_anew_and_newcomers_can_not_push_it_out() -> None:
    link = ledger()
    link.offer("a", 5 * MB, 6.0, now=0.0)
    (broken,) = link.set_capacity(4e6, now=0.0)
    for k in range(20):
        link.offer(k, MB, 10.0, now=0.0, may_queue=False)
    assert link.poll(0.0) == []
    assert isinstance(broken, PromiseBroken)
    assert finish_times(link._held.values(), 4e6, 0.0)["a"] <= broken.finish_by_s


def test_bytes_that_prefill_makes_later_are_not_promised_before_they_exist() -> None:
    link = ledger()
    told = link.offer("later", 2 * MB, 12.0, now=0.0, first_s=8.0, ready_s=10.0)
    assert told.finish_by_s == pytest.approx(10.5)  # the last quarter leaves once it exists
    assert link.offer("before", 6 * MB, 7.0, now=0.0).verdict is Verdict.ADMITTED


jobs = st.lists(
    st.tuples(
        st.integers(0, 50),  # hundred KB
        st.floats(0.1, 30),  # deadline
        st.floats(0, 10),  # first
        st.floats(0, 10),  # making
    ),
    max_size=12,
)


@given(jobs, st.floats(0.5, 20), st.floats(0, 5))
def test_edf_conserves_bytes_and_serves_by_deadline(
    listed: list[tuple[int, float, float, float]], rate_mbps: float, now: float
) -> None:
    promises = [
        Promise(k, size * 1e5, deadline, first, first + making, k)
        for k, (size, deadline, first, making) in enumerate(listed)
    ]
    rate = rate_mbps * 1e6
    done = finish_times(promises, rate, now)
    assert set(done) == set(range(len(promises)))
    total_s = sum(one.remaining_bytes for one in promises) * 8 / rate
    for one in promises:
        assert done[one.transfer] >= now - 1e-9
        if one.ready_s > now:
            assert done[one.transfer] >= one.ready_s - 1e-9
    if promises:
        last_ready = max(max(one.ready_s for one in promises), now)
        assert max(done.values()) <= last_ready + total_s + 1e-6
        assert max(done.values()) >= now + total_s - 1e-6
        first = min(promises, key=lambda one: (one.deadline_s, one.serial))
        own_s = first.remaining_bytes * 8 / rate
        assert done[first.transfer] <= max(now, first.ready_s) + own_s + 1e-6


def played(promises: list[Promise], rate_bps: float, now: float) -> dict[int, float]:
    """EDF without any short cut: always K_PIECES pieces, always the most urgent that exists."""
    todo = sorted(promises, key=lambda one: (one.deadline_s, one.serial))
    pieces = []
    for rank, one in enumerate(todo):
        start_s = max(now, one.first_s)
        part_s = max(0.0, one.ready_s - start_s) / K_PIECES
        seconds = one.remaining_bytes * 8 / rate_bps / K_PIECES
        pieces += [[start_s + part_s * (k + 1) if one.ready_s > now else now, rank, seconds]
                   for k in range(K_PIECES)]  # fmt: skip
    at_s, done = now, {}
    while pieces:
        at_s = max(at_s, min(piece[0] for piece in pieces))
        piece = min((piece for piece in pieces if piece[0] <= at_s), key=lambda piece: piece[1])
        until_s = min((other[0] for other in pieces if other[0] > at_s), default=float("inf"))
        if at_s + piece[2] > until_s:
            piece[2] -= until_s - at_s
            at_s = until_s
            continue
        at_s += piece[2]
        pieces.remove(piece)
        done[todo[piece[1]].transfer] = at_s
    return done


@given(jobs, st.floats(0.5, 20), st.floats(0, 5), st.booleans(), st.booleans())
def test_the_short_cuts_of_edf_give_the_schedule_that_is_played_in_full(
    listed: list[tuple[int, float, float, float]], rate_mbps: float, now: float, at_once: bool, in_turn: bool
) -> None:
    promises = [
        Promise(
            k,
            size * 1e5,
            first + making + 60 if in_turn else deadline,
            first + making if at_once else first,
            first + making,
            k,
        )
        for k, (size, deadline, first, making) in enumerate(listed)
    ]
    rate = rate_mbps * 1e6
    assert finish_times(promises, rate, now) == pytest.approx(played(promises, rate, now), abs=1e-6)


class PlainLedger(Ledger):
    """Goes through all promises at every poll."""

    def poll(self, now: float) -> list:
        self._kept_until_s = -float("inf")
        return super().poll(now)


steps = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "offer", "restore", "progress", "release", "capacity", "poll"]),
        st.integers(0, 40),  # hundred KB, or which transfer
        st.one_of(st.floats(0.1, 15), st.just(float("inf"))),  # until the deadline
        st.floats(0, 4),  # until the first byte
        st.floats(0, 4),  # making
        st.sampled_from([0.0, 0.0, 0.01, 0.5, 3.0]),  # time that passes before
        st.sampled_from([0.0, 2e6, 8e6, 8e6, 16e6]),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(steps, st.integers(0, 3))
def test_a_ledger_that_skips_needless_looks_says_the_same_as_one_that_never_does(
    listed: list[tuple[str, int, float, float, float, float, float]], queue_limit: int
) -> None:
    quick, plain = Ledger(LINK, 8e6, queue_limit=queue_limit), PlainLedger(LINK, 8e6, queue_limit=queue_limit)
    now = 0.0
    for serial, (what, size, within_s, first_s, making_s, passed_s, rate_bps) in enumerate(listed):
        now += passed_s
        told = []
        for link in (quick, plain):
            held = sorted(link._held)
            known = sorted([*link._held, *link._waiting])
            if what == "offer":
                first = now + first_s
                told.append(
                    link.offer(
                        serial, size * 10**5, now + within_s, now=now, first_s=first, ready_s=first + making_s
                    )
                )
            elif what == "restore":
                others = {key: (one.deadline_s, one.late) for key, one in link._held.items()}
                told.append(link.restore(serial, size * 10**5, now + within_s, now=now))
                mine = link._held[serial]
                if mine.late:  # it, and no other, pays for what doesn't fit
                    assert all(
                        (link._held[key].deadline_s, link._held[key].late) == was
                        for key, was in others.items()
                    )
            elif what == "progress" and held:
                transfer = held[size % len(held)]
                left = int(link._held[transfer].remaining_bytes * making_s / 4)
                told.append(link.on_progress(transfer, left, now=now))
            elif what == "release" and known:
                told.append(link.release(known[size % len(known)], now=now))
            elif what == "capacity":
                told.append(link.set_capacity(rate_bps, now=now))
            else:
                told.append(link.poll(now))
        assert told[0] == told[1]
        assert quick._held == plain._held
        assert quick._waiting == plain._waiting
        assert quick.statistics() == plain.statistics()


class LedgerMachine(RuleBasedStateMachine):
    """A link that really sends, by EDF at the promised rate, under offers, falls, outages, releases."""

    @initialize(queue_limit=st.integers(0, 3))
    def start(self, queue_limit: int) -> None:
        self.now = 0.0
        self.rate = 8e6
        self.ledger = Ledger(LINK, self.rate, queue_limit=queue_limit)
        self.left: dict[int, float] = {}
        self.due: dict[int, float] = {}
        self.queued: dict[int, float] = {}
        self.sure: set[int] = set()
        self.serial = 0

    def take(self, events: list) -> None:
        for event in events:
            if isinstance(event, Admitted):
                self.queued.pop(event.transfer)
                self.sure.add(event.transfer)
            elif isinstance(event, Expired):
                self.queued.pop(event.transfer)
                del self.left[event.transfer], self.due[event.transfer]
            else:
                self.sure.discard(event.transfer)
                self.due[event.transfer] = event.finish_by_s

    @rule(size=st.integers(0, 5 * MB), within=st.floats(-1, 20), may_queue=st.booleans())
    def offer(self, size: int, within: float, may_queue: bool) -> None:
        self.take(self.ledger.poll(self.now))
        before = self.ledger.statistics()
        self.serial += 1
        told = self.ledger.offer(self.serial, size, self.now + within, now=self.now, may_queue=may_queue)
        after = self.ledger.statistics()
        if told.verdict is Verdict.REFUSED:
            assert told.reason is not None
            assert (after.admitted, after.queued, after.promised_bytes) == (
                before.admitted,
                before.queued,
                before.promised_bytes,
            )
            return
        self.left[self.serial], self.due[self.serial] = size, self.now + within
        if told.verdict is Verdict.ADMITTED:
            self.sure.add(self.serial)
        else:
            assert may_queue
            self.queued[self.serial] = self.now + within

    @rule(rate=st.sampled_from([0.0, 1e6, 4e6, 8e6, 80e6]))
    def capacity(self, rate: float) -> None:
        self.rate = rate
        self.take(self.ledger.set_capacity(rate, now=self.now))

    @rule(step_s=st.floats(0.01, 3.0))
    def send(self, step_s: float) -> None:
        budget = self.rate * step_s / 8
        self.now += step_s
        for name in sorted(self.left.keys() - self.queued.keys(), key=lambda name: (self.due[name], name)):
            sent = min(budget, self.left[name])
            budget -= sent
            self.left[name] -= sent
            if self.left[name] <= 1e-6:
                if name in self.sure:
                    assert self.now - step_s <= self.due[name] + 1e-6
                del self.left[name], self.due[name]
                self.sure.discard(name)
                self.take(self.ledger.release(name, now=self.now))
            else:
                # rounding up to whole bytes must not look like falling behind
                self.take(self.ledger.on_progress(name, int(self.left[name]), now=self.now))
        self.take(self.ledger.poll(self.now))

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.left)))
        del self.left[name], self.due[name]
        self.queued.pop(name, None)
        self.sure.discard(name)
        self.take(self.ledger.release(name, now=self.now))
        with pytest.raises(LocalProtocolError):
            self.ledger.release(name, now=self.now)

    @invariant()
    def promises_fit_the_link(self) -> None:
        self.take(self.ledger.poll(self.now))
        assert first_broken(self.ledger._held.values(), self.rate, self.now) is None
        for deadline in {one.deadline_s for one in self.ledger._held.values()} - {float("inf")}:
            room = self.rate * (deadline - self.now) / 8
            assert self.ledger.promised_by(deadline) <= room + 1e-3

    @invariant()
    def both_know_the_same_transfers(self) -> None:
        told = self.ledger.statistics()
        assert told.admitted + told.queued == len(self.left)
        assert told.queued == len(self.queued)

    def teardown(self) -> None:
        """Whatever happened: with the link up and nothing new, all of it ends."""
        if not hasattr(self, "ledger"):
            return
        self.capacity(8e6)
        for _ in range(2000):
            if not self.left:
                break
            self.send(0.5)
        assert not self.left
        assert self.ledger.statistics().promised_bytes == 0


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
