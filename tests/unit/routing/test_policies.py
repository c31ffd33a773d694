"""Every policy: answers whatever it is shown, avoids what failed, loses, duplicates and starves nothing."""

from __future__ import annotations

import os
import random
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Action, Decision
from prfaas.model.errors import UsageError
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
from prfaas.routing import Fleet, Policy, create_policy, policy_names, register_policy

NAMES = ["collocated", "homogeneous", "naive", "paper", "prices"]
K_LONG = bool(os.environ.get("PRFAAS_LONG_TESTS"))
"""Thousands of random cases instead of a hundred."""

NEAR = Profile("near", Curve.of([1000, 10000], [0.2, 1.9]), Curve.of([1000, 10000], [2e8, 4e8]))
FAR = Profile("far", Curve.of([1000, 10000], [0.1, 0.6]), Curve.of([1000, 10000], [2e8, 4e8]))


def fleet(*, movable: bool = False) -> Fleet:
    return Fleet({("west", ""): NEAR, ("", ""): FAR}, frozenset({"west"}), movable)


def policy(name: str, *, movable: bool = False, **config: object) -> Policy:
    return create_policy(PolicyConfig(name=name, **config), fleet(movable=movable))


def link(source: str = "east", gbps: float = 100.0, **more: object) -> LinkEstimate:
    rate = gbps * 1e9
    return LinkEstimate(LinkId(source, "west"), 0.0, rate, rate, rate, 0.04, up=gbps > 0, **more)  # type: ignore[arg-type]


def snapshot(
    *links: LinkEstimate, west: int = 3, east: int = 4, backlog_s: float = 0.0, now: float = 0.0
) -> Snapshot:
    sites = {
        "west": SiteObservation("west", now, west, 5, prefill_backlog_s=backlog_s),
        "east": SiteObservation("east", now, east),
    }
    return Snapshot(now, sites, {one.link: one for one in links})


def ask(chosen: Policy, tokens: int, seen: Snapshot, **more: object) -> Decision:
    return chosen.decide(RequestView("r", tokens, seen.now, home="west", **more), seen, seen.now)  # type: ignore[arg-type]


def test_the_five_are_there_and_names_are_unique() -> None:
    assert set(policy_names()) >= set(NAMES)  # an extension may have added its own
    with pytest.raises(UsageError, match="registered already"):
        register_policy("paper")(type(policy("paper")))
    with pytest.raises(UsageError, match="known: collocated, homogeneous"):
        policy("nonsense")


@pytest.mark.parametrize("name", ["collocated", "homogeneous"])
def test_some_never_offload(name: str) -> None:
    decision = ask(policy(name), 100_000, snapshot(link(), backlog_s=500.0))
    assert (decision.action, decision.prefill_site, decision.offloaded) == (Action.DISPATCH, "west", False)


def test_naive_offloads_even_the_shortest_and_stays_only_without_a_path() -> None:
    assert ask(policy("naive"), 200, snapshot(link())).prefill_site == "east"
    dead = ask(policy("naive"), 200, snapshot(link(gbps=0)))
    assert dead.prefill_site == "west"
    assert "link down" in dead.reason


# 30K in all, 10K cached locally, 25K at PrfaaS, t = 19.4K: the report's own example.
EXAMPLE = {"west": 10_000, "east": 25_000}


def test_the_reports_example_where_bandwidth_is_scarce_goes_out() -> None:
    decision = ask(
        policy("paper", movable=True, regime="scarce"), 30_000, snapshot(link()), cached_tokens=EXAMPLE
    )
    assert decision.prefill_site == "east"
    assert decision.cache_move is None
    assert decision.threshold_tokens == 19_400
    assert "20000 uncached" in decision.reason


def test_the_reports_example_where_bandwidth_is_abundant_stays_and_moves_the_cache() -> None:
    decision = ask(
        policy("paper", movable=True, regime="abundant"), 30_000, snapshot(link()), cached_tokens=EXAMPLE
    )
    assert decision.prefill_site == "west"
    move = decision.cache_move
    assert move is not None
    assert (move.source, move.target, move.tokens) == ("east", "west", 25_000)
    assert move.transfer_bytes == FAR.transfer_bytes(25_000, 10_000)
    assert decision.chosen.uncached_tokens == 5_000


def test_a_used_link_is_scarce_and_an_idle_one_abundant() -> None:
    chosen = policy("paper", movable=True, regime="auto")
    assert "abundant" in ask(chosen, 30_000, snapshot(link())).reason
    full = snapshot(link(backlog_bytes=20 * 10**9))
    assert "scarce" in ask(chosen, 30_000, full).reason


