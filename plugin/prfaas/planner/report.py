"""Everything `prfaas plan` says of a case, as one plain mapping: printed, written as JSON, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from prfaas.config.case import CaseConfig, SitesCaseConfig, TableCaseConfig
from prfaas.model.lengths import Lengths
from prfaas.planner import curves
from prfaas.planner.baselines import collocated, homogeneous, naive
from prfaas.planner.build import clusters_of, prices_of, rows_of, system_of
from prfaas.planner.capacity import Impossible, Slo, instances_for, link_needed
from prfaas.planner.cost import Prices, cost_per_request
from prfaas.planner.kv_table import egress_bps, table_of_profile
from prfaas.planner.optimum import best_threshold, optimum
from prfaas.planner.published import compare
from prfaas.planner.queueing import ttft_at, zero_queue
from prfaas.planner.sensitivity import sensitivity
from prfaas.planner.sites import plan_sites
from prfaas.planner.system import Plan, System, evaluate

K_LOADS = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # shares of Λ_max at which queues are shown
K_LINK_LOADS = (0.5, 0.75, 0.9, 1.0)
K_CLUSTER_GPUS = (512, 10_000)

Mapping = dict[str, Any]


def choose(system: System, threshold_tokens: float | None, prefill: int | None) -> Plan:
    """The plan asked for: what is given is held, the rest is chosen."""
    if threshold_tokens is not None and prefill is not None:
        return evaluate(system, threshold_tokens, prefill)
    if threshold_tokens is not None:
        plans = [evaluate(system, threshold_tokens, n) for n in range(system.local_instances)]
        return max(plans, key=lambda plan: plan.throughput_rps)
    if prefill is not None:
        return best_threshold(system, prefill)
    return optimum(system)


def plan_result(system: System, plan: Plan) -> Mapping:
    """A plan in the output's terms; TTFTs are bare prefill times."""
    times = zero_queue(system, plan.threshold_tokens)
    return {
        "throughput_rps": plan.throughput_rps,
        "threshold_tokens": plan.threshold_tokens,
        "prefill": plan.prefill,
        "decode": plan.decode,
        "offloaded_share": plan.offloaded_share,
        "l_long_tokens": plan.l_long_tokens,
        "l_short_tokens": plan.l_short_tokens,
        "prfaas_rps": plan.prfaas_rps,
        "local_prefill_rps": plan.local_prefill_rps,
        "decode_rps": plan.decode_rps,
        "egress_gbps": plan.egress_bps / 1e9,
        "ttft_mean_s": times.mean_s,
        "ttft_p90_s": times.quantile_s(0.9),
        "limited_by": plan.limited_by,
    }


def homogeneous_result(system: System) -> Mapping | None:
    """Local instances alone, as many as cost the same; None where the case doesn't say how many."""
    if system.homogeneous_instances is None:
        return None
    plan = homogeneous(system, system.homogeneous_instances)
    return plan_result(system, plan) | {"threshold_tokens": None}


def naive_result(system: System) -> Mapping | None:
    """Everything offloaded. `prefill` counts PrfaaS instances, as no local one prefills."""
    if not system.prfaas_instances or not system.egress_bps:
        return None
    return plan_result(system, naive(system)) | {
        "threshold_tokens": None,
        "prefill": system.prfaas_instances,
    }


def extrapolations(system: System, lengths: Sequence[tuple[str, float | None]]) -> list[str]:
    """Which figures lie beyond a profile's points, in words."""
    said = []
    for name, tokens in lengths:
        if tokens is None:
            continue
        for curve, of in (
            ((system.prfaas_prefill, "prfaas.profile prefill_s"), (system.kv, "prfaas.profile KV"))
            if name == "l_long"
            else ((system.local_prefill, "local.profile prefill_s"),)
        ):
            if not curve.covers(tokens):
                said.append(
                    f"{of} at {name} = {tokens:.0f} tokens lies beyond its points, {curve.x[0]:g} to "
                    f"{curve.x[-1]:g}: the end segment's slope is continued"
                )
    return said


