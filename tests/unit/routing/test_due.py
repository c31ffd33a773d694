"""What waits at a site, in order of service; and `prices` where instances serve by deadline."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Action
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkEstimate, RequestView, SiteObservation, Snapshot
from prfaas.model.profiles import Curve, Profile
from prfaas.routing import Fleet, create_policy
from prfaas.routing.due import DueQueue, DueQueues
from prfaas.routing.prices import K_BEHIND_S, PricesPolicy

NEAR = Profile("near", Curve.of([1000, 10000], [0.2, 1.9]), Curve.of([1000, 10000], [2e8, 4e8]))


def queue(*waiting: tuple[float, float, float]) -> DueQueue:
    """Of (order_s, prefill_s, latest_s)."""
    queues = DueQueues()
    for place, (order_s, prefill_s, latest_s) in enumerate(waiting):
        queues.add(str(place), "west", order_s, prefill_s, latest_s)
    return queues.at("west")


def test_only_what_is_served_before_is_waited_for() -> None:
    found = queue((30, 4, 20), (10, 2, 5), (20, 3, 9))
    assert found.ahead_s(5, 9.0) == 0
    assert found.ahead_s(15, 9.0) == 2
    assert found.ahead_s(40, 9.0) == 9


def test_what_was_worked_off_comes_off_those_served_first_and_what_others_sent_counts_as_before() -> None:
    found = queue((10, 2, 5), (20, 3, 9))
    assert found.ahead_s(15, 4.0) == 1
    assert found.ahead_s(25, 2.0) == 2
    assert found.ahead_s(5, 7.0) == 2


def test_those_are_delayed_that_come_later_and_would_otherwise_be_in_time() -> None:
    found = queue((10, 2, 5), (20, 3, 3), (30, 3, 100), (40, 1, 1), (50, 1, math.inf))
    delayed = found.delayed(15, 2.0, 1, 10.0, now=0.0)
    # 10: served before; 20: would start at 2 and has until 3; 30 has time; 40 is late anyway; 50 is given up.
    assert [entry.order_s for entry in delayed] == [20]
    assert found.delayed(15, 2.0, 4, 10.0, now=0.0) == []
    assert found.hoped_s(10.0) == 9.0


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(0.01, 20), st.floats(0, 100) | st.just(math.inf)), max_size=12
    ),
    st.floats(0, 300),
    st.floats(0, 110),
    st.floats(0, 110),
)
@settings(max_examples=150)
def test_the_wait_grows_with_the_place_and_never_exceeds_all_that_waits(
    waiting: list[tuple[float, float, float]], backlog_s: float, one: float, other: float
) -> None:
    found = queue(*waiting)
    sooner, later = sorted((one, other))
    assert 0 <= found.ahead_s(sooner, backlog_s) <= found.ahead_s(later, backlog_s) <= backlog_s + 1e-6
    assert found.hoped_s(backlog_s) <= backlog_s


@given(st.integers(0, 2**32))
@settings(max_examples=60)
def test_whatever_comes_and_goes_nothing_is_left(seed: int) -> None:
    rng, queues = Random(seed), DueQueues()
    for _ in range(60):
        request = str(rng.randrange(12))
        if rng.random() < 0.6:
            queues.add(request, rng.choice(["west", "east"]), rng.random(), rng.random(), 1.0)
        else:
            queues.drop(request)
        for site in ("west", "east"):
            entries = queues.at(site).entries
            assert entries == sorted(entries)
            assert queues.at(site).total_s == pytest.approx(sum(entry.prefill_s for entry in entries))
    for request in range(12):
        queues.drop(str(request))
        queues.drop(str(request))
    assert len(queues) == 0
    assert queues.at("west").entries == []
    assert queues.at("west").total_s == 0


def prices(**config: object) -> PricesPolicy:
    made = create_policy(
        PolicyConfig(name="prices", service="deadline", **config),
        Fleet({("", ""): NEAR}, frozenset({"west"})),
    )
    assert isinstance(made, PricesPolicy)
    return made


def seen(backlog_s: float = 0.0, *, east: int = 0, gbps: float = 100.0, now: float = 0.0) -> Snapshot:
    link = LinkId("east", "west")
    rate = gbps * 1e9
    return Snapshot(
        now,
        {
            "west": SiteObservation("west", now, 1, 5, prefill_backlog_s=backlog_s),
            "east": SiteObservation("east", now, east),
        },
        {link: LinkEstimate(link, now, rate, rate, rate, 0.04, up=gbps > 0)},
    )


def test_a_short_prompt_goes_before_a_long_one_that_has_time() -> None:
    chosen = prices()
    long = RequestView("long", 40_000, 0.0, home="west")
    first = chosen.decide(long, seen(), 0.0)
    chosen.on_dispatch(request=long, decision=first, now=0.0)
    short = chosen.decide(RequestView("short", 1000, 0.0, home="west"), seen(7.5), 0.0)
    assert short.order_s is not None
    assert first.order_s is not None
    assert short.order_s < first.order_s
    assert short.predicted_ttft_s == pytest.approx(0.2, abs=0.05)


def test_what_cannot_be_in_time_goes_behind_and_is_served_or_is_shed_where_that_is_asked_for() -> None:
    late = RequestView("late", 5000, 0.0, home="west")
    decision = prices().decide(late, seen(50.0), 0.0)
    assert decision.action is Action.DISPATCH
    assert decision.deadline_s is not None
    assert decision.order_s == decision.deadline_s + K_BEHIND_S
    assert "behind" in decision.reason
    assert prices(shed=True).decide(late, seen(50.0), 0.0).action is Action.SHED


def test_what_was_given_up_does_not_hold_up_what_can_be_in_time() -> None:
    chosen = prices()
    given_up = RequestView("late", 60_000, -50.0, home="west")
    chosen.on_dispatch(request=given_up, decision=chosen.decide(given_up, seen(), 0.0), now=0.0)
    fresh = chosen.decide(RequestView("fresh", 5000, 0.0, home="west"), seen(11.0), 0.0)
    assert fresh.order_s == fresh.deadline_s
    assert fresh.predicted_ttft_s == pytest.approx(0.96, abs=0.1)


def test_a_dead_link_leaves_the_local_path_whatever_is_late() -> None:
    decision = prices().decide(RequestView("r", 20_000, 0.0, home="west"), seen(80.0, east=4, gbps=0.0), 0.0)
    assert decision.prefill_site == "west"
    assert [path.why_not for path in decision.alternatives] == ["link down"]


def test_a_first_token_is_due_as_soon_whichever_site_holds_what_is_cached_of_the_prompt() -> None:
    made = create_policy(PolicyConfig(name="prices"), Fleet({("", ""): NEAR}, frozenset({"west"})))
    assert isinstance(made, PricesPolicy)
    new = made.deadline_s(RequestView("a", 40_000, 3.0, home="west"))
    at_home = made.deadline_s(RequestView("a", 40_000, 3.0, home="west", cached_tokens={"west": 39_000}))
    away = made.deadline_s(
        RequestView("a", 40_000, 3.0, home="west", cached_tokens={"west": 500, "east": 39_000})
    )
    assert at_home == away == pytest.approx(3.0 + 2.0 + 2 * NEAR.prefill_s(40_000, 39_000))
    assert new > away + 5
