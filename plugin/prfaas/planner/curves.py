"""Curves over one input each: what figures are drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prfaas.planner.baselines import homogeneous, naive
from prfaas.planner.optimum import best_threshold, grid_of, optimum, thresholds
from prfaas.planner.system import Plan, System, cut_at, evaluate, plan_of


@dataclass(frozen=True)
class ThresholdPoint:
    """Λ_max at one threshold, and the three limits whose least it is; None: nothing takes that path."""

    threshold_tokens: float
    offloaded_share: float
    throughput_rps: float
    prfaas_limit_rps: float | None
    """Θ_prfaas / p."""
    local_limit_rps: float | None
    """Θ_pd-p / (1 − p)."""
    decode_limit_rps: float
    """Θ_pd-d."""
    egress_gbps: float


@dataclass(frozen=True)
class SplitPoint:
    """Λ_max at one N_p: at a held threshold and at the best one; producers and consumers at the held one."""

    prefill: int
    decode: int
    held_rps: float
    best_rps: float
    best_threshold_tokens: float
    prefill_limit_rps: float
    """min(Θ_prfaas / p, Θ_pd-p / (1 − p))."""
    decode_limit_rps: float


@dataclass(frozen=True)
class BandwidthPoint:
    """Λ_max at one link rate, for plans that adapt to it more or less."""

    egress_gbps: float
    optimum_rps: float
    optimum_threshold_tokens: float
    optimum_prefill: int
    best_threshold_rps: float
    """Split held, threshold chosen anew."""
    held_rps: float
    """Threshold and split held."""
    naive_rps: float
    homogeneous_rps: float | None


def over_threshold(system: System, prefill: int, count: int = 120) -> list[ThresholdPoint]:
    """Λ_max(t) at N_p."""
    points = []
    for threshold in thresholds(system, count)[1:]:
        plan = plan_of(system, cut_at(system, threshold), prefill)
        p = plan.offloaded_share
        points.append(
            ThresholdPoint(
                threshold_tokens=threshold,
                offloaded_share=p,
                throughput_rps=plan.throughput_rps,
                prfaas_limit_rps=plan.prfaas_rps / p if plan.prfaas_rps is not None and p > 0 else None,
                local_limit_rps=_local_limit(plan),
                decode_limit_rps=plan.decode_rps,
                egress_gbps=plan.egress_bps / 1e9,
            )
        )
    return points


def _local_limit(plan: Plan) -> float | None:
    if plan.local_prefill_rps is None or plan.offloaded_share >= 1:
        return None
    return plan.local_prefill_rps / (1 - plan.offloaded_share)


def over_split(system: System, threshold_tokens: float) -> list[SplitPoint]:
    """Λ_max(N_p), at N_p + N_d fixed."""
    grid = grid_of(system)
    points = []
    for prefill in range(1, system.local_instances):
        held = evaluate(system, threshold_tokens, prefill)
        best = best_threshold(system, prefill, grid)
        p = held.offloaded_share
        local = _local_limit(held)
        points.append(
            SplitPoint(
                prefill=prefill,
                decode=held.decode,
                held_rps=held.throughput_rps,
                best_rps=best.throughput_rps,
                best_threshold_tokens=best.threshold_tokens,
                prefill_limit_rps=min(
                    held.prfaas_rps / p if held.prfaas_rps is not None and p > 0 else math.inf,
                    math.inf if local is None else local,
                ),
                decode_limit_rps=held.decode_rps,
            )
        )
    return points


def over_bandwidth(
    system: System, plan: Plan, low_gbps: float = 0.5, high_gbps: float = 200.0, count: int = 28
) -> list[BandwidthPoint]:
    """Λ_max over the link's rate, even in the logarithm. `plan` has the threshold and split to hold."""
    alone = (
        homogeneous(system, system.homogeneous_instances).throughput_rps
        if system.homogeneous_instances
        else None
    )
    points = []
    for i in range(count):
        gbps = low_gbps * (high_gbps / low_gbps) ** (i / (count - 1))
        changed = system.changed(egress_bps=gbps * 1e9)
        grid = grid_of(changed)
        best = optimum(changed, grid)
        points.append(
            BandwidthPoint(
                egress_gbps=gbps,
                optimum_rps=best.throughput_rps,
                optimum_threshold_tokens=best.threshold_tokens,
                optimum_prefill=best.prefill,
                best_threshold_rps=best_threshold(changed, plan.prefill, grid).throughput_rps,
                held_rps=evaluate(changed, plan.threshold_tokens, plan.prefill).throughput_rps,
                naive_rps=naive(changed).throughput_rps,
                homogeneous_rps=alone,
            )
        )
    return points
