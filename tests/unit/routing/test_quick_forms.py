"""What is made quick in a decision answers as its plain form does."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
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
from prfaas.routing import duals as duals_module
from prfaas.routing.book import DispatchBook
from prfaas.routing.duals import DualPrices
from prfaas.routing.held import begins_behind_s
from prfaas.routing.instance_choice import Choice
from prfaas.routing.lanes import Lane
from prfaas.routing.paths import PathFinder
from prfaas.routing.prices import PricesPolicy
from prfaas.routing.steps import K_STEPS_MARGIN_S, Hold, Queued

K_PROFILE = Profile("unit", Curve.of([1000, 2000], [1.3, 2.3]), Curve.of([1000, 2000], [1e6, 2e6]))
K_WEST_EAST = LinkId("east", "west")


def plain_ends(lane: Lane, entries: list[Queued], at_s: float) -> list[float]:
    """Step by step: each takes what fits, and those that it ends are done at its end."""
    queue = [[one.tokens, one.work_s, one.start_up_s] for one in entries]
    ends: list[float] = []
    while len(ends) < len(queue):
        left, took_s, done, taken = float(lane.chunk_tokens), 0.0, 0, 0
        for one in queue[len(ends) :]:
            tokens, work_s, start_up_s = one
            if left <= 0 or taken >= lane.prefill_requests:
                break
            taken += 1
            if tokens > left:
                part_s = start_up_s + (work_s - start_up_s) * left / tokens
                one[:] = [tokens - left, work_s - part_s, 0.0]
                took_s, left = took_s + part_s, 0.0
            else:
                took_s, left, done = took_s + work_s, left - tokens, done + 1
        if len(ends) + done == len(queue):
            for given_up in lane.behind:
                if left <= 0 or taken >= lane.prefill_requests:
                    break
                taken += 1
                part = min(1.0, left / given_up.tokens)
                rest_s = given_up.work_s - given_up.start_up_s
                took_s += given_up.start_up_s + rest_s * part
                left -= given_up.tokens
        at_s += took_s
        ends += [at_s] * done
    return ends


def plain_place(lane: Lane, order_s: float, tokens: float, work_s: float, now: float) -> tuple[float, int]:
    """All ends with it, beside all without it."""
    begin_s = max(lane.ends_s, now) + lane.foreign_s
    at = sum(1 for one in lane.hopeful if one.order_s <= order_s)
    new = Queued(order_s, 0, "new", tokens, work_s, math.inf, min(0.3, work_s))
    before = plain_ends(lane, lane.hopeful, begin_s)
    ends = plain_ends(lane, [*lane.hopeful[:at], new, *lane.hopeful[at:]], begin_s)
    end_s = ends.pop(at)
    late = 0
    for place, one in enumerate(lane.hopeful):
        moved = ends[place] > before[place] + 1e-6
        late += moved and before[place] <= one.latest_s < ends[place] + K_STEPS_MARGIN_S
    return end_s, late


def lane_of(rng: Random, now: float) -> Lane:
    lane = Lane(rng.choice([300, 1000, 4000]), rng.choice([1, 2, math.inf, math.inf]))
    for serial in range(rng.randrange(7)):
        tokens = rng.choice([rng.randrange(1, 6000), lane.chunk_tokens])
        # Off the ends by more than sums of the same seconds in another order differ.
        latest_s = math.inf if rng.random() < 0.3 else now + rng.randrange(40) / 4 + 0.0371
        lane.add(
            Queued(rng.random(), serial, str(serial), tokens, 0.3 + tokens / 1000, latest_s, 0.3),
            now - rng.random(),
        )
    if rng.random() < 0.3:
        lane.report(rng.uniform(0.6, 5.0), now, now)
    lane.advance(now)
    return lane


@settings(max_examples=400)
@given(seed=st.integers(0, 1 << 40))
def test_a_place_in_a_queue_is_what_all_steps_one_by_one_say(seed: int) -> None:
    rng = Random(seed)
    lane, now = lane_of(rng, 10.0), 10.0
    for _ in range(4):
        order_s, tokens = rng.random(), rng.choice([rng.randrange(1, 6000), lane.chunk_tokens])
        work_s = 0.3 + tokens / 1000
        end_s, late = lane.place(order_s, tokens, work_s, now, 0.3)
        assert lane.end_s(order_s, tokens, work_s, now, 0.3) == end_s
        plain_s, plainly_late = plain_place(lane, order_s, tokens, work_s, now)
        assert end_s == pytest.approx(plain_s, abs=1e-9)
        assert late == plainly_late


@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 40))
def test_what_a_lane_keeps_of_its_queue_is_what_counting_says(seed: int) -> None:
    rng, now = Random(seed), 10.0
    lane = Lane(rng.choice([300, 1000]), rng.choice([1, 2, math.inf]))
    waiting: list[str] = []
    for serial in range(40):
        now += rng.expovariate(2)
        if waiting and rng.random() < 0.4:
            lane.drop(waiting.pop(rng.randrange(len(waiting))), now)
        else:
            order_s, tokens = rng.choice([1.0, 2.0, rng.random()]), rng.randrange(1, 4000)
            latest_s = rng.choice([math.inf, math.inf, now + 2])
            hold = rng.choice([None, Hold(0.02, 500.0, "west")])
            entry = Queued(order_s, serial, str(serial), tokens, 0.1 + tokens / 1000, latest_s, 0.1, hold)
            lane.add(entry, now)
            waiting.append(entry.request)
        lane.advance(now)
        queued = [*lane.hopeful, *lane.behind]
        assert lane.held == sum(one.hold is not None for one in queued)
        assert lane.held_s() == pytest.approx(sum(one.work_s for one in queued if one.hold is not None))
        assert lane.hopeful == sorted(lane.hopeful)
        assert lane.behind == sorted(lane.behind)
        hopeful_end_s = begins_behind_s(lane, -1.0, now)
        for order_s in (0.5, 1.0, 3.0):
            before_s = sum(one.work_s for one in lane.behind if one.order_s <= order_s)
            assert begins_behind_s(lane, order_s, now) == pytest.approx(hopeful_end_s + before_s, abs=1e-9)


@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 40))
def test_a_lane_looked_at_seldom_stands_where_one_stands_that_begins_each_step_singly(seed: int) -> None:
    seldom, often = lane_of(Random(seed), 10.0), lane_of(Random(seed), 10.0)
    until_s = 10.0 + Random(seed).uniform(0, 30)
    seldom.advance(until_s)
    while often.ends_s <= until_s and (often.step or often.hopeful or often.behind):
        often.step = []
        if not often._start(often.ends_s):  # the steps of a cut prompt as any other
            break
    for field in ("ends_s", "hopeful", "behind", "hopeful_s", "behind_s"):
        assert getattr(seldom, field) == getattr(often, field)
    assert [one.tokens for one in seldom.hopeful] == [one.tokens for one in often.hopeful]
    assert [one.work_s for one in seldom.hopeful] == [one.work_s for one in often.hopeful]


@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 40))
def test_ends_that_a_lane_keeps_while_a_cut_prompt_goes_on_are_those_found_anew(seed: int) -> None:
    rng, now = Random(seed), 10.0
    lane = lane_of(rng, now)
    lane.early_s = rng.choice([0.0, 0.03, 0.4])
    for serial in range(100, 130):
        if rng.random() < 0.3:
            tokens = rng.randrange(1, 9000)
            lane.add(Queued(rng.random(), serial, str(serial), tokens, 0.3 + tokens / 1000, 99.0, 0.3), now)
        if rng.random() < 0.1:
            lane.report(rng.uniform(0.6, 5.0), now, now)
        lane.look(now)  # perhaps before what is due by now has been advanced
        now += rng.expovariate(3)
        lane.advance(now)
        states: list[tuple[float, float, float, int]] = []
        anew = lane.walk(lane.hopeful, lane.first(now), states)
        assert lane.look(now) == pytest.approx(anew, abs=1e-9)
        for kept, found in zip(lane.states, states, strict=True):
            assert kept == pytest.approx(found, abs=1e-6)


def plain_choice(policy: PricesPolicy, asked: tuple[Any, ...]) -> Choice | None:
    """Every lane of every path looked at in full; where it was to go so far wins a draw."""
    request, paths, prices, lanes, snapshot, now, order_s, deadline_s, miss_s, other_miss_s, planned = asked
    chooser = policy.instances
    found: list[tuple[float, bool, Choice]] = []
    for path, price in zip(paths, prices, strict=True):
        if not path.feasible:
            continue
        start_up_s = policy.paths.costs(path.prefill_site, request.model).start_up_s
        for _, instance, lane in lanes[path.prefill_site]:
            tokens, own_s = chooser._own(request, path, instance)
            due = price
            if request.instance_cached_tokens:
                due = price * own_s / path.prefill_s if path.prefill_s > 0 else price
            end_s, delayed = lane.place(order_s, tokens, own_s, now, start_up_s)
            tail_s = chooser._tail_s(path, snapshot, end_s - now - own_s, own_s, tokens)
            ttft_s = end_s - now + path.move_s
            if path.prefill_site != path.decode_site:
                ttft_s += tail_s
            cost = ttft_s + due + other_miss_s * delayed
            late = now + ttft_s + K_STEPS_MARGIN_S > deadline_s
            if late:
                cost += miss_s
            wait_s, misses = end_s - now - own_s, late or delayed > 0
            choice = Choice(path, instance, wait_s, own_s, tokens, tail_s, due, cost, misses)
            found.append((cost, lane is not planned, choice))
    return min(found, key=lambda one: one[:2])[2] if found else None


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 40), bind=st.sampled_from(["start", "arrival"]))
def test_the_choice_among_instances_is_that_of_looking_at_each_in_full(seed: int, bind: str) -> None:
    rng, now = Random(seed), 0.0
    policy = create_policy(
        PolicyConfig.model_validate({"name": "prices", "service": "deadline", "bind": bind}),
        Fleet({("", ""): K_PROFILE}, frozenset({"west"}), movable=True),
    )
    assert isinstance(policy, PricesPolicy)
    quick, seen = policy.instances.in_time, []

    def both(*asked: Any) -> Choice | None:
        found = quick(*asked)
        assert found == plain_choice(policy, asked)
        seen.append(found)
        return found

    policy.instances.in_time = both  # type: ignore[method-assign]
    asked: dict[str, RequestView] = {}
    for number in range(40):
        now += rng.expovariate(2)
        asked[str(number)] = view_of(rng, str(number), now)
        for name in (str(number), *list(policy.recalls(now)[0])[:3]):
            view = asked[name]
            decision = policy.decide(view, snapshot_of(rng, now), now)
            if decision.planned:
                policy.on_hold(request=view, decision=decision, now=now)
            elif decision.chosen is not None:
                policy.on_dispatch(request=view, decision=decision, now=now)
        if rng.random() < 0.5:
            policy.on_prefill_done(request=str(rng.randrange(number + 1)), now=now)
    assert seen


@pytest.mark.timeout(60)  # 14 s of a slow core
@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 40))
def test_what_is_too_late_anywhere_is_decided_as_if_every_place_had_been_looked_at(seed: int) -> None:
    rng, now = Random(seed), 0.0
    fleet = Fleet({("", ""): K_PROFILE}, frozenset({"west"}))
    config = PolicyConfig(name="prices", service="deadline")
    quick, plain = create_policy(config, fleet), create_policy(config, fleet)
    assert isinstance(plain, PricesPolicy)
    plain._too_late = lambda *asked: False  # type: ignore[method-assign]
    views: dict[str, RequestView] = {}
    for number in range(60):
        now += rng.expovariate(3)
        views[str(number)] = replace(
            view_of(rng, str(number), now), arrived_s=now - rng.choice([0, 0, 5, 60])
        )
        recalled = list(quick.recalls(now)[0])
        assert recalled == list(plain.recalls(now)[0])
        for name in (*recalled, str(number)):
            seen = snapshot_of(rng, now)
            found, wanted = (policy.decide(views[name], seen, now) for policy in (quick, plain))
            for field in (
                "action",
                "prefill_instance",
                "decode_instance",
                "order_s",
                "deadline_s",
                "gives_up",
            ):
                assert getattr(found, field) == getattr(wanted, field)
            for policy, decision in ((quick, found), (plain, wanted)):
                if decision.planned:
                    policy.on_hold(request=views[name], decision=decision, now=now)
                elif decision.chosen is not None:
                    policy.on_dispatch(request=views[name], decision=decision, now=now)
        if rng.random() < 0.5:
            ended = str(rng.randrange(number + 1))
            for policy in (quick, plain):
                policy.on_prefill_done(request=ended, now=now)


def view_of(rng: Random, name: str, now: float) -> RequestView:
    tokens = rng.randrange(50, 12_000)
    if rng.random() < 0.6:
        return RequestView(name, tokens, now, home="west")
    held = {f"{site}-{k}": rng.randrange(tokens + 1) for site in ("west", "east") for k in range(3)}
    by_site = {site: max(held[name] for name in held if name.startswith(site)) for site in ("west", "east")}
    return RequestView(name, tokens, now, home="west", cached_tokens=by_site, instance_cached_tokens=held)


def snapshot_of(rng: Random, now: float) -> Snapshot:
    sites = {}
    for site in ("west", "east"):
        prefills = [
            InstanceObservation(
                f"{site}-{k}",
                site,
                Role.PREFILL,
                now,
                prefill_backlog_s=rng.choice([0.0, 0.0, 3.0]),
                chunk_tokens=1000,
                healthy=rng.random() < 0.95,
            )
            for k in range(3)
        ]
        decodes = [InstanceObservation("d", "west", Role.DECODE, now)] if site == "west" else []
        sites[site] = SiteObservation.of(site, [*prefills, *decodes], now)
    rate = rng.choice([1e8, 1e9, 1e10])
    both = (K_WEST_EAST, LinkId("west", "east"))
    return Snapshot(now, sites, {link: LinkEstimate(link, now, rate, rate, rate, 0.04) for link in both})


Options = list[tuple[int, float, int, float]]


def plain_steps(
    duals: DualPrices, asked: list[Options], capacity: list[float], sizes: list[float]
) -> list[float]:
    """The gradient's steps by request and path; the multipliers they lead to."""
    now = np.maximum(np.asarray(capacity), duals_module.K_NONE)
    size = len(now)
    nu, mean = duals._nu, duals._mean
    for step in sizes:
        used = np.zeros(size)
        for options in asked[-duals_module.K_WINDOW :]:
            costs = [
                prefill_s / now[site] * nu[site] + (bits / now[link] * nu[link] if link >= 0 else 0.0)
                for site, prefill_s, link, bits in options
            ]
            site, prefill_s, link, bits = options[costs.index(min(costs))]
            used[site] += min(prefill_s / now[site], duals_module.K_NEVER)
            if link >= 0:
                used[link] += bits / now[link]
        raised = np.zeros(size)
        for one in range(size):
            group = [other for other in range(size) if duals._root(other) == duals._root(one)]
            highest = max(used[other] for other in group)
            raised[one] = nu[one] * math.exp(step * used[one] / max(highest, 1e-12))
        for one in range(size):
            group = [other for other in range(size) if duals._root(other) == duals._root(one)]
            used[one] = max(raised[one] / sum(raised[other] for other in group), duals_module.K_LEAST)
        nu = used
        mean = duals_module.K_SMOOTH * mean + (1 - duals_module.K_SMOOTH) * nu
    found: list[float] = mean.tolist()
    return found


