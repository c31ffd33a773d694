"""Two local clusters with one PrfaaS site between them: each converts its own instances, both at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from random import Random
from types import ModuleType

import pytest

from prfaas.config.policy import SlowLoopConfig
from prfaas.model.ids import LinkId
from prfaas.model.observations import InstanceObservation, LinkEstimate, Role, SiteObservation, Snapshot
from prfaas.routing import SlowLoop, StageMeter, Step, StepKind

K_CONFIG = SlowLoopConfig(dry_run=False, settle_s=60.0, drain_limit_s=100.0)
K_FALLS_S = 300.0
K_DRAIN_S = 25.0
K_SWITCH_S = 15.0
K_END_S = 3000


@dataclass
class Cluster:
    """Eight instances of the 1T case's local kind, and what their loop has asked for."""

    loop: SlowLoop
    meter: StageMeter
    stuck: bool = False
    """The first drain never ends."""
    roles: dict[str, Role] = field(default_factory=dict)
    steps: list[tuple[float, Step]] = field(default_factory=list)
    planned: list[int] = field(default_factory=list)
    """Of the PrfaaS site's instances, at each look."""
    under_way: tuple[float, Step] | None = None

    def observed(self, now: float) -> SiteObservation:
        listed = [
            InstanceObservation(name, self.loop.site, role, now, running=5, max_running=20)
            for name, role in self.roles.items()
        ]
        return SiteObservation.of(self.loop.site, listed, now)

    def on_step(self, step: Step, now: float) -> None:
        self.steps.append((now, step))
        if step.kind is not StepKind.RESUME:
            self.under_way = (now, step)
            return
        if "switched" in step.reason:
            self.roles[step.instance] = step.role
        else:
            self.stuck = False
        self.under_way = None

    def go_on(self, now: float) -> None:
        """What the shell does between looks."""
        site, begun = self.observed(now), self.under_way
        found = self.loop.overdue(site, now)
        if found is None and begun is not None:
            since_s, step = begun
            if step.kind is StepKind.DRAIN and now >= since_s + K_DRAIN_S and not self.stuck:
                found = self.loop.on_drained(step.instance, now)
            elif step.kind is StepKind.SWITCH and now >= since_s + K_SWITCH_S:
                found = self.loop.on_switched(step.instance, now)
        if found is not None:
            self.on_step(found, now)

    @property
    def split(self) -> tuple[int, int]:
        roles = list(self.roles.values())
        return roles.count(Role.PREFILL), roles.count(Role.DECODE)


def play(fluid: ModuleType, *, stuck: bool = False) -> dict[str, Cluster]:
    """Both clusters' links fall from 100 to 5 Gbit/s at the same second."""
    near, far = fluid.profiles()
    profiles = {"west": near, "south": near, "east": far}
    clusters = {
        name: Cluster(
            SlowLoop(name, K_CONFIG),
            StageMeter(name, profiles, 600.0),
            stuck and name == "south",
            {f"{name}{k}": Role.PREFILL if k < 3 else Role.DECODE for k in range(8)},
        )
        for name in ("west", "south")
    }
    far_off = [InstanceObservation(f"east{k}", "east", Role.PREFILL, 0.0) for k in range(8)]
    lengths = fluid.lengths(Random(1), 2 * K_END_S)
    meters = [one.meter for one in clusters.values()]
    for second in range(K_END_S):
        now, rate = float(second), 100e9 if second < K_FALLS_S else 5e9
        for meter in meters:
            for tokens in lengths[2 * second : 2 * second + 2]:
                meter.request(tokens, 0, now)
            meter.answered(25.6, now)
        links = {
            link: LinkEstimate(link, now, rate, rate, rate, 0.04)
            for link in (LinkId("east", "west"), LinkId("east", "south"))
        }
        sites = {name: one.observed(now) for name, one in clusters.items()}
        sites["east"] = SiteObservation.of("east", far_off, now)
        snapshot = Snapshot(now, sites, links)
        for name, cluster in clusters.items():
            cluster.meter.sample(snapshot)
            cluster.go_on(now)
            if not cluster.loop.due(now):
                continue
            loads, system = cluster.meter.loads(), cluster.meter.system(snapshot, meters)
            assert system is not None
            proposal = cluster.loop.look(cluster.observed(now), loads, system, now)
            assert proposal is not None
            cluster.planned.append(system.prfaas_instances)
            if proposal.step is not None:
                assert proposal.step.site == name
                cluster.on_step(proposal.step, now)
    return clusters


def out_of_service(cluster: Cluster) -> list[tuple[float, float]]:
    """From each drain to what ended it."""
    begun = [at_s for at_s, step in cluster.steps if step.kind is StepKind.DRAIN]
    ended = [at_s for at_s, step in cluster.steps if step.kind is StepKind.RESUME]
    assert len(begun) == len(ended)
    return list(zip(begun, ended, strict=True))


@pytest.mark.parametrize("stuck", [False, True])
def test_both_convert_at_once_one_instance_each_and_come_to_rest_where_one_alone_would(
    fluid: ModuleType, stuck: bool
) -> None:
    clusters = play(fluid, stuck=stuck)
    for name, cluster in clusters.items():
        assert cluster.split == (5, 3), "the 1T case's best at 5 Gbit/s"
        assert {step.instance for _, step in cluster.steps} <= set(cluster.roles)
        times = out_of_service(cluster)
        assert len(times) == (3 if stuck and name == "south" else 2)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))
        assert times[-1][1] < K_END_S - 1000, "and stays so"
        assert set(cluster.planned) == {4}, "of the eight that both can reach"
    west, south = (out_of_service(one)[0] for one in clusters.values())
    assert west[0] == south[0] > K_FALLS_S, "at once"
    assert south[1] - south[0] == (K_CONFIG.drain_limit_s if stuck else K_DRAIN_S + K_SWITCH_S)


def test_one_whose_drain_is_stuck_holds_the_other_up_in_nothing(fluid: ModuleType) -> None:
    assert play(fluid, stuck=True)["west"].steps == play(fluid)["west"].steps
