"""Arrival times: endless, rising, from a process and a random.Random.

The same seed at another rate draws the same numbers, so two rates are compared on the same requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from prfaas.config.workload import AtOnce, Diurnal, Gamma, OnOff, Paced, Poisson

Process = Poisson | Paced | Gamma | OnOff | Diurnal | AtOnce


def arrival_times(process: Process, rng: Random) -> Iterator[float]:
    """Seconds of one arrival after the other, without end."""
    match process:
        case Poisson():
            return _renewals(rng, 1.0, 1.0 / process.rate_rps)
        case Gamma():
            # Gaps ~ Gamma(shape k, mean 1/rate): cv = 1 / sqrt(k).
            return _renewals(rng, 1.0 / process.cv**2, 1.0 / process.rate_rps)
        case Paced():
            return _paced(process.rate_rps)
        case OnOff():
            return _on_off(process, rng)
        case Diurnal():
            return _diurnal(process, rng)
        case AtOnce():
            return _zeros()


def _zeros() -> Iterator[float]:
    while True:
        yield 0.0


def _paced(rate_rps: float) -> Iterator[float]:
    count = 0
    while True:
        yield count / rate_rps
        count += 1


def _renewals(rng: Random, shape: float, mean_s: float) -> Iterator[float]:
    at = 0.0
    while True:
        at += rng.gammavariate(shape, mean_s / shape) if shape != 1.0 else rng.expovariate(1.0 / mean_s)
        yield at


def _on_off(process: OnOff, rng: Random) -> Iterator[float]:
    """Unit-rate exponentials, mapped through the inverse of the accumulated rate, phase by phase."""
    phases = Random(rng.getrandbits(64))

    def length_s(mean_s: float) -> float:
        return mean_s if process.lengths == "fixed" else phases.expovariate(1.0 / mean_s)

    on = True
    start, end, rate = 0.0, length_s(process.on_s), process.on_rps
    at = 0.0
    while True:
        due = rng.expovariate(1.0)
        while rate == 0.0 or at + due / rate > end:
            due -= (end - at) * rate
            on = not on
            start = at = end
            end = start + length_s(process.on_s if on else process.off_s)
            rate = process.on_rps if on else process.off_rps
        at += due / rate
        yield at


def _diurnal(process: Diurnal, rng: Random) -> Iterator[float]:
    """Thinning of a Poisson process at the peak rate."""
    keep = Random(rng.getrandbits(64))
    peak = process.mean_rps * (1.0 + process.amplitude)
    at = 0.0
    while True:
        at += rng.expovariate(peak)
        wave = math.sin(2.0 * math.pi * (at / process.period_s + process.phase))
        if keep.random() * peak < process.mean_rps * (1.0 + process.amplitude * wave):
            yield at