def test_what_another_site_holds_counts_only_where_it_can_be_moved() -> None:
    chosen = policy("paper", regime="abundant")
    decision = ask(chosen, 30_000, snapshot(link()), cached_tokens=EXAMPLE)
    assert "scarce" in decision.reason
    assert decision.prefill_site == "east"


def test_a_filling_link_raises_the_threshold_where_that_is_asked_for() -> None:
    full = snapshot(link(backlog_bytes=20 * 10**9))
    assert ask(policy("paper", raise_factor=3.0), 30_000, full).threshold_tokens == pytest.approx(58_200)
    assert ask(policy("paper"), 30_000, full).threshold_tokens == 19_400


def test_prices_keep_short_prompts_at_home_and_send_long_ones_out_when_home_is_busy() -> None:
    chosen = policy("prices")
    busy = snapshot(link(), backlog_s=12.0)
    assert ask(chosen, 100_000, busy).prefill_site == "east"
    assert ask(chosen, 100_000, snapshot(link(gbps=0.05))).prefill_site == "west"


def test_a_decision_says_why_and_what_else_there_was() -> None:
    decision = ask(policy("prices"), 50_000, snapshot(link(), backlog_s=3.0))
    (other,) = decision.alternatives
    assert {decision.prefill_site, other.prefill_site} == {"east", "west"}
    assert other.label in decision.reason
    chosen = decision.chosen
    assert chosen.ttft_s == pytest.approx(chosen.queue_s + chosen.move_s + chosen.prefill_s + chosen.tail_s)
    assert decision.deadline_s == pytest.approx(2.0 + 2 * NEAR.prefill_s(50_000))


def test_only_what_the_decode_side_lacks_is_sent() -> None:
    whole = ask(policy("naive"), 10_000, snapshot(link()))
    part = ask(policy("naive"), 10_000, snapshot(link()), decode_cached_tokens={"west": 5_000})
    assert whole.transfer_bytes == FAR.kv_bytes(10_000)
    assert part.transfer_bytes == FAR.transfer_bytes(10_000, 5_000)


def test_wire_time_that_prefill_hides_is_not_counted() -> None:
    """At 100 Gbit/s nothing but the last piece and the round trip is left; at 1 Gbit/s the wire rules."""
    fast = ask(policy("naive"), 40_000, snapshot(link(gbps=100))).chosen
    slow = ask(policy("naive"), 40_000, snapshot(link(gbps=1))).chosen
    assert fast.tail_s < 0.04 + fast.transfer_bytes * 8 / 100e9
    assert slow.ttft_s > slow.transfer_bytes * 8 / 1e9


def test_shedding_is_off_unless_asked_for_and_says_when_to_come_back() -> None:
    hopeless = snapshot(link(gbps=0), backlog_s=300.0)
    assert ask(policy("prices"), 1_000, hopeless).action is Action.DISPATCH
    shed = ask(policy("prices", shed=True), 1_000, hopeless)
    assert shed.action is Action.SHED
    assert shed.retry_after_s > 50
    assert ask(policy("prices", shed=True), 1_000, hopeless, attempt=1).action is Action.DISPATCH


def test_the_idlest_instance_with_the_longest_prefix_is_named() -> None:
    def one(name: str, backlog_s: float, role: Role = Role.PREFILL, **more: object) -> InstanceObservation:
        return InstanceObservation(name, "west", role, 0.0, prefill_backlog_s=backlog_s, **more)  # type: ignore[arg-type]

    listed = [
        one("a", 3.0),
        one("b", 1.0),
        one("c", 0.0, draining=True),
        one("d", 0.0, Role.DECODE, running=9, max_running=10),
        one("e", 0.0, Role.DECODE, running=9, max_running=90),
    ]
    seen = Snapshot(0.0, {"west": SiteObservation.of("west", listed, 0.0)}, {})
    plain = ask(policy("homogeneous"), 20_000, seen)
    assert (plain.prefill_instance, plain.decode_instance) == ("b", "e")
    cached = {"a": 19_000, "b": 0}
    warm = ask(policy("homogeneous"), 20_000, seen, instance_cached_tokens=cached)
    assert warm.prefill_instance == "a"


def test_dispatches_fill_the_gap_until_the_next_load_report() -> None:
    chosen = policy("homogeneous")
    seen = snapshot(now=0.0)
    first = ask(chosen, 10_000, seen)
    later = Snapshot(0.5, seen.sites, seen.links)
    chosen.on_dispatch(request=RequestView("r", 10_000, 0.0), decision=first, now=0.25)
    assert ask(chosen, 10_000, later).chosen.queue_s == pytest.approx((1.9 - 1.5) / 3)
    chosen.on_failed(request="r", site="west", reason="dead", now=0.5)
    assert ask(chosen, 10_000, later).chosen.queue_s == 0.0


