"""The slow loop: patient, one conversion at a time, drained first, never the last of its role."""

from __future__ import annotations

from types import ModuleType

import pytest

from prfaas.config.policy import SlowLoopConfig
from prfaas.model.lengths import TruncatedLognormal
from prfaas.model.observations import InstanceObservation, Role, SiteObservation
from prfaas.model.profiles import DecodeProfile, RoleSwitch
from prfaas.planner.system import System
from prfaas.routing import SlowLoop, Stage, StageLoad, StepKind

LOADS = [StageLoad(Stage.OFFLOAD, 0.99, 3.0), StageLoad(Stage.DECODE, 0.6, 0.0)]


@pytest.fixture
def system(fluid: ModuleType) -> System:
    near, far = fluid.profiles()
    return System(
        lengths=TruncatedLognormal(9.90, 1.00, 128, 131072),
        output_tokens=1024,
        prfaas_instances=4,
        egress_bps=100e9,
        prfaas_prefill=far.prefill,
        kv=far.kv,
        local_instances=0,
        local_prefill=near.prefill,
        decode=DecodeProfile.constant(0.025, 20),
    )


def cluster(prefill: int, decode: int, at_s: float = 0.0) -> SiteObservation:
    roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode
    listed = [
        InstanceObservation(f"{role.value}{k}", "west", role, at_s, running=k) for k, role in enumerate(roles)
    ]
    return SiteObservation.of("west", listed, at_s)


def looks(loop: SlowLoop, site: SiteObservation, system: System, times: int, start_s: float = 0.0) -> list:
    told = [loop.look(site, LOADS, system, start_s + 30.0 * k) for k in range(times)]
    return [one for one in told if one is not None]


def test_at_the_optimum_nothing_changes(system: System) -> None:
    loop = SlowLoop("west", SlowLoopConfig(dry_run=False))
    proposals = looks(loop, cluster(3, 5), system, 10)
    assert all(one.step is None for one in proposals)
    assert proposals[-1].target.prefill == 3
    assert proposals[-1].here.threshold_tokens == pytest.approx(19_600, rel=0.05)
    assert proposals[-1].binding is Stage.OFFLOAD


def test_a_slow_link_turns_one_decode_instance_after_patience(system: System) -> None:
    """At 5 Gbit/s the optimum is 5/3: decode instances go over, one by one, the idlest first."""
    loop = SlowLoop("west", SlowLoopConfig(dry_run=False))
    slow = system.changed(egress_bps=5e9)
    first, second, third = looks(loop, cluster(3, 5), slow, 3)
    assert first.step is None
    assert second.step is None
    step = third.step
    assert (step.kind, step.role, step.instance) == (StepKind.DRAIN, Role.PREFILL, "decode3")
    assert third.target.prefill == 5
    assert loop.converting == "decode3"
    assert loop.look(cluster(3, 5), LOADS, slow, 130.0).step is None  # one at a time
    assert loop.on_drained("decode3", 140.0).kind is StepKind.SWITCH
    assert loop.on_switched("decode3", 141.0).kind is StepKind.RESUME
    assert loop.look(cluster(4, 4), LOADS, slow, 170.0) is None  # settles
    again = looks(loop, cluster(4, 4), slow, 3, start_s=210.0)
    assert again[-1].step.kind is StepKind.DRAIN


def test_a_passing_dip_changes_nothing(system: System) -> None:
    loop = SlowLoop("west", SlowLoopConfig(dry_run=False))
    for k in range(12):
        dip = system.changed(egress_bps=5e9 if k % 3 else 100e9)
        proposal = loop.look(cluster(3, 5), LOADS, dip, 30.0 * k)
        assert proposal is not None
        assert proposal.step is None


def test_a_small_gain_is_not_worth_a_conversion(system: System) -> None:
    loop = SlowLoop("west", SlowLoopConfig(dry_run=False, least_gain=5.0))
    assert all(one.step is None for one in looks(loop, cluster(3, 5), system.changed(egress_bps=5e9), 9))


def test_the_last_of_a_role_stays(system: System) -> None:
    loop = SlowLoop("west", SlowLoopConfig(dry_run=False))
    slow = system.changed(egress_bps=1e8, output_tokens=16)
    assert all(one.step is None for one in looks(loop, cluster(7, 1), slow, 9))
    assert looks(loop, cluster(0, 5), slow, 9, start_s=300.0)[-1].target is None


def test_a_dry_run_says_it_and_starts_nothing(system: System) -> None:
    loop = SlowLoop("west", SlowLoopConfig(dry_run=True))
    step = looks(loop, cluster(3, 5), system.changed(egress_bps=5e9), 3)[-1].step
    assert step.dry_run
    assert loop.converting is None
    assert loop.on_drained("decode3", 200.0) is None


