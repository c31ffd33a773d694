from __future__ import annotations

import pytest

from prfaas.model.lengths import Constant, Empirical
from prfaas.model.profiles import Curve, DecodeProfile
from prfaas.planner.kv_table import KvRow, egress_bps
from prfaas.planner.optimum import optimum
from prfaas.planner.sites import Link, LocalCluster, PrfaasCluster, plan_sites
from prfaas.planner.system import System

K_SECOND = Curve((1000.0,), (1.0,))  # 1 s and 1 MB a thousand tokens
K_SIZE = Curve((1000.0,), (1e6,))
K_QUICK = DecodeProfile.constant(0.001, 1000)


def local(name: str, instances: int, **change: object) -> LocalCluster:
    fields: dict[str, object] = {
        "prefill": K_SECOND,
        "decode": K_QUICK,
        "lengths": Constant(1000),
        "output_tokens": 1.0,
        "rate_share": 1.0,
    }
    return LocalCluster(name, instances, **(fields | change))  # type: ignore[arg-type]


def test_one_of_each_agrees_with_the_two_cluster_model(system: System) -> None:
    for gbps in (100.0, 10.0, 5.0, 2.0):
        changed = system.changed(egress_bps=gbps * 1e9)
        two = optimum(changed)
        many = plan_sites(
            [PrfaasCluster("p", 4, system.prfaas_prefill, system.kv)],
            [
                LocalCluster(
                    "l", 8, system.local_prefill, system.decode, system.lengths, system.output_tokens, 1.0
                )
            ],
            [Link("p", "l", gbps * 1e9)],
        )
        # Cells see the curvature of the profile that the means don't, and no rule but the best.
        assert many.throughput_rps == pytest.approx(two.throughput_rps, rel=0.015)
        assert many.locals[0].prefill == two.prefill
        assert many.locals[0].threshold_tokens == pytest.approx(two.threshold_tokens, rel=0.12)


def test_two_senders_and_two_links_by_hand() -> None:
    # 4 local instances: 1 decodes (it could 1000), 3 prefill 3/s. `near` prefills 2/s, its link carries 1/s;
    # `far` prefills 1/s over a link for 5/s. 3 + 1 + 1.
    plan = plan_sites(
        [PrfaasCluster("near", 2, K_SECOND, K_SIZE), PrfaasCluster("far", 1, K_SECOND, K_SIZE)],
        [local("l", 4)],
        [Link("near", "l", 8e6), Link("far", "l", 40e6)],
        cells=4,
    )
    assert plan.throughput_rps == pytest.approx(5.0)
    one = plan.locals[0]
    assert (one.prefill, one.decode) == (3, 1)
    assert one.offloaded_share == pytest.approx(0.4)
    assert one.to == {"near": pytest.approx(0.2), "far": pytest.approx(0.2)}
    assert plan.prfaas_utilisation == {"near": pytest.approx(0.5), "far": pytest.approx(1.0)}
    assert plan.link_gbps[("near", "l")] == pytest.approx(0.008)
    # What limits has worth: near's link (125 req/s a Gbit/s), far's instances, local prefill; nothing else.
    assert plan.worth["link near>l"] == pytest.approx(125)
    assert plan.worth["prfaas far"] == pytest.approx(1)
    assert plan.worth["prefill l"] == pytest.approx(1)
    assert plan.worth["link far>l"] == pytest.approx(0)
    assert plan.worth["prfaas near"] == pytest.approx(0)


def test_a_shared_egress_limits_links_together() -> None:
    links = [Link("p", "a", 80e6), Link("p", "b", 80e6)]
    clusters = [local("a", 2), local("b", 2)]
    free = plan_sites([PrfaasCluster("p", 100, K_SECOND, K_SIZE)], clusters, links, cells=4)
    shared = plan_sites([PrfaasCluster("p", 100, K_SECOND, K_SIZE, 16e6)], clusters, links, cells=4)
    assert free.throughput_rps == pytest.approx(22)  # 10/s over each link, 1/s by each local instance
    assert shared.throughput_rps == pytest.approx(4)  # 2/s over both


def test_long_prompts_go_out_where_their_state_weighs_less() -> None:
    kv = Curve((1000.0, 5000.0), (10e6, 12e6))
    clusters = [local("l", 2, lengths=Empirical([1000, 5000]))]
    plan = plan_sites([PrfaasCluster("p", 100, K_SECOND, kv)], clusters, [Link("p", "l", 96e6)], cells=2)
    # 1/s of the link for the long half; local prefill has 1 s a second for the short half.
    assert plan.throughput_rps == pytest.approx(2.0)
    assert plan.locals[0].threshold_tokens == 5000


def test_fixed_roles_are_kept() -> None:
    plan = plan_sites([], [local("l", 4, prefill_instances=1)], [], cells=2)
    assert plan.throughput_rps == pytest.approx(1.0)
    assert plan.locals[0].decode == 3


def test_names_that_do_not_fit_are_refused() -> None:
    p = [PrfaasCluster("p", 1, K_SECOND, K_SIZE)]
    with pytest.raises(ValueError, match="two clusters are named p"):
        plan_sites(p, [local("p", 2)], [])
    with pytest.raises(ValueError, match="link from x"):
        plan_sites(p, [local("l", 2)], [Link("x", "l", 1e9)])
    with pytest.raises(ValueError, match="link to x"):
        plan_sites(p, [local("l", 2)], [Link("p", "x", 1e9)])
    with pytest.raises(ValueError, match="needs a local cluster"):
        plan_sites(p, [], [])


def test_a_system_that_serves_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="serves nothing"):
        plan_sites([], [local("l", 2, prefill_instances=0)], [])


def test_twenty_sites_and_thirty_links_are_planned() -> None:
    prfaas = [PrfaasCluster(f"p{i}", 3 + i, K_SECOND, K_SIZE) for i in range(8)]
    locals_ = [
        local(f"l{i}", 4 + i, rate_share=1.0 + i % 3, lengths=Empirical([500, 1000, 4000 + 100 * i]))
        for i in range(12)
    ]
    links = [Link(f"p{(i * 5) % 8}", f"l{i % 12}", 4e6 * (1 + i % 4)) for i in range(24)]
    unique = list({(link.source, link.target): link for link in links}.values())
    plan = plan_sites(prfaas, locals_, unique)
    assert plan.throughput_rps > 0
    for link in unique:
        assert plan.link_gbps[(link.source, link.target)] <= link.rate_bps / 1e9 * (1 + 1e-6)
    assert sum(one.rate_rps for one in plan.locals) == pytest.approx(plan.throughput_rps)


def test_the_table_gives_the_published_cluster_figures() -> None:
    row = KvRow("ring", "hybrid", (1024.0, 8192.0, 32768.0, 131072.0), (7.27e9, 4.47e9, 2.59e9, 1.46e9))
    assert egress_bps(row, 512, 8, 32768) == pytest.approx(170e9, rel=0.03)
    assert egress_bps(row, 512, 8, 131072) < 100e9
    assert egress_bps(row, 10_000, 8, 131072) == pytest.approx(1.8e12, rel=0.02)
    assert row.at(20_480) == pytest.approx((4.47e9 + 2.59e9) / 2)
    with pytest.raises(ValueError, match="outside the table"):
        row.at(500)