def test_a_tenant_above_its_share_waits_behind_and_comes_back() -> None:
    chosen = policy("prices")
    seen = snapshot(link())
    for k in range(60):
        tenant = "greedy" if k % 10 else "modest"
        view = RequestView(str(k), 20_000, 0.0, home="west", tenant=tenant)
        chosen.on_dispatch(request=view, decision=chosen.decide(view, seen, 0.0), now=0.0)
    greedy = ask(chosen, 20_000, seen, tenant="greedy")
    modest = ask(chosen, 20_000, seen, tenant="modest")
    assert greedy.order_s > modest.order_s == modest.deadline_s
    assert greedy.order_s - greedy.deadline_s <= 10.0
    alone = Snapshot(1000.0, seen.sites, seen.links)
    assert ask(chosen, 20_000, alone, tenant="new").order_s is not None


def test_a_long_queue_keeps_requests_at_the_door_but_not_those_that_failed_before() -> None:
    chosen = policy("homogeneous", hold_above_s=2.0)
    assert ask(chosen, 20_000, snapshot(backlog_s=5.9)).action is Action.DISPATCH
    full = snapshot(backlog_s=9.0, now=10.0)  # 3 s for each of three instances
    held = ask(chosen, 20_000, full)
    assert (held.action, held.prefill_site) == (Action.HOLD, "west")
    assert held.until_s == pytest.approx(11.0)
    assert held.deadline_s is not None
    assert "1.00 s too much before west" in held.reason
    assert ask(chosen, 20_000, full, attempt=1).action is Action.DISPATCH
    assert ask(policy("homogeneous"), 20_000, full).action is Action.DISPATCH


def test_holding_at_the_door_serves_more_in_time_where_servers_serve_in_order_of_arrival(
    fluid: ModuleType,
) -> None:
    """Near its limit, at 100 Gbit/s; too small a limit would hide the queues that prices follow."""
    within = {}
    for hold_above_s in (None, 4.0):
        world = fluid.Fluid(fluid.make_policy("prices", hold_above_s=hold_above_s), 100.0)
        outcome = world.run(fluid.make_jobs(1500, 3.0, seed=3, burst=2.0))
        assert len(outcome.ttfts()) == 1500
        within[hold_above_s] = outcome.within_slo()
    assert within[4.0] > within[None] + 0.03


def test_several_sites_and_homes_each_find_their_way() -> None:
    sites = {
        "west": SiteObservation("west", 0.0, 2, 4, prefill_backlog_s=40.0),
        "south": SiteObservation("south", 0.0, 2, 4),
        "east": SiteObservation("east", 0.0, 4, prefill_backlog_s=80.0),
        "north": SiteObservation("north", 0.0, 4),
    }
    links = {
        LinkId(a, b): LinkEstimate(LinkId(a, b), 0.0, 1e11, 1e11, 1e11, 0.03)
        for a in ("east", "north")
        for b in ("west", "south")
    }
    many = Fleet({("", ""): NEAR}, frozenset({"west", "south"}))
    for name in NAMES:
        chosen = create_policy(PolicyConfig(name=name), many)
        seen = Snapshot(0.0, sites, links)
        anywhere = chosen.decide(RequestView("r", 30_000, 0.0), seen, 0.0)
        assert anywhere.action is Action.DISPATCH
        at_home = chosen.decide(RequestView("s", 30_000, 0.0, home="west"), seen, 0.0)
        assert at_home.decode_site == "west"
        if name in ("naive", "paper", "prices"):
            assert at_home.prefill_site == "north"


amounts = st.floats(0, 1e4) | st.sampled_from([0.0, 1e-9, 1e6])


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    now = draw(st.floats(0, 100))
    sites = {}
    for name in draw(st.sets(st.sampled_from(["west", "east", "north"]))):
        sites[name] = SiteObservation(
            name,
            now - draw(st.floats(0, 2)),
            draw(st.integers(0, 3)),
            draw(st.integers(0, 2)),
            prefill_backlog_s=draw(amounts),
            waiting_uncached_tokens=draw(st.integers(0, 10**7)),
        )
    links = {}
    for source in ("east", "north", "west"):
        for target in ("west", "east"):
            if source != target and draw(st.booleans()):
                rate = draw(st.sampled_from([0.0, 1.0, 1e6, 1e9, 1e11]))
                name = LinkId(source, target)
                links[name] = LinkEstimate(
                    name,
                    now,
                    rate,
                    rate,
                    rate,
                    draw(st.floats(0, 1)),
                    backlog_bytes=draw(st.integers(0, 10**12)),
                    up=draw(st.booleans()),
                    reserved_bps=draw(st.sampled_from([0.0, 1e9])),
                )
    return Snapshot(now, sites, links)


