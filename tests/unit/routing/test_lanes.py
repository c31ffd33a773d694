"""An instance's queue as it is reckoned ahead: step for step what a simulated instance does."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas.config.policy import PolicyConfig
from prfaas.model.ids import LinkId
from prfaas.model.observations import (
    InstanceObservation,
    LinkEstimate,
    RequestView,
    Role,
    SiteObservation,
    Snapshot,
)
from prfaas.model.profiles import Curve, Profile
from prfaas.routing import Fleet, create_policy
from prfaas.routing.held import Lanes
from prfaas.routing.lanes import Lane
from prfaas.routing.prices import K_BEHIND_S, PricesPolicy
from prfaas.routing.steps import Queued
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.engine import Engine
from prfaas.simulator.job import Job

K_CHUNK = 1000
K_APART_S = 1.7e-4  # nothing comes just as a step ends: whether it joins the next is open then
K_PROFILE = Profile("unit", Curve.of([1000, 2000], [1.3, 2.3]), Curve.of([1000, 2000], [1e6, 2e6]))
K_START_UP_S = K_PROFILE.prefill_s(0)


def queued(lane: Lane, now: float, *entries: tuple[float, float, float]) -> None:
    """Of (order_s, tokens, latest_s)."""
    for place, (order_s, tokens, latest_s) in enumerate(entries):
        work_s = K_PROFILE.prefill_s(tokens)
        lane.add(Queued(order_s, place, str(place), tokens, work_s, latest_s, K_START_UP_S), now)


def test_a_prefill_waits_for_the_running_step_and_ends_with_the_step_that_it_shares() -> None:
    lane = Lane(K_CHUNK)
    assert lane.place(5, 500, K_PROFILE.prefill_s(500), 0.0, K_START_UP_S) == (pytest.approx(0.8), 0)
    queued(lane, 0.0, (10, 800, 50), (20, 700, 50), (30, 900, 50))
    # 800 run until 1.1; the urgent 500 share a step with 500 of the next 700: both take their start-up.
    end_s, late = lane.place(5, 500, K_PROFILE.prefill_s(500), 0.0, K_START_UP_S)
    assert end_s == pytest.approx(1.1 + 0.8 + 0.8)
    assert late == 0


def test_it_counts_those_that_it_makes_late_and_none_that_are_late_anyway() -> None:
    lane = Lane(K_CHUNK)
    queued(lane, 0.0, (1, 1000, 9), (10, 1000, 2.7), (20, 1000, 2.7), (30, 1000, 9))
    assert lane.place(5, 1000, 1.3, 0.0, K_START_UP_S) == (pytest.approx(2.6), 1)
    assert lane.place(15, 1000, 1.3, 0.0, K_START_UP_S) == (pytest.approx(3.9), 0)


def test_what_is_given_up_is_served_last_and_only_fills_steps() -> None:
    lane = Lane(K_CHUNK)
    queued(lane, 0.0, (1, 1000, 9), (2, 5000, math.inf))
    end_s, _ = lane.place(500, 400, 0.7, 0.0, K_START_UP_S)
    assert end_s == pytest.approx(1.3 + 0.7 + 0.3 + 0.6)
    assert lane.hoped_s(0.0) == pytest.approx(1.3)
    assert lane.work_s(0.0) == pytest.approx(1.3 + 5.3)


@pytest.mark.parametrize("latest_s", [90, math.inf])
def test_what_comes_waits_for_all_of_a_prompt_that_a_step_has_cut(latest_s: float) -> None:
    lane = Lane(K_CHUNK)
    queued(lane, 0.0, (50, 2500, latest_s), (60, 1000, 90))
    # The long one's last 500 share the third step with the urgent 300: 2.8 s in all, and a second start-up.
    end_s, late = lane.place(1, 300, K_PROFILE.prefill_s(300), 0.0, K_START_UP_S)
    assert end_s == pytest.approx(2.8 + 0.6 + 0.2 + K_START_UP_S)
    assert late == 0


def test_a_slow_instance_moves_all_that_follows_back_once() -> None:
    lane = Lane(K_CHUNK)
    queued(lane, 0.0, (1, 500, 9), (2, 500, 9), (3, 1000, 9))
    lane.advance(1.0)
    begin_s = lane.ends_s
    for request in ("0",):
        lane.done(request, 1.2)  # reckoned at 0.8
    assert lane.ends_s == pytest.approx(begin_s + 0.4)


def test_work_that_others_sent_counts_before_all_until_a_report_says_it_is_done() -> None:
    lane = Lane(K_CHUNK)
    lane.report(4.0, at_s=1.0, now=1.0)
    assert lane.place(1, 1000, 1.3, 1.0)[0] == pytest.approx(6.3)
    lane.report(0.0, at_s=0.5, now=1.5)  # older than what is known
    assert lane.foreign_s == 4.0
    lane.report(0.0, at_s=2.0, now=2.0)
    assert lane.place(1, 1000, 1.3, 2.0)[0] == pytest.approx(3.3)


def test_others_work_that_a_door_tells_apart_counts_whatever_of_ours_is_unanswered() -> None:
    lane = Lane(K_CHUNK)
    queued(lane, 0.0, (1, 1000, 9))
    lane.report_others(4.0, at_s=0.5)
    assert lane.place(1, 1000, 1.3, 0.5)[0] == pytest.approx(1.3 + 4.0 + 1.3)
    lane.report_others(0.0, at_s=0.4)  # older than what is known
    assert lane.foreign_s == 4.0
    lane.report_others(0.4, at_s=2.0)  # a hair of a report's own delay
    assert lane.place(1, 1000, 1.3, 2.0)[0] == pytest.approx(3.3)


requests = st.lists(
    st.tuples(
        st.floats(0, 8),  # arrival
        st.integers(1, 3500) | st.sampled_from([500, 1000, 2000]),  # tokens
        st.integers(0, 6),  # order
        st.booleans(),  # given up
    ),
    min_size=1,
    max_size=14,
)


@given(requests, st.sampled_from([1, 2, None, None]))
@settings(max_examples=200, deadline=None)
def test_what_is_reckoned_is_what_an_instance_does(kinds, most: int | None) -> None:
    agenda, lane, ended, reckoned = Agenda(), Lane(K_CHUNK, most or math.inf), {}, {}
    engine = Engine("e", "here", "prefill", K_PROFILE, agenda, chunk_tokens=K_CHUNK, prefill_requests=most)

    def arrive(name: str, tokens: int, order_s: float, given_up: bool, now: float) -> None:
        work_s, order_s = K_PROFILE.prefill_s(tokens), order_s + (1e6 if given_up else 0.0)
        lane.advance(now)
        if not given_up:
            reckoned[name] = lane.place(order_s, tokens, work_s, now, K_START_UP_S)[0]
        latest_s = math.inf if given_up else 1e3
        lane.add(Queued(order_s, len(ended), name, tokens, work_s, latest_s, K_START_UP_S), now)

        def on_chunk(job: Job, at_s: float, final: bool) -> None:
            if final:
                ended[job.payload] = at_s

        engine.prefill(Job(name, tokens, 1, key=order_s, on_chunk=on_chunk), now)
        assert lane.work_s(now) == pytest.approx(engine.work_s(now), abs=1e-6)

    last = max(at_s for at_s, *_ in kinds) + len(kinds) * K_APART_S
    for place, (at_s, tokens, order, given_up) in enumerate(sorted(kinds)):
        agenda.at(
            at_s + place * K_APART_S,
            lambda now, a=(str(place), tokens, float(order) + place / 100, given_up): arrive(*a, now),  # type: ignore[misc]
        )
    agenda.run(last)
    # Whoever came last is disturbed by nobody: it ends when that was said.
    name = str(len(kinds) - 1)
    agenda.run()
    if name in reckoned:
        assert ended[name] == pytest.approx(reckoned[name], abs=1e-6)
    lane.advance(1e4)
    assert [*lane.step, *lane.hopeful, *lane.behind] == []
    assert lane.work_s(1e4) == 0


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_comes_and_goes_nothing_is_left(seed: int) -> None:
    rng, lanes, now = Random(seed), Lanes(), 0.0
    two = [lanes.lanes.setdefault(name, Lane(K_CHUNK)) for name in ("a", "b")]
    for _ in range(80):
        now += rng.random()
        request = str(rng.randrange(12))
        what = rng.random()
        if what < 0.5:
            latest_s = rng.choice([now + 3, math.inf])
            lanes.add(request, rng.choice(two), rng.random(), rng.randrange(1, 3000), 1.5, latest_s, now, 0.2)
        elif what < 0.8:
            lanes.done(request, now)
        else:
            lanes.drop(request, now)
        for lane in two:
            assert lane.hopeful == sorted(lane.hopeful)
            assert lane.hopeful_s == pytest.approx(sum(one.work_s for one in lane.hopeful), abs=1e-6)
            assert lane.behind_s == pytest.approx(sum(one.work_s for one in lane.behind), abs=1e-6)
            assert lane.work_s(now) >= -1e-9
    for request in range(12):
        lanes.drop(str(request), now)
        lanes.drop(str(request), now)
    assert len(lanes) == 0
    assert [lane.hopeful or lane.behind for lane in two] == [[], []]


def listed(
    now: float = 0.0, chunk_tokens: int | None = K_CHUNK, tag: str = "", **backlogs_s: float
) -> Snapshot:
    """West with two instances, east with two, 100 Gbit/s between them."""
    link, rate = LinkId("east", "west"), 1e11
    sites = {
        site: SiteObservation.of(
            site,
            [
                InstanceObservation(
                    f"{site}-{k}{tag}",
                    site,
                    Role.PREFILL,
                    now,
                    prefill_backlog_s=backlogs_s.get(f"{site}_{k}", 0.0),
                    chunk_tokens=chunk_tokens,
                )
                for k in range(2)
            ]
            + ([InstanceObservation("d", "west", Role.DECODE, now)] if site == "west" else []),
            now,
        )
        for site in ("west", "east")
    }
    return Snapshot(now, sites, {link: LinkEstimate(link, now, rate, rate, rate, 0.04)})


def policy() -> PricesPolicy:
    made = create_policy(
        PolicyConfig(name="prices", service="deadline"), Fleet({("", ""): K_PROFILE}, frozenset({"west"}))
    )
    assert isinstance(made, PricesPolicy)
    return made


def test_the_instance_with_the_prefix_is_named_while_its_queue_is_worth_the_wait() -> None:
    held = {"west": 2900, "east": 0}
    view = RequestView(
        "r", 3000, 0.0, home="west", cached_tokens=held, instance_cached_tokens={"west-1": 2900}
    )
    assert policy().decide(view, listed(), 0.0).prefill_instance == "west-1"
    assert policy().decide(view, listed(west_1=1.5), 0.0).prefill_instance == "west-1"
    busy = policy().decide(view, listed(west_1=30.0), 0.0)
    assert busy.prefill_instance != "west-1"
    assert busy.chosen is not None
    assert busy.chosen.uncached_tokens == 3000


def test_requests_spread_over_instances_and_late_ones_go_behind() -> None:
    chosen, named, orders = policy(), [], []
    for number in range(24):
        view = RequestView(str(number), 4000, 0.0, home="west")
        decision = chosen.decide(view, listed(), 0.0)
        chosen.on_dispatch(request=view, decision=decision, now=0.0)
        named.append(decision.prefill_instance)
        assert decision.order_s is not None
        assert decision.deadline_s is not None
        orders.append(decision.order_s - decision.deadline_s)
    assert set(named) == {"west-0", "west-1", "east-0", "east-1"}
    assert orders[0] == 0
    assert orders[-1] == K_BEHIND_S
    for number in range(24):
        chosen.on_finished(request=str(number), now=1.0)
    assert len(chosen.lanes) == 0


def test_steps_are_of_the_size_that_the_instance_tells_whenever_it_tells_it() -> None:
    chosen = policy()
    sizes = []
    for number, told in enumerate((None, 500, 500, None, 2000)):
        view = RequestView(str(number), 4000, 0.0, home="west")
        decision = chosen.decide(view, listed(chunk_tokens=told), 0.0)
        chosen.on_dispatch(request=view, decision=decision, now=0.0)
        sizes.append({lane.chunk_tokens for lane in chosen.lanes.lanes.values()})
    assert sizes == [{K_PROFILE.chunk_tokens}, {500}, {500}, {500}, {2000}]


def test_one_prompt_a_step_waits_for_no_other_that_shares_it() -> None:
    shared, alone = Lane(K_CHUNK), Lane(K_CHUNK, 1)
    for lane in (shared, alone):
        for number in range(3):
            lane.add(Queued(number, number, str(number), 200, 0.5, 9.0, 0.3), 0.0)
    # The first is under way; the second ends before the third, where the two don't share a step.
    assert shared.place(1.5, 200, 0.5, 0.0, 0.3) == (2.0, 0)
    assert alone.place(1.5, 200, 0.5, 0.0, 0.3) == (1.5, 0)


def test_instances_that_come_and_go_leave_nothing() -> None:
    chosen = policy()
    for number in range(50):
        now = 30.0 * number
        view = RequestView(str(number), 4000, now, home="west")
        decision = chosen.decide(view, listed(now, tag=f"-{number}"), now)
        chosen.on_dispatch(request=view, decision=decision, now=now)
        if number % 2:
            chosen.on_prefill_done(request=str(number), now=now + 5)
        chosen.on_finished(request=str(number), now=now + 6)
        assert len(chosen.lanes.lanes) <= 4 * 3


def test_instances_that_leave_in_the_middle_of_a_prefill_or_with_others_work_leave_nothing() -> None:
    chosen = policy()
    for number in range(50):
        now = 30.0 * number
        view = RequestView(str(number), 4000, now, home="west")
        decision = chosen.decide(view, listed(now, tag=f"-{number}", west_1=4.0), now)
        chosen.on_dispatch(request=view, decision=decision, now=now)
        chosen.on_failed(request=str(number), site="west", reason="it died", now=now + 1)
        assert len(chosen.lanes.lanes) <= 4 * 5


def test_a_prompt_that_a_step_cuts_counts_for_those_whose_last_step_it_fills_up() -> None:
    lane = Lane(K_CHUNK)
    queued(lane, 0.0, (1, 1000, 9), (2, 400, 2.1))
    # Alone its step ends at 2.0; with the first 600 of a longer one that comes after it, at 2.9.
    assert lane.place(3, 3000, K_PROFILE.prefill_s(3000), 0.0, K_START_UP_S)[1] == 1


def test_lateness_that_an_idle_time_has_made_up_for_moves_nothing() -> None:
    lane = Lane(K_CHUNK)
    queued(lane, 0.0, (1, 1000, 9))  # reckoned until 1.3
    lane.advance(2.0)
    lane.add(Queued(2, 1, "next", 1000, 1.3, 9.0, 0.3), 2.0)
    lane.done("0", 2.1)
    assert lane.ends_s == pytest.approx(3.4)


def test_a_prompt_that_is_done_sooner_than_its_steps_were_reckoned_ends_the_running_one() -> None:
    lane = Lane(K_CHUNK)
    queued(lane, 0.0, (1, 2500, 9), (2, 1000, 9))
    lane.advance(1.0)
    lane.done("0", 1.2)
    assert [one.request for one in lane.step] == ["1"]
    assert lane.ends_s == pytest.approx(1.2 + 1.3)
