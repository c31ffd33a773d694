"""The chain of baselines at equal hardware: collocated, homogeneous PD, naive offload, PrfaaS."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prfaas.planner import equations
from prfaas.planner.system import Plan, System, cut_at, plan_of


def homogeneous(system: System, instances: int) -> Plan:
    """Local instances alone, split into prefill and decode as is best: everything below the threshold.

    Raises ValueError for fewer than two instances.
    """
    if instances < 2:
        raise ValueError(f"a homogeneous cluster needs at least 2 instances, not {instances}")
    alone = system.changed(prfaas_instances=0, local_instances=instances)
    cut = cut_at(alone, system.lengths.high)
    plans = [plan_of(alone, cut, prefill) for prefill in range(1, instances)]
    return max(plans, key=lambda plan: plan.throughput_rps)


def naive(system: System) -> Plan:
    """Everything is offloaded, all local instances decode."""
    return plan_of(system, cut_at(system, 0.0), 0)


@dataclass(frozen=True)
class Collocated:
    """Prefill and decode in one engine."""

    instances: int
    throughput_rps: float
    """While decode steps take at most `decode_slowdown` times what they take on a decode instance."""
    no_interference_rps: float
    """If prefill didn't slow decode down at all: an upper bound, as of a split into parts of instances."""
    decode_slowdown: float


def collocated(system: System, instances: int) -> Collocated:
    """The same hardware without disaggregation (see equations.collocated_rps)."""
    prefill_s = system.local_prefill(system.lengths.mean)
    batch, step_s = system.decode.max_batch, system.decode.step_s()
    whole = equations.collocated_rps(instances, prefill_s, batch, step_s, system.output_tokens, math.inf)
    held = equations.collocated_rps(
        instances, prefill_s, batch, step_s, system.output_tokens, system.decode_slowdown
    )
    return Collocated(instances, held, whole, system.decode_slowdown)