def report(
    case: CaseConfig,
    lengths: Lengths,
    threshold_tokens: float | None = None,
    prefill: int | None = None,
    slo: Slo | None = None,
    slo_rate_rps: float | None = None,
) -> Mapping:
    """The whole answer for one PrfaaS and one local cluster. `slo` and its rate override the case's.

    Raises ValueError for a split that leaves no decode instance.
    """
    system = system_of(case, lengths)
    plan = choose(system, threshold_tokens, prefill)
    result = plan_result(system, plan)
    alone, everything = homogeneous_result(system), naive_result(system)
    result["chosen"] = [
        name for name, given in (("threshold", threshold_tokens), ("prefill", prefill)) if given is None
    ]
    result["extrapolated"] = extrapolations(
        system,
        [
            ("l_long", plan.l_long_tokens),
            ("l_short", plan.l_short_tokens),
            *([("the mean length (homogeneous)", system.lengths.mean)] if alone else []),
        ],
    )
    result["solved_back"] = list(case.solved_back)
    result["homogeneous"], result["naive"] = alone, everything
    result["collocated"] = (
        asdict(collocated(system, system.homogeneous_instances)) if system.homogeneous_instances else None
    )
    result["ratios"] = {
        "homogeneous": plan.throughput_rps / alone["throughput_rps"] if alone else None,
        "naive": plan.throughput_rps / everything["throughput_rps"] if everything else None,
    }
    ours = {"prfaas_pd": result, "homogeneous": alone, "naive": everything}
    result["published"] = [asdict(row) for row in compare(case, system, ours)]
    result["kv_throughput"] = _kv_throughput(system, case.prfaas.gpus)
    result["queueing"] = queueing_rows(system, plan)
    result["sensitivity"] = [asdict(row) for row in sensitivity(system, plan)]
    result["link_needed"] = link_rows(system)
    prices = prices_of(case)
    result["cost"] = cost_rows(system, plan, prices)
    result["sizing"] = sizing_result(case, system, prices, slo, slo_rate_rps)
    result["curves"] = {
        "threshold": [asdict(point) for point in curves.over_threshold(system, plan.prefill)],
        "split": [asdict(point) for point in curves.over_split(system, plan.threshold_tokens)],
        "bandwidth": [asdict(point) for point in curves.over_bandwidth(system, plan)],
    }
    return result


def _kv_throughput(system: System, gpus: int) -> list[Mapping]:
    """Φ at the KV profile's lengths, and what clusters send."""
    lengths = system.kv.x
    return [
        {
            "tokens": tokens,
            "kv_throughput_gbps": value / 1e9,
            "egress_gbps": {str(n): n / gpus * value / 1e9 for n in K_CLUSTER_GPUS},
        }
        for tokens, value in zip(
            lengths, table_of_profile(system.prfaas_prefill, system.kv, lengths), strict=True
        )
    ]


def queueing_rows(system: System, plan: Plan, loads: Sequence[float] = K_LOADS) -> list[Mapping]:
    """TTFT with queues at some shares of Λ_max; `unstable` says why where there is none.

    Λ_max is evaluated at mean lengths; the queues see the whole distribution, so a path can be full a little
    below it.
    """
    rows: list[Mapping] = []
    for load in loads:
        rate = load * plan.throughput_rps
        row: Mapping = {"load": load, "rate_rps": rate}
        try:
            times = ttft_at(system, plan.threshold_tokens, plan.prefill, rate)
        except ValueError as error:
            rows.append(row | {"unstable": str(error)})
            continue
        row |= {
            "ttft_mean_s": times.mean_s,
            "ttft_p50_s": times.quantile_s(0.5),
            "ttft_p90_s": times.quantile_s(0.9),
            "ttft_p99_s": times.quantile_s(0.99),
            "utilisation": [path.wait.utilisation for path in times.paths],
            "mean_wait_s": [path.wait.mean_s for path in times.paths],
        }
        rows.append(row)
    return rows