@pytest.mark.parametrize("requests", [90, 700])
@pytest.mark.parametrize("apart", [False, True])
def test_the_multipliers_are_those_of_steps_by_request_and_path(apart: bool, requests: int) -> None:
    rng = Random(5)
    duals, capacity = DualPrices(), [3.0, 4.0, 1e9] + ([2.0, 2.0] if apart else [])
    asked: list[Options] = []
    for number in range(requests):
        options = [(0, rng.uniform(0.1, 9), -1, 0.0), (1, rng.uniform(0.1, 4), 2, rng.uniform(1e8, 2e9))]
        if apart and number % 3 == 0:
            options = [(3, rng.uniform(0.1, 9), -1, 0.0), (4, rng.uniform(0.1, 4), -1, 0.0)]
        # The first have one path: the second comes as a surprise.
        asked.append(options[: rng.choice([1, 2, 2]) if number > 20 else 1])
        duals.observe(asked[-1])
        if number in (80, 300):
            duals.solve(capacity)
    first, last = duals_module.K_STEP
    few, many = duals_module.K_STEPS
    settled = requests > 2 * duals_module.K_WINDOW
    sizes = [last] * few if settled else np.geomspace(first, last, many).tolist()
    wanted = plain_steps(duals, asked, capacity, sizes)
    duals.solve(capacity)
    assert duals.multipliers == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 40))