def test_a_drain_that_does_not_end_is_given_up_and_not_tried_again_at_once(system: System) -> None:
    loop = SlowLoop("west", SlowLoopConfig(dry_run=False, drain_limit_s=120.0))
    slow = system.changed(egress_bps=5e9)
    looks(loop, cluster(3, 5), slow, 3)
    step = loop.look(cluster(3, 5), LOADS, slow, 200.0).step
    assert step.kind is StepKind.RESUME
    assert loop.converting is None
    assert loop.look(cluster(3, 5), LOADS, slow, 300.0) is None


def busy(requests: int, backlog_s: float, at_s: float) -> SiteObservation:
    """5 prefill instances, of which the last has so much, and the others more; and 3 for decode."""
    listed = [
        InstanceObservation(
            f"prefill{k}", "west", Role.PREFILL, at_s, running=1, waiting=requests - 1 + 9 * (4 - k),
            prefill_backlog_s=backlog_s + 90 * (4 - k),
        )
        for k in range(5)
    ]  # fmt: skip
    listed += [InstanceObservation(f"decode{k}", "west", Role.DECODE, at_s, running=20) for k in range(3)]
    return SiteObservation.of("west", listed, at_s)


def test_beyond_capacity_a_drain_lasts_as_long_as_something_ends(system: System) -> None:
    """At 100 Gbit/s 3/5 carries more than 5/3; each prefill instance has work for ten minutes and more."""
    config = SlowLoopConfig(dry_run=False, drain_limit_s=100.0, holds_s=1800.0)
    for stuck_from_s in (float("inf"), 400.0):
        loop = SlowLoop("west", config)
        steps = [loop.look(busy(60, 600.0, 30.0 * k), LOADS, system, 30.0 * k).step for k in range(3)]
        assert steps[-1].instance == "prefill4"
        assert "out for 300 s" in steps[-1].reason, "half of its ten minutes"
        gone_s = None
        for at_s in range(61, 661):
            left_s = 660.0 - min(at_s, stuck_from_s)
            step = loop.overdue(busy(max(1, round(left_s / 10)), left_s, at_s), float(at_s))
            gone_s = at_s if step is not None and gone_s is None else gone_s
        if stuck_from_s == float("inf"):
            assert gone_s is None
            assert loop.on_drained("prefill4", 661.0).kind is StepKind.SWITCH
            assert loop.on_switched("prefill4", 671.0).kind is StepKind.RESUME
            assert loop.out_of_service_s(Role.DECODE) == pytest.approx(10 + 601 / 2)
        else:
            assert gone_s == pytest.approx(stuck_from_s + 100.0, abs=1)
            assert loop.on_drained("prefill4", 661.0) is None


def test_a_refused_switch_puts_the_instance_back(system: System) -> None:
    loop = SlowLoop("west", SlowLoopConfig(dry_run=False))
    looks(loop, cluster(3, 5), system.changed(egress_bps=5e9), 3)
    loop.on_drained("decode3", 100.0)
    step = loop.on_failed("decode3", "instance is not idle", 101.0)
    assert step.kind is StepKind.RESUME
    assert "not idle" in step.reason
    assert loop.on_failed("decode3", "again", 102.0) is None


def test_a_conversion_that_does_not_pay_while_it_holds_is_left(system: System) -> None:
    """At 5 Gbit/s 5/3 carries 0.48 req/s more than 3/5's 1.77, but only once two instances have turned."""
    told = {}
    for out_s in (0.0, 60.0, 85.0):
        loop = SlowLoop("west", SlowLoopConfig(dry_run=False, holds_s=200.0), RoleSwitch(out_s, 0.0))
        told[out_s] = looks(loop, cluster(3, 5), system.changed(egress_bps=5e9), 3)[-1]
    gained = [told[out_s].gained for out_s in told]
    # What it has takes 28.6 s (an answer's 25.6, after 3.0 in prefill's queue), which count by half.
    assert gained == pytest.approx([0.478 * (200 - 2 * (out_s + 14.3)) for out_s in told], rel=0.03)
    assert [told[out_s].step is not None for out_s in told] == [True, True, False], "the last is below 5%"
    assert "out for 74.3 s, 25 requests more in 200 s" in told[60.0].step.reason


def test_the_last_conversion_tells_what_the_next_one_costs(system: System) -> None:
    """Its switch, and half of its drain: an instance that drains works on, on less and less."""
    loop = SlowLoop("west", SlowLoopConfig(dry_run=False), RoleSwitch(7.0, 9.0))
    looks(loop, cluster(3, 5), system.changed(egress_bps=5e9), 3)  # drains from 60 s on
    loop.on_drained("decode3", 80.0)
    loop.on_switched("decode3", 95.0)
    assert loop.out_of_service_s(Role.PREFILL) == 10.0 + 15.0
    assert loop.out_of_service_s(Role.DECODE) == 9.0