views = st.builds(
    RequestView,
    request=st.sampled_from("abc"),
    prompt_tokens=st.integers(1, 1_000_000),
    arrived_s=st.floats(0, 100),
    home=st.sampled_from([None, "west", "nowhere"]),
    cached_tokens=st.dictionaries(st.sampled_from(["west", "east", "gone"]), st.integers(-5, 2_000_000)),
    decode_cached_tokens=st.dictionaries(st.just("west"), st.integers(-5, 2_000_000)),
    tenant=st.sampled_from(["", "t", "u"]),
    slo_class=st.sampled_from(["", "unknown"]),
    deadline_s=st.none() | st.floats(-10, 200),
    excluded=st.frozensets(st.sampled_from(["west", "east"])),
    attempt=st.integers(0, 3),
)


@pytest.mark.parametrize("name", NAMES)
@given(
    st.lists(st.tuples(views, snapshots(), st.integers(0, 4)), max_size=12),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["arrival", "deadline"]),
)
@settings(max_examples=80)
def test_whatever_it_sees_it_answers_soundly(
    name: str, asked: list[tuple[RequestView, Snapshot, int]], movable: bool, shed: bool, service: str
) -> None:
    chosen = policy(name, movable=movable, shed=shed, service=service)
    now = 0.0
    for view, seen, then in asked:
        now = max(now, seen.now)
        decision = chosen.decide(view, seen, now)
        assert decision.request == view.request
        assert decision.reason
        if decision.action is Action.DISPATCH:
            path = decision.chosen
            assert path.feasible
            assert path.prefill_site not in view.excluded
            assert seen.sites[path.prefill_site].prefill_instances > 0
            assert path.link is None or seen.links[path.link].usable_bps > 0
            assert 0 <= path.ttft_s < float("inf")
            assert 0 < path.uncached_tokens <= view.prompt_tokens
            assert view.home is None or path.decode_site == view.home
            chosen.on_dispatch(request=view, decision=decision, now=now)
            hooks = [
                lambda view=view, now=now: chosen.on_prefill_done(request=view.request, now=now),
                lambda view=view, now=now: chosen.on_first_token(request=view.request, now=now),
                lambda view=view, now=now: chosen.on_refused(
                    request=view.request, reason="full", retry_after_s=1.0, now=now
                ),
                lambda view=view, now=now: chosen.on_failed(
                    request=view.request, site="east", reason="dead", now=now
                ),
            ]
            for hook in hooks[:then]:
                hook()
        elif decision.action is Action.NO_PATH:
            assert decision.chosen is None
            assert not any(path.feasible for path in decision.alternatives)
        else:
            assert decision.action is Action.SHED
            assert shed
            assert decision.retry_after_s > 0
    for view, _, _ in asked:
        chosen.on_finished(request=view.request, now=now)
        chosen.on_finished(request=view.request, now=now)
    assert len(chosen.book) == 0
    assert not any(chosen.book._coming_bytes.values())
    chosen.get_log_data()


@pytest.mark.timeout(600 if K_LONG else 20)
@pytest.mark.parametrize("name", NAMES)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.5, 2.0, 10.0, 100.0]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
    st.floats(0.2, 1.5),
    st.sampled_from([None, 0.5, 5.0]),
)
@settings(max_examples=500 if K_LONG else 20)
def test_no_request_is_lost_answered_twice_or_starved(
    fluid: ModuleType,
    name: str,
    seed: int,
    gbps: float,
    local: int,
    prfaas: int,
    by_deadline: bool,
    rps: float,
    hold_above_s: float | None,
) -> None:
    """Random sizes, rates and outages; the harness asserts that nothing is answered twice."""
    rng = random.Random(seed)
    steps = [(0.0, gbps)]
    for _ in range(rng.randrange(4)):
        steps.append((steps[-1][0] + rng.uniform(1, 60), rng.choice([0.0, gbps, gbps / 10])))
    steps.append((steps[-1][0] + 30.0, gbps))
    made = fluid.make_policy(name, hold_above_s=hold_above_s)
    world = fluid.Fluid(made, steps, local=local, prfaas=prfaas, by_deadline=by_deadline)
    jobs = fluid.make_jobs(80, rps, seed=seed, burst=2.0)
    outcome = world.run(jobs)
    assert len(outcome.jobs) == 80
    assert all(job.done_s is not None for job in outcome.jobs)
    near, far = fluid.profiles()
    work_s = sum(near.prefill_s(job.tokens) + far.kv_bytes(job.tokens) * 8 / (gbps * 1e9) for job in jobs)
    assert outcome.end_s <= jobs[-1].arrived_s + work_s + steps[-1][0] + 60
    assert len(made.book) == 0
