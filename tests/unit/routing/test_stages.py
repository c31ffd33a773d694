"""What the slow loop is told: busyness of each stage, and the system that the traffic of late makes."""

from __future__ import annotations

import pytest

from prfaas.config.policy import SlowLoopConfig
from prfaas.model.ids import LinkId
from prfaas.model.observations import InstanceObservation, LinkEstimate, Role, SiteObservation, Snapshot
from prfaas.routing import SlowLoop, Stage, StageMeter

LINK = LinkId("east", "west")


class Linear:
    def prefill_s(self, tokens: float, /) -> float:
        return 0.01 + tokens / 1000

    def kv_bytes(self, tokens: float, /) -> float:
        return 1000 * tokens


def one(role: Role, number: int, site: str, **fields: object) -> InstanceObservation:
    return InstanceObservation(f"{site}-{role}{number}", site, role, 0.0, max_running=8, **fields)


def snapshot(now: float, *, running: int = 0, waiting_tokens: int = 0, up: bool = True) -> Snapshot:
    west = [one(Role.PREFILL, 0, "west", waiting_uncached_tokens=waiting_tokens)]
    west += [one(Role.DECODE, k, "west", running=running) for k in range(3)]
    east = [one(Role.PREFILL, 0, "east")]
    return Snapshot(
        now,
        {"west": SiteObservation.of("west", west, now), "east": SiteObservation.of("east", east, now)},
        {LINK: LinkEstimate(LINK, now, 8e6, 8e6, 8e6, 0.04, up=up)},
    )


@pytest.fixture
def meter() -> StageMeter:
    return StageMeter("west", {"west": Linear(), "east": Linear()}, window_s=100.0)


def test_busyness_is_the_mean_of_the_samples_and_starts_anew_at_each_look(meter: StageMeter) -> None:
    assert meter.loads() == []
    for now, running, waiting in ((0.0, 8, 2000), (1.0, 4, 0), (2.0, 0, 0), (3.0, 0, 0)):
        meter.sample(snapshot(now, running=running, waiting_tokens=waiting))
    found = {load.stage: load for load in meter.loads()}
    assert found[Stage.LOCAL_PREFILL].utilisation == pytest.approx(1 / 4)
    assert found[Stage.LOCAL_PREFILL].queue_s == pytest.approx(2.01 / 4)
    assert found[Stage.DECODE].utilisation == pytest.approx((1 + 0.5) / 4)
    assert found[Stage.OFFLOAD].utilisation == 0
    meter.sample(snapshot(4.0))
    assert all(load.utilisation == 0 for load in meter.loads())


def test_bytes_sent_fill_the_link(meter: StageMeter) -> None:
    meter.request(10, 1 << 30, 0.0)  # before the first sample: of no known second
    meter.sample(snapshot(0.0))
    meter.request(10, 500_000, 0.5)
    meter.sample(snapshot(1.0))
    assert meter.loads()[0].utilisation == pytest.approx(0.5)  # of 8 Mbit/s over a second


def test_the_system_is_the_traffic_of_late_and_the_servers_of_now(meter: StageMeter) -> None:
    assert meter.system(snapshot(0.0)) is None
    for k in range(10):
        meter.request(100 * (k + 1), 0, float(k))
        meter.answered(6.0, float(k))
    for _ in range(2):
        meter.sample(snapshot(9.0, running=4))
    meter.loads()
    system = meter.system(snapshot(10.0))
    assert system is not None
    assert system.lengths.mean == pytest.approx(550)
    assert system.output_tokens * system.decode.step_s() == pytest.approx(6.0), "a place is taken that long"
    assert system.decode.max_batch == 8
    assert (system.prfaas_instances, system.egress_bps, system.local_instances) == (1, 8e6, 4)
    assert system.local_prefill(2000.0) == pytest.approx(2.01, rel=1e-3)
    meter.request(50, 0, 150.0)
    meter.answered(1.0, 150.0)
    later = meter.system(snapshot(150.0, up=False))
    assert later is not None
    assert later.lengths.mean == 50, "what is older than the window is forgotten"
    assert (later.prfaas_instances, later.egress_bps) == (0, 0.0)


def test_the_loop_plans_from_it_and_only_convertible_instances_are_asked_to_change(meter: StageMeter) -> None:
    for k in range(50):
        meter.request(2000, 0, float(k))
        meter.answered(0.5, float(k))
    seen = snapshot(50.0, up=False)
    system = meter.system(seen)
    assert system is not None
    for convertible in ([], ["west-decode1"]):
        loop = SlowLoop("west", SlowLoopConfig(dry_run=False, patience=1))
        meter.sample(seen)
        assert loop.due(50.0)
        proposal = loop.look(seen.sites["west"], meter.loads(), system, 50.0, convertible)
        assert proposal is not None
        assert proposal.target is not None
        assert proposal.target.prefill > 1
        assert [proposal.step.instance if proposal.step else None] == (convertible or [None])


def test_clusters_share_a_prfaas_site_by_their_traffic_offloaded_or_not() -> None:
    profiles = {name: Linear() for name in ("west", "south", "east")}
    west, south = (StageMeter(home, profiles, window_s=100.0) for home in ("west", "south"))
    for k in range(60):
        west.request(1000, 10**6, float(k))
        if k % 3 == 0:
            south.request(1000, 0, float(k))
    for meter in (west, south):
        meter.answered(6.0, 60.0)
    sites = {name: SiteObservation(name, 60.0, 4, decode_instances=1, decode_slots=8) for name in profiles}
    for reached, wanted in (
        (("west", "south"), (3, 1)),
        (("west",), (4, 0)),
        (("south",), (0, 4)),
        ((), (0, 0)),
    ):
        links = {
            link: LinkEstimate(link, 60.0, 8e6, 8e6, 8e6, 0.04)
            for link in (LinkId("east", home) for home in reached)
        }
        systems = [one.system(Snapshot(60.0, sites, links), [west, south]) for one in (west, south)]
        assert tuple(one.prfaas_instances for one in systems if one is not None) == wanted
    alone = west.system(Snapshot(60.0, sites, links | {LINK: LinkEstimate(LINK, 60.0, 8e6, 8e6, 8e6, 0.04)}))
    assert alone is not None
    assert alone.prfaas_instances == 4
