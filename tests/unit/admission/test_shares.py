"""Shares of one link: several pumps, lost renewals, a changing capacity; the sum never exceeds it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prfaas.admission import Share, ShareBook, ShareHolder
from prfaas.config.policy import LinkAdmission
from prfaas.model.errors import LocalProtocolError
from prfaas.model.ids import LinkId

LINK = LinkId("east", "west")


def book(max_pumps: int = 4, floor_share: float = 0.1) -> ShareBook:
    return ShareBook(LINK, LinkAdmission(nominal_bps=1e9, max_pumps=max_pumps, floor_share=floor_share))


def test_one_pump_gets_all_but_the_others_floors() -> None:
    share = book().renew("a", 5e9, now=0)
    assert share.rate_bps == pytest.approx(1e9 - 3 * 0.025e9)
    assert share.floor_bps == pytest.approx(0.025e9)


def test_two_hungry_pumps_end_up_with_equal_shares() -> None:
    shared = book()
    for k in range(6):
        first = shared.renew("a", 5e9, now=k * 0.5)
        second = shared.renew("b", 5e9, now=k * 0.5)
    assert first.rate_bps == pytest.approx(second.rate_bps, rel=0.01)
    assert first.rate_bps + second.rate_bps == pytest.approx(0.95e9)


def test_what_a_modest_pump_leaves_goes_to_the_other() -> None:
    shared = book()
    for k in range(6):
        modest = shared.renew("a", 0.1e9, now=k * 0.5)
        hungry = shared.renew("b", 5e9, now=k * 0.5)
    assert modest.rate_bps == pytest.approx(0.1e9)
    assert hungry.rate_bps == pytest.approx(0.85e9)


def test_an_expired_share_falls_to_its_floor_and_frees_the_rest() -> None:
    shared, holder = book(), ShareHolder(LINK, "a")
    holder.on_share(shared.renew("a", 5e9, now=0), asked_s=0)
    assert holder.rate_bps(0.99) > 0.9e9
    assert holder.rate_bps(1.0) == pytest.approx(0.025e9)
    assert shared.renew("b", 5e9, now=1.0).rate_bps > 0.9e9


def test_an_older_grant_does_not_replace_a_newer_one() -> None:
    shared, holder = book(), ShareHolder(LINK, "a")
    old = shared.renew("a", 1e6, now=0)
    new = shared.renew("a", 5e9, now=0.5)
    holder.on_share(new, asked_s=0.5)
    holder.on_share(old, asked_s=0.9)
    assert holder.rate_bps(1.2) == new.rate_bps
    assert holder.renew_at(0.6) == pytest.approx(1.0)


def test_what_a_pump_has_given_up_is_anothers_after_its_next_report_not_after_the_shares_life() -> None:
    shared, holder = book(max_pumps=2), ShareHolder(LINK, "a")
    holder.on_share(shared.renew("a", 5e9, now=0), asked_s=0)
    shared.renew("b", 5e9, now=0.01)
    holder.on_share(shared.renew("a", 5e9, now=0.1, holds=holder.serial), asked_s=0.1)
    assert shared.renew("b", 5e9, now=0.15).rate_bps < 0.1e9, "the answer may have been lost"
    shared.renew("a", 5e9, now=0.2, holds=holder.serial)
    assert shared.renew("b", 5e9, now=0.25).rate_bps == pytest.approx(0.5e9)


def test_a_pump_that_does_not_say_what_it_holds_keeps_its_older_grants() -> None:
    shared = book(max_pumps=2)
    for at_s in (0.0, 0.1, 0.2):
        shared.renew("a", 5e9, now=at_s)
        other = shared.renew("b", 5e9, now=at_s)
    assert other.rate_bps < 0.1e9


def test_a_book_started_anew_is_heard_by_who_holds_a_share_of_the_one_before() -> None:
    config = LinkAdmission(nominal_bps=1e9, max_pumps=2)
    before, holder = ShareBook(LINK, config, 1_000), ShareHolder(LINK, "a")
    for k in range(30):
        holder.on_share(before.renew("a", 5e9, now=k / 10, holds=holder.serial), asked_s=k / 10)
    anew = ShareBook(LINK, config, 4_000)  # 3 s later
    holder.on_share(anew.renew("a", 5e9, now=6, holds=holder.serial), asked_s=6)
    assert holder.rate_bps(6.5) > 0.9e9


def test_a_book_started_anew_by_a_clock_that_was_set_back_is_heard_all_the_same() -> None:
    config = LinkAdmission(nominal_bps=1e9, max_pumps=3)
    before, holders = ShareBook(LINK, config, 9_000), [ShareHolder(LINK, str(k)) for k in range(2)]

    def report(book: ShareBook, holder: ShareHolder, now: float) -> None:
        held_bps = holder.held_bps(now)
        share = book.renew(holder.pump, 5e9, now=now, holds=holder.serial, holds_bps=held_bps)
        holder.on_share(share, asked_s=now)

    for k in range(20):
        for holder in holders:
            report(before, holder, k / 10)
    anew, newcomer = ShareBook(LINK, config, 1_000, opens_s=2.25), ShareHolder(LINK, "new")
    for k in range(20):
        for holder in [newcomer, *holders]:
            report(anew, holder, 2 + k / 10)
            held_bps = sum(one.rate_bps(2 + k / 10) for one in [newcomer, *holders])
            assert held_bps <= 1e9 + 1
    assert all(holder.rate_bps(4) > 0.3e9 for holder in [newcomer, *holders])


def test_the_serial_of_another_book_forgets_no_grant() -> None:
    shared = book(max_pumps=2)
    first = shared.renew("a", 5e9, now=0)
    shared.renew("a", 1e6, now=0.1, holds=first.serial + 1_000)
    assert shared.statistics(0.1)["a"] == first.rate_bps


@pytest.mark.parametrize("restart_s", [0.05, 0.3, 0.9])
def test_a_book_started_anew_grants_nothing_that_the_one_before_has_granted_already(restart_s: float) -> None:
    config = LinkAdmission(nominal_bps=1e9, max_pumps=3)
    holders = [ShareHolder(LINK, str(k)) for k in range(3)]
    shared, now = ShareBook(LINK, config), 0.0

    def report(who: ShareHolder, demand_bps: float, *, lost: bool = False) -> None:
        held_bps = who.held_bps(now)
        share = shared.renew(who.pump, demand_bps, now=now, holds=who.serial, holds_bps=held_bps)
        if not lost:
            who.on_share(share, asked_s=now)

    for _ in range(30):  # the first has nearly all, for the others ask for little
        now += 0.1
        for k, holder in enumerate(holders):
            report(holder, 5e9 if k == 0 else 1e6)
    now += restart_s
    shared = ShareBook(LINK, config, 1_000_000, opens_s=now + 0.3)
    for step in range(60):
        now += 0.025
        if step % 4 < 3:  # each every 0.1 s, the greedy one last of all
            who = holders[-1 - step % 4]
            report(who, 5e9, lost=who is holders[0] and step < 20)
        assert sum(holder.rate_bps(now) for holder in holders) <= 1e9 + 1
    assert min(holder.rate_bps(now) for holder in holders) > 0.3e9


def test_one_pump_too_many_is_refused_and_changes_nothing() -> None:
    shared = book(max_pumps=1)
    shared.renew("a", 1e9, now=0)
    with pytest.raises(LocalProtocolError):
        shared.renew("b", 1e9, now=0)
    assert set(shared.statistics(0)) == {"a"}
    shared.leave("a", now=0)
    with pytest.raises(LocalProtocolError):
        shared.leave("a", now=0)


class SharesMachine(RuleBasedStateMachine):
    """Holders that renew when they please; answers may be lost."""

    @initialize(pumps=st.integers(1, 4), floor=st.sampled_from([0.01, 0.1, 1.0]))
    def start(self, pumps: int, floor: float) -> None:
        self.now = 0.0
        self.book = book(max_pumps=pumps, floor_share=floor)
        self.holders = [ShareHolder(LINK, str(k)) for k in range(pumps)]
        self.questions: list[tuple[ShareHolder, float, int, float]] = []
        self.answers: list[tuple[ShareHolder, Share, float]] = []
        # each capacity counts until the shares granted under it have expired
        self.capacities = [(0.0, 1e9)]

    @rule(which=st.integers(0, 3), demand=st.floats(0, 3e9), tells=st.booleans())
    def ask(self, which: int, demand: float, tells: bool) -> None:
        holder = self.holders[which % len(self.holders)]
        self.questions.append((holder, demand, holder.serial if tells else 0, self.now))

    @precondition(lambda self: self.questions)
    @rule(which=st.integers(0, 9), lost=st.booleans())
    def hear(self, which: int, lost: bool) -> None:
        """Questions and answers are overtaken and lost."""
        holder, demand, holds, asked_s = self.questions.pop(which % len(self.questions))
        if not lost:
            share = self.book.renew(holder.pump, demand, now=self.now, holds=holds)
            self.answers.append((holder, share, asked_s))

    @precondition(lambda self: self.answers)
    @rule(which=st.integers(0, 9), lost=st.booleans())
    def take(self, which: int, lost: bool) -> None:
        holder, share, asked_s = self.answers.pop(which % len(self.answers))
        if not lost:
            holder.on_share(share, asked_s=asked_s)

    @rule(which=st.integers(0, 3), demand=st.floats(0, 3e9), lost=st.booleans(), delay_s=st.floats(0, 0.3))
    def renew(self, which: int, demand: float, lost: bool, delay_s: float) -> None:
        holder = self.holders[which % len(self.holders)]
        asked, holds = self.now, holder.serial
        self.now += delay_s
        share = self.book.renew(holder.pump, demand, now=self.now, holds=holds)
        if not lost:
            holder.on_share(share, asked_s=asked)

    @rule(capacity=st.sampled_from([0.0, 1e8, 1e9, 4e9]))
    def capacity_changes(self, capacity: float) -> None:
        self.book.set_capacity(capacity)
        self.capacities.append((self.now, capacity))

    @rule(step_s=st.floats(0.01, 2))
    def wait(self, step_s: float) -> None:
        self.now += step_s

    @invariant()
    def the_sum_never_exceeds_what_was_believed_when_granted(self) -> None:
        ttl_s = self.book.config.share_ttl_s
        started = [at_s for at_s, _ in self.capacities]
        ends = [*started[1:], float("inf")]
        believed = max(
            value for (_, value), end in zip(self.capacities, ends, strict=True) if end >= self.now - ttl_s
        )
        live = sum(holder.rate_bps(self.now) for holder in self.holders if self.now < holder._expires_s)
        assert live <= believed + 1
        if len(self.capacities) == 1:
            assert sum(holder.rate_bps(self.now) for holder in self.holders) <= believed + 1
            assert self.book.promised_bps(self.now) <= believed + 1


TestShares = SharesMachine.TestCase
TestShares.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