def link_rows(system: System) -> list[Mapping]:
    """The least link for some shares of what the two clusters do on an unlimited one, and for equalling the
    homogeneous cluster."""
    most = optimum(system.changed(egress_bps=1e18)).throughput_rps
    wanted = [(f"{share:.0%} of what an unlimited link allows", share * most) for share in K_LINK_LOADS]
    if system.homogeneous_instances:
        alone = homogeneous(system, system.homogeneous_instances).throughput_rps
        wanted.append(("as much as the homogeneous cluster", alone))
    rows = []
    for name, rate in wanted:
        # A hair less than the optimum itself, which rounding may put out of reach.
        need = link_needed(system, min(rate, most * (1 - 1e-6)))
        rows.append({"for": name} | (asdict(need) if need else {"rate_rps": rate, "egress_bps": None}))
    return rows


def cost_rows(system: System, plan: Plan, prices: Prices) -> Mapping:
    """Cost of a request at each system's own Λ_max."""
    cost: Mapping = {
        "unit": prices.unit,
        "prfaas": cost_per_request(
            prices, system.prfaas_instances, system.local_instances, plan.throughput_rps, plan.egress_bps
        )
        if plan.throughput_rps > 0
        else None,
        "homogeneous": None,
        "naive": None,
    }
    if system.homogeneous_instances:
        alone = homogeneous(system, system.homogeneous_instances)
        cost["homogeneous"] = cost_per_request(prices, 0, system.homogeneous_instances, alone.throughput_rps)
    if system.prfaas_instances and system.egress_bps:
        all_out = naive(system)
        cost["naive"] = cost_per_request(
            prices,
            system.prfaas_instances,
            system.local_instances,
            all_out.throughput_rps,
            all_out.egress_bps,
        )
    return cost


def sizing_result(
    case: CaseConfig, system: System, prices: Prices, slo: Slo | None, rate_rps: float | None
) -> Mapping | None:
    """Instances for the SLO asked for, else the case's; None without one. An impossible SLO raises Impossible
    where it was asked for."""
    if slo is None and case.slo is not None:
        slo = Slo(case.slo.ttft_s, case.slo.quantile, case.slo.decode_utilisation, case.slo.link_utilisation)
        rate_rps = case.slo.rate_rps
    if slo is None or rate_rps is None:
        return None
    return {"slo": asdict(slo), "unit": prices.unit} | asdict(instances_for(system, rate_rps, slo, prices))


def sites_report(case: SitesCaseConfig, lengths: Sequence[Lengths]) -> Mapping:
    """The whole answer for several clusters. Raises ValueError where it serves nothing."""
    plan = plan_sites(*clusters_of(case, lengths))
    return {
        "throughput_rps": plan.throughput_rps,
        "local": [asdict(one) for one in plan.locals],
        "prfaas_utilisation": plan.prfaas_utilisation,
        "links": [
            {"source": link.source, "target": link.target, "gbps": link.gbps}
            | {"used_gbps": plan.link_gbps[(link.source, link.target)]}
            for link in case.links
        ],
        "worth": plan.worth,
    }


def table_report(case: TableCaseConfig) -> Mapping:
    """KV throughput of each model, the egress of clusters, and published derivations beside ours."""
    rows = rows_of(case)
    per = case.gpus_per_instance
    return {
        "tokens": list(case.tokens),
        "gpus_per_instance": per,
        "kv_throughput_gbps": {name: [v / 1e9 for v in row.kv_throughput_bps] for name, row in rows.items()},
        "kinds": {name: row.kind for name, row in rows.items()},
        "egress_gbps": {
            str(gpus): {
                name: [egress_bps(row, gpus, per, t) / 1e9 for t in case.tokens] for name, row in rows.items()
            }
            for gpus in K_CLUSTER_GPUS
        },
        "published": [
            {
                "model": one.model,
                "gpus": one.gpus,
                "tokens": one.tokens,
                "published_gbps": one.gbps,
                "below": one.below,
                "ours_gbps": (ours := egress_bps(rows[one.model], one.gpus, per, one.tokens) / 1e9),
                "ratio": ours / one.gbps,
            }
            for one in case.published_egress
        ],
    }


__all__ = ["Impossible", "report", "sites_report", "table_report"]
