"""The best threshold and split: a grid over (t, N_p), refined around the best threshold of each split.

At the optimum Θ_prfaas / p = Θ_pd-p / (1 − p) and, so far as whole instances allow,
Θ_prfaas + Θ_pd-p = Θ_pd-d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from prfaas.planner.system import Cut, Plan, System, cut_at, plan_of

K_GRID = 160
K_REFINED = 24
K_ROUNDS = 4


def thresholds(system: System, count: int = K_GRID) -> list[float]:
    """From "everything goes out" to "nothing does", even in the logarithm."""
    low, high = max(system.lengths.low, 1.0), max(system.lengths.high, 1.0)
    if low == high:
        return [0.0, high]
    step = math.log(high / low) / (count - 1)
    inner = [low * math.exp(step * i) for i in range(count - 1)]
    return [0.0, *inner, high]


def worth(plan: Plan) -> tuple[float, float]:
    """What is maximised: Λ_max; where that is equal (decode limits), the room that prefill leaves."""
    p = plan.offloaded_share
    room = min(
        plan.prfaas_rps / p if plan.prfaas_rps is not None and p > 0 else math.inf,
        plan.local_prefill_rps / (1 - p) if plan.local_prefill_rps is not None and p < 1 else math.inf,
    )
    return plan.throughput_rps, room


def best_threshold(system: System, prefill: int, cuts: list[Cut] | None = None) -> Plan:
    """The best threshold at N_p prefill instances. `cuts`: of the grid, where the caller has them."""
    grid = cuts if cuts is not None else [cut_at(system, t) for t in thresholds(system)]
    plans = [plan_of(system, cut, prefill) for cut in grid]
    place = max(range(len(plans)), key=lambda i: worth(plans[i]))
    best = plans[place]
    low = plans[max(place - 1, 0)].threshold_tokens
    high = plans[min(place + 1, len(plans) - 1)].threshold_tokens
    for _ in range(K_ROUNDS):
        step = (high - low) / K_REFINED
        finer = [plan_of(system, cut_at(system, low + step * i), prefill) for i in range(K_REFINED + 1)]
        best = max((best, *finer), key=worth)
        low, high = max(best.threshold_tokens - step, 0.0), best.threshold_tokens + step
    return best


def optimum(system: System, splits: Iterable[int] | None = None) -> Plan:
    """The best (t, N_p), N_p + N_d fixed; over some splits only, where they are given."""
    cuts = [cut_at(system, t) for t in thresholds(system)]
    choice = range(system.local_instances) if splits is None else splits
    # The grid decides which splits are worth refining: a cell's gain is at most its neighbours' difference.
    coarse = {n: max(worth(plan_of(system, cut, n)) for cut in cuts) for n in choice}
    if not coarse:
        raise ValueError("no split to choose from")
    leading = sorted(coarse, key=lambda n: coarse[n], reverse=True)[:3]
    return max((best_threshold(system, n, cuts) for n in leading), key=worth)
