"""Runs around a simulation: the completion rate at saturation, and the highest rate within an SLO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prfaas.simulator.record import Record

K_RELATIVE_STEP = 0.01  # the search stops when the rate is known to a hundredth


def completion_rate_rps(record: Record, skip: float = 0.2) -> float:
    """Answers a second between the first and last fifth of all arrivals: start and drain left out."""
    arrival = np.frombuffer(record.arrival_s, dtype=np.float64)
    error = np.frombuffer(record.error, dtype=np.int16)
    if not len(arrival):
        return 0.0
    ended = arrival + np.frombuffer(record.e2e_s, dtype=np.float64)
    begin, end = np.quantile(arrival, skip), arrival.max()
    done = ((ended >= begin) & (ended < end) & (error == 0)).sum()
    return float(done / (end - begin)) if end > begin else 0.0


@dataclass(frozen=True)
class Found:
    """The highest rate that kept the SLO, and every rate that was tried."""

    rate_rps: float
    tried: tuple[tuple[float, bool], ...]


def highest_rate(keeps: Callable[[float], bool], low_rps: float, high_rps: float) -> Found:
    """Bisection between a rate taken to keep the SLO and one taken to break it.

    Stops when they are within K_RELATIVE_STEP of each other. `keeps(rate)` runs the system at that rate.
    """
    tried: list[tuple[float, bool]] = []
    while high_rps - low_rps > K_RELATIVE_STEP * low_rps:
        rate = (low_rps + high_rps) / 2
        kept = keeps(rate)
        tried.append((rate, kept))
        if kept:
            low_rps = rate
        else:
            high_rps = rate
    return Found(low_rps, tuple(tried))