def test_the_paths_of_a_new_prompt_are_those_predicted_one_by_one(seed: int) -> None:
    rng, now = Random(seed), 10.0
    slow = Profile("slow", Curve.of([1000, 2000], [2.6, 4.6]), K_PROFILE.kv)
    finder = PathFinder(
        Fleet({("west", ""): K_PROFILE, ("", ""): slow}, frozenset({"west", "south"})), DispatchBook()
    )
    for number in range(6):
        if number % 2 == 0:  # sites come and go
            snapshot = five_sites(rng, now)
        home = rng.choice([None, "west", "south", "gone"])
        view = RequestView(str(number), rng.choice([1, 500, 8192, 8193, 60_000]), now, home=home)
        plain = [
            finder.predict(view, snapshot, source, where, now)
            for where in finder.decode_sites(view, snapshot)
            for source in finder.sources(snapshot, where)
        ]
        assert finder.all_paths(view, snapshot, now) == plain
        if plain:
            finder.book.add(view.request, rng.choice(plain), now - rng.random())


def five_sites(rng: Random, now: float) -> Snapshot:
    """Some of them, in any order, with some links."""
    names = ["west", "south", "east", "north", "far"]
    rng.shuffle(names)
    sites = {
        name: SiteObservation(
            name,
            now - rng.random(),
            prefill_instances=rng.choice([0, 1, 4]),
            decode_instances=rng.choice([0, 2]),
            prefill_backlog_s=rng.choice([0.0, 7.0]),
            waiting_uncached_tokens=rng.choice([0, 0, 5000]),
        )
        for name in names
        if rng.random() < 0.9
    }
    links = {}
    for source in names:
        for home in names:
            if source != home and rng.random() < 0.8:
                rate = rng.choice([0.0, 1e8, 1e10])
                link = LinkId(source, home)
                backlog = rng.choice([0, 10_000_000])
                links[link] = LinkEstimate(
                    link, now, rate, rate, rate, 0.04, backlog_bytes=backlog, up=rng.random() < 0.9
                )
    return Snapshot(now, sites, links)
