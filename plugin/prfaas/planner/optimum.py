"""The best threshold and split: a grid over (t, N_p), refined around the best threshold of each split.

At the optimum Θ_prfaas / p = Θ_pd-p / (1 − p) and, so far as whole instances allow,
Θ_prfaas + Θ_pd-p = Θ_pd-d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prfaas.planner.system import Cut, Plan, System, cut_at, decode_limit_rps, plan_of

K_GRID = 96
K_REFINED = 8  # cells that the neighbourhood of the best is cut into, each round
K_ROUNDS = 7  # 4⁷ times finer than the grid
K_LEADING = 3  # splits that are refined


def thresholds(system: System, count: int = K_GRID) -> list[float]:
    """From "everything goes out" to "nothing does", even in the logarithm."""
    low, high = max(system.lengths.low, 1.0), max(system.lengths.high, 1.0)
    if low == high:
        return [0.0, high]
    step = math.log(high / low) / (count - 1)
    inner = [low * math.exp(step * i) for i in range(count - 1)]
    return [0.0, *inner, high]


def grid_of(system: System) -> list[Cut]:
    """The grid's cuts, for several searches over one system."""
    return [cut_at(system, threshold) for threshold in thresholds(system)]


def best_cut(system: System, prefill: int, grid: Sequence[Cut]) -> tuple[tuple[float, float], Cut]:
    """The best threshold at N_p prefill instances, with its worth."""
    decode_rps = decode_limit_rps(system, system.local_instances - prefill)

    def worth(cut: Cut) -> tuple[float, float]:
        return cut.worth(prefill, decode_rps)

    place = max(range(len(grid)), key=lambda i: worth(grid[i]))
    best = grid[place]
    low = grid[max(place - 1, 0)].threshold_tokens
    high = grid[min(place + 1, len(grid) - 1)].threshold_tokens
    for _ in range(K_ROUNDS):
        step = (high - low) / K_REFINED
        best = max(best, *(cut_at(system, low + step * i) for i in range(K_REFINED + 1)), key=worth)
        low, high = max(best.threshold_tokens - step, 0.0), best.threshold_tokens + step
    return worth(best), best


def best_threshold(system: System, prefill: int, grid: Sequence[Cut] | None = None) -> Plan:
    """The best plan at N_p prefill instances. `grid`: where the caller has it."""
    _, cut = best_cut(system, prefill, grid_of(system) if grid is None else grid)
    return plan_of(system, cut, prefill)


def optimum(system: System, grid: Sequence[Cut] | None = None) -> Plan:
    """The best (t, N_p), N_p + N_d fixed."""
    grid = grid_of(system) if grid is None else grid
    coarse: dict[int, tuple[float, float]] = {}
    for prefill in range(system.local_instances):
        decode_rps = decode_limit_rps(system, system.local_instances - prefill)
        coarse[prefill] = max(cut.worth(prefill, decode_rps) for cut in grid)
    leading = sorted(coarse, key=lambda n: coarse[n], reverse=True)[:K_LEADING]
    found = {prefill: best_cut(system, prefill, grid) for prefill in leading}
    best = max(found, key=lambda n: found[n][0])
    return plan_of(system, found[best][1], best)
