"""Late binding: what the door holds for an instance, when it is sent, and who gives way to whom."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Action, Decision
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
from prfaas.routing.held import K_YIELDS, Lanes, begins_s, first_due, make_room
from prfaas.routing.lanes import Lane
from prfaas.routing.prices import K_BEHIND_S, PricesPolicy
from prfaas.routing.steps import Hold, Queued

K_CHUNK = 1000
K_PROFILE = Profile("unit", Curve.of([1000, 2000], [1.3, 2.3]), Curve.of([1000, 2000], [1e6, 2e6]))
K_LINK = LinkId("east", "west")


def snapshot(now: float, *, west: int = 1, east: int = 0, link_up: bool = True) -> Snapshot:
    sites = {}
    for site, count in (("west", west), ("east", east)):
        listed = [
            InstanceObservation(f"{site}-{k}", site, Role.PREFILL, now, chunk_tokens=K_CHUNK)
            for k in range(count)
        ]
        decodes = [InstanceObservation("d", "west", Role.DECODE, now)] if site == "west" else []
        sites[site] = SiteObservation.of(site, [*listed, *decodes], now)
    return Snapshot(now, sites, {K_LINK: LinkEstimate(K_LINK, now, 1e11, 1e11, 1e11, 0.04, up=link_up)})


def policy(**config: object) -> PricesPolicy:
    made = create_policy(
        PolicyConfig.model_validate({"name": "prices", "service": "deadline", **config}),
        Fleet({("", ""): K_PROFILE}, frozenset({"west"})),
    )
    assert isinstance(made, PricesPolicy)
    return made


def ask(made: PricesPolicy, view: RequestView, seen: Snapshot, now: float) -> Decision:
    """As a shell does."""
    decision = made.decide(view, seen, now)
    if decision.planned:
        made.on_hold(request=view, decision=decision, now=now)
    elif decision.action is Action.DISPATCH:
        made.on_dispatch(request=view, decision=decision, now=now)
    return decision


def test_an_idle_instance_gets_a_request_at_once_and_a_busy_one_just_before_it_begins() -> None:
    made = policy()
    assert ask(made, RequestView("a", 1000, 0.0, home="west"), snapshot(0.0), 0.0).action is Action.DISPATCH
    view = RequestView("b", 1000, 0.0, home="west")
    held = ask(made, view, snapshot(0.0), 0.0)
    assert held.action is Action.HOLD
    assert held.prefill_instance == "west-0"
    assert "held until west-0 is about to begin it, in 1.31 s" in held.reason
    requests, at_s = made.recalls(0.0)
    assert list(requests) == []
    assert 1.2 < at_s < 1.31
    assert list(made.recalls(at_s)[0]) == ["b"]
    assert ask(made, view, snapshot(at_s), at_s).action is Action.DISPATCH
    assert made.recalls(at_s) == ([], math.inf)


def test_bound_at_arrival_all_is_sent_at_once() -> None:
    made = policy(bind="arrival")
    for number in range(9):
        view = RequestView(str(number), 3000, 0.0, home="west")
        assert ask(made, view, snapshot(0.0), 0.0).action is Action.DISPATCH


def test_an_instance_that_is_done_sooner_calls_what_is_held_for_it_at_once() -> None:
    made = policy()
    ask(made, RequestView("a", 1000, 0.0, home="west"), snapshot(0.0), 0.0)
    ask(made, RequestView("b", 1000, 0.0, home="west"), snapshot(0.0), 0.0)
    made.on_prefill_done(request="a", now=0.4)
    assert list(made.recalls(0.4)[0]) == ["b"]


def test_work_that_others_sent_holds_a_request_no_longer_than_it_takes_though_nothing_more_is_heard() -> None:
    made = policy()
    busy = SiteObservation.of(
        "west",
        [
            InstanceObservation("west-0", "west", Role.PREFILL, 0.0, prefill_backlog_s=3.0),
            InstanceObservation("d", "west", Role.DECODE, 0.0),
        ],
        0.0,
    )
    view = RequestView("a", 1000, 0.0, home="west")
    assert ask(made, view, Snapshot(0.0, {"west": busy}, {}), 0.0).action is Action.HOLD
    _, at_s = made.recalls(0.0)
    assert 2.8 < at_s < 3.0
    assert list(made.recalls(at_s)[0]) == ["a"]


@pytest.mark.parametrize(
    ("others_tokens", "action"), [(0, Action.DISPATCH), (4000, Action.HOLD), (None, Action.HOLD)]
)
def test_what_is_prefilled_and_still_crossing_is_not_taken_for_others_work(
    others_tokens: int | None, action: Action
) -> None:
    made = policy()
    ask(made, RequestView("a", 1000, 0.0, home="west"), snapshot(0.0), 0.0)
    # Its prefill ended at 1.3; that it hasn't been answered yet counts in the door's figure of the backlog.
    one = InstanceObservation(
        "west-0", "west", Role.PREFILL, 1.5, prefill_backlog_s=1.3, others_tokens=others_tokens
    )
    seen = SiteObservation.of("west", [one, InstanceObservation("d", "west", Role.DECODE, 1.5)], 1.5)
    view = RequestView("b", 1000, 1.5, home="west")
    assert ask(made, view, Snapshot(1.5, {"west": seen}, {}), 1.5).action is action


def test_a_held_request_goes_where_it_has_become_cheaper() -> None:
    made = policy()
    for name in ("a", "b"):
        ask(made, RequestView(name, 1000, 0.0, home="west"), snapshot(0.0, east=1), 0.0)
    view = RequestView("c", 1000, 0.0, home="west")
    first = ask(made, view, snapshot(0.0, east=1), 0.0)
    assert first.action is Action.HOLD
    other = {"west-0": "east-0", "east-0": "west-0"}[first.prefill_instance or ""]
    began = {"west-0": "a", "east-0": "b"}
    # The other instance is free much sooner than was reckoned.
    made.on_prefill_done(request=began[other], now=0.3)
    again = ask(made, view, snapshot(0.3, east=1), 0.3)
    assert (again.action, again.prefill_instance) == (Action.DISPATCH, other)
    assert len(made.lanes) == 2


def test_the_longest_that_is_held_gives_its_place_to_a_shorter_one_that_would_be_late() -> None:
    made = policy()
    ask(made, RequestView("a", 3000, 0.0, home="west"), snapshot(0.0), 0.0)
    long = RequestView("long", 4000, 0.0, home="west", deadline_s=8.0)
    assert ask(made, long, snapshot(0.0), 0.0).order_s == 8.0
    short = RequestView("short", 500, 0.1, home="west", deadline_s=8.1)
    found = ask(made, short, snapshot(0.1), 0.1)
    assert found.gives_up == ("long",)
    assert list(made.recalls(0.1)[0]) == ["long"]
    again = ask(made, long, snapshot(0.1), 0.1)
    assert again.order_s == pytest.approx(8.0 + K_BEHIND_S, abs=1e-3)
    assert made.recalls(0.1)[0] == []


def test_a_longer_one_takes_nobodys_place_and_what_was_sent_gives_none() -> None:
    made = policy()
    ask(made, RequestView("a", 3000, 0.0, home="west"), snapshot(0.0), 0.0)
    ask(made, RequestView("short", 500, 0.0, home="west", deadline_s=8.0), snapshot(0.0), 0.0)
    found = ask(made, RequestView("long", 5000, 0.0, home="west", deadline_s=8.1), snapshot(0.0), 0.0)
    assert found.gives_up == ()
    assert (found.order_s or 0.0) > 100  # behind
    sent = Lane(K_CHUNK)
    for number in range(2):
        sent.add(Queued(number, number, str(number), 3000, 3.3, 6.9, 0.3), 0.0)
    assert make_room(sent, 2.0, 100, 0.4, 7.0, 500.0, 0.0, 0.3) is None


def test_a_class_that_counts_for_more_is_not_asked_to_give_way() -> None:
    for miss_s, out in ((500.0, ["0"]), (1000.0, None)):
        lane = Lane(K_CHUNK)
        lane.add(Queued(0, 9, "runs", 1000, 1.3, 9.0, 0.3), 0.0)
        lane.add(Queued(1, 0, "0", 3000, 3.3, 6.0, 0.3, Hold(0.1, miss_s, "west")), 0.0)
        room = make_room(lane, 2.0, 500, 0.8, 4.0, 500.0, 0.0, 0.3)
        assert (room and [one.request for one in room[1]]) == out


def test_one_gives_way_so_often_and_no_more() -> None:
    lanes = Lanes()
    lane = lanes.lanes["a"] = Lane(K_CHUNK)
    for _ in range(K_YIELDS):
        assert lanes.yields("r")
        lanes.add("r", lane, 1.0, 500, 0.8, 9.0, 0.0, 0.3, Hold(0.1, 500.0, "west"))
        lanes.give_way("r", 0.0)
    assert not lanes.yields("r")
    lanes.forget("r", 0.0)
    assert lanes.yields("r")
    assert lanes.held() == 0


@pytest.mark.parametrize("what", ["instance", "link"])
def test_what_is_held_for_an_instance_that_is_gone_is_decided_anew_at_once(what: str) -> None:
    made = policy()
    for number in range(6):
        ask(made, RequestView(str(number), 2000, 0.0, home="west"), snapshot(0.0, east=2), 0.0)
    lanes = [made.lanes.lanes[f"east-{k}"] for k in range(2)]
    far = [one.request for lane in lanes for one in lane.hopeful if one.hold]
    assert far
    gone = snapshot(0.1, east=0) if what == "instance" else snapshot(0.1, east=2, link_up=False)
    ask(made, RequestView("new", 2000, 0.1, home="west"), gone, 0.1)
    assert set(far) <= set(made.recalls(0.1)[0])


def test_an_instance_that_comes_takes_what_is_held_for_others() -> None:
    made = policy()
    views = [RequestView(str(number), 2000, 0.0, home="west") for number in range(4)]
    for view in views:
        ask(made, view, snapshot(0.0), 0.0)
    ask(made, RequestView("new", 2000, 0.1, home="west"), snapshot(0.1, west=2), 0.1)
    assert list(made.recalls(0.1)[0]) == ["1", "2", "3"]
    named = {ask(made, view, snapshot(0.1, west=2), 0.1).prefill_instance for view in views[1:]}
    assert named == {"west-0", "west-1"}


def test_equals_are_sent_in_turn_and_none_is_put_behind_the_others_when_it_asks() -> None:
    made = policy()
    views = {str(k): RequestView(str(k), 500, 0.0, home="west", deadline_s=90.0) for k in range(20)}
    sent, asked, now = [], 0, 0.0
    for name in views:
        if ask(made, views[name], snapshot(0.0), 0.0).action is Action.DISPATCH:
            sent.append(name)
    while len(sent) < 20:
        requests, next_s = made.recalls(now)
        now = now if requests else next_s
        for name in requests:
            asked += 1
            if ask(made, views[name], snapshot(now), now).action is Action.DISPATCH:
                sent.append(name)
    assert sent == list(views)
    assert asked <= 25


def test_a_request_that_is_cancelled_leaves_no_plan_and_the_next_moves_up() -> None:
    made = policy()
    for name in ("a", "b", "c"):
        ask(made, RequestView(name, 1000, 0.0, home="west"), snapshot(0.0), 0.0)
    later_s = made.lanes.lanes["west-0"].look(0.0)[-1]
    made.on_finished(request="b", now=0.1)
    assert made.lanes.lanes["west-0"].look(0.1)[-1] < later_s - 1
    made.on_finished(request="c", now=0.2)
    made.on_finished(request="a", now=0.3)
    assert (len(made.lanes), made.lanes.held()) == (0, 0)
    assert made.recalls(0.3) == ([], math.inf)


def test_what_is_given_up_starves_at_no_door_whatever_else_comes() -> None:
    made = policy()
    late = RequestView("late", 3000, 0.0, home="west", deadline_s=0.5)
    ask(made, RequestView("a", 1000, 0.0, home="west"), snapshot(0.0), 0.0)
    assert ask(made, late, snapshot(0.0), 0.0).action is Action.HOLD
    now = 0.5 + K_BEHIND_S
    views = {"late": late}
    for number in range(40):
        views[str(number)] = RequestView(str(number), 400, now - 1, home="west", deadline_s=now + 50)
        ask(made, views[str(number)], snapshot(now - 1), now - 1)
    sent = []
    while requests := made.recalls(now)[0]:
        for name in requests:
            if ask(made, views[name], snapshot(now), now).action is Action.DISPATCH:
                sent.append(name)
    assert "late" in sent
    assert len(sent) < 5


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=100, deadline=None)
def test_the_first_held_is_due_its_lead_before_the_step_it_would_be_in(seed: int) -> None:
    rng, lane = Random(seed), Lane(K_CHUNK, Random(seed).choice([1, 2, math.inf]))
    for serial in range(rng.randrange(1, 7)):
        hold = Hold(0.1, 500.0, "west") if rng.random() < 0.6 else None
        tokens = rng.randrange(1, 3000)
        work_s = K_PROFILE.prefill_s(tokens)
        lane.add(Queued(rng.random(), serial, str(serial), tokens, work_s, 99.0, 0.3, hold), 0.0)
    held = [one for one in lane.hopeful if one.hold]
    first = first_due(lane, 0.0)
    if not held:
        assert first is None
        return
    assert first is not None
    lane.drop(held[0].request, 0.0)
    assert first == (pytest.approx(begins_s(lane, held[0].order_s, 0.0) - 0.1, abs=1e-9), held[0].request)


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_every_request_is_sent_once_in_a_bounded_number_of_decisions_and_nothing_is_left(seed: int) -> None:
    """Instances and links come and go, clients hang up, prefills end sooner or later than reckoned."""
    rng, made, now = Random(seed), policy(), 0.0
    views: dict[str, RequestView] = {}
    held, sent, asked, cancelled = set(), set(), dict.fromkeys(map(str, range(40)), 0), set()
    seen = snapshot(now, west=2, east=2)

    def decide(name: str) -> None:
        asked[name] += 1
        held.discard(name)
        decision = ask(made, views[name], seen, now)
        if decision.planned:
            held.add(name)
        elif decision.action is Action.DISPATCH:
            assert name not in sent
            sent.add(name)

    def settle() -> float:
        for _ in range(500):
            requests, next_s = made.recalls(now)
            if not requests:
                return next_s
            for name in requests:
                assert name in held, "recalled, and not held"
                decide(name)
        raise AssertionError("recalled for ever")

    for number in range(40):
        now += rng.expovariate(1.5)
        west, east = rng.choice([2, 2, 2, 1]), rng.choice([2, 2, 0])
        seen = snapshot(now, west=west, east=east, link_up=rng.random() < 0.9)
        name = str(number)
        views[name] = RequestView(name, rng.randrange(50, 5000), now, home="west")
        decide(name)
        if rng.random() < 0.5 and sent:
            made.on_prefill_done(request=rng.choice(sorted(sent)), now=now)
        if rng.random() < 0.1 and held:
            gone = rng.choice(sorted(held))
            held.discard(gone)
            cancelled.add(gone)
            made.on_finished(request=gone, now=now)
        settle()
    seen = snapshot(now, west=2, east=2)
    for _ in range(500):
        next_s = settle()
        if not held:
            break
        assert next_s > now, "nobody is due, and nobody will be"
        now = next_s
        seen = snapshot(now, west=2, east=2)
    assert held == set()
    assert sent | cancelled == set(views)
    assert max(asked.values()) <= 40
    assert sum(asked.values()) <= 8 * len(views)
    for name in views:
        made.on_finished(request=name, now=now)
    assert (len(made.lanes), made.lanes.held(), len(made.book)) == (0, 0, 0)


def test_what_is_bound_and_what_is_held_for_a_queue_are_one_or_the_other() -> None:
    with pytest.raises(ValueError, match="leave hold_above_s out, or set bind: arrival"):
        policy(bind="start", hold_above_s=3)
    policy(bind="arrival", hold_above_s=3)
    for bad in ({"bind": "late"}, {"lead_s": 0}, {"lead_s": 11}, {"lead_s": "soon"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            policy(**bad)


def test_what_comes_due_at_once_is_named_in_the_same_order_however_the_lanes_lie_in_memory() -> None:
    found = []
    kept = []
    for again in range(4):
        made = policy()
        kept += [made, *(Lane(K_CHUNK) for _ in range(7 * again))]  # others lie elsewhere
        for number in range(24):  # twelve run, and twelve are held
            ask(made, RequestView(str(number), 1000, 0.0, home="west"), snapshot(0.0, west=12), 0.0)
        for number in range(12):
            made.on_prefill_done(request=str(number), now=0.5)
        found.append(list(made.recalls(0.5)[0]))
        assert len(found[-1]) == 12
    assert all(one == found[0] for one in found)


def test_what_is_held_for_instances_that_go_is_recalled_in_the_order_of_their_names() -> None:
    made = policy()
    for number in range(24):
        ask(made, RequestView(str(number), 1000, 0.0, home="west"), snapshot(0.0, west=12), 0.0)
    held = {made.lanes.where(str(number)): str(number) for number in range(12, 24)}
    made.decide(RequestView("one more", 1000, 0.1, home="west"), snapshot(0.1, west=2), 0.1)
    gone = [held[made.lanes.lanes[f"west-{k}"]] for k in sorted(range(2, 12), key=str)]
    assert [one for one in made.recalls(0.1)[0] if one in gone] == gone


def test_a_request_that_failed_elsewhere_waits_at_the_door_too_and_takes_a_longer_one_s_place() -> None:
    made = policy()
    ask(made, RequestView("a", 3000, 0.0, home="west"), snapshot(0.0), 0.0)
    ask(made, RequestView("long", 4000, 0.0, home="west", deadline_s=8.0), snapshot(0.0), 0.0)
    failed = RequestView(
        "short", 500, 0.1, home="west", deadline_s=8.1, excluded=frozenset({"east"}), attempt=1
    )
    found = ask(made, failed, snapshot(0.1, east=1), 0.1)
    assert found.action is Action.HOLD
    assert found.gives_up == ("long",)
    assert found.prefill_site == "west"
