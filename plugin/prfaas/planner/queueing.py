"""Queues in front of prefill and on the link, approximated; times to first token that follow.

Assumed: Poisson arrivals, each path's instances fed from one queue in order of arrival, any instance takes
any request, prompts prefilled one at a time. Splitting Poisson arrivals by length leaves two Poisson streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prfaas.planner.system import System

Floats: TypeAlias = npt.NDArray[np.float64]


def erlang_c(servers: int, load: float) -> float:
    """C(k, a): probability that an arrival of an M/M/k queue waits, at an offered load a < k."""
    if not 0 <= load < servers:
        raise ValueError(f"load {load:g} is not below {servers} servers")
    blocked = 1.0  # Erlang B, by its recursion over the number of servers
    for k in range(1, servers + 1):
        blocked = load * blocked / (k + load * blocked)
    return servers * blocked / (servers - load * (1 - blocked))


@dataclass(frozen=True)
class Wait:
    """Time in a queue: none with probability 1 − `probability`, else exponential."""

    probability: float
    mean_s: float
    """Over all arrivals."""
    utilisation: float

    def above(self, seconds: Floats) -> Floats:
        """P(W > seconds), for each."""
        if self.mean_s > 0:
            late = self.probability * np.exp(-np.maximum(seconds, 0.0) * self.probability / self.mean_s)
        else:
            late = np.zeros_like(seconds)
        return np.where(seconds < 0, 1.0, late)


def constant_share(servers: int, utilisation: float) -> float:
    """Mean wait of M/D/k over that of M/M/k, by Cosmetatos (1975): a half at one server, more at several."""
    if servers == 1 or utilisation <= 0:
        return 0.5
    excess = (1 - utilisation) * (servers - 1) * (math.sqrt(4 + 5 * servers) - 2)
    return min(1.0, 0.5 * (1 + excess / (16 * utilisation * servers)))


def mgk_wait(servers: int, rate_rps: float, service_s: Floats, arrivals_scv: float = 1.0) -> Wait:
    """G/G/k: between M/D/k and M/M/k by the service times' squared coefficient of variation c_s².

    M/M/k is exact, M/D/k Cosmetatos's. Between them Kimura (1986): (1 + c²) / (2 c² / W_M + (1 − c²) / W_D);
    beyond, Björklund and Elldin's c² W_M + (1 − c²) W_D. Other arrivals than Poisson's change the wait as
    Allen and Cunneen's factor does: (c_a² + c_s²) / (1 + c_s²). Exact for M/M/k and, in its mean, for M/G/1.

    `service_s`: service times of equal weight; `arrivals_scv` c_a²: squared coefficient of variation of the
    gaps, 1 for Poisson. Raises ValueError at a load of k.

    Mean waits of simulated M/G/k queues with 1 to 8 servers at loads of 0.5 and 0.75: within 10% for service
    times up to exponential's variation and for the two-phase hyperexponential ones tried (c² of 6), 20% for
    lognormal ones of c² 1.5, which two moments don't tell from others.
    """
    mean = float(service_s.mean())
    load = rate_rps * mean
    if rate_rps == 0:
        return Wait(0.0, 0.0, 0.0)
    waits = erlang_c(servers, load)
    scv = float(service_s.var()) / mean**2
    exponential = waits / (servers / mean - rate_rps)
    constant = exponential * constant_share(servers, load / servers)
    if scv <= 1:
        queued = (1 + scv) / (2 * scv / exponential + (1 - scv) / constant)
    else:
        queued = scv * exponential + (1 - scv) * constant
    queued *= (arrivals_scv + scv) / (1 + scv)
    return Wait(waits, queued, load / servers)


@dataclass(frozen=True, eq=False)
class PathTimes:
    """One path's share of the requests: times of prefill and of what follows, of equal weight; its queue."""

    share: float
    service_s: Floats
    after_s: Floats
    """Seconds from the end of prefill to the first token's leave to go: the end of the transfer."""
    wait: Wait

    def within(self, seconds: float) -> float:
        """P(TTFT ≤ seconds)."""
        return 1 - float(self.wait.above(seconds - self.service_s - self.after_s).mean())

    @property
    def mean_s(self) -> float:
        return self.wait.mean_s + float((self.service_s + self.after_s).mean())


@dataclass(frozen=True, eq=False)
class Ttft:
    """Time to first token over all paths."""

    paths: tuple[PathTimes, ...]

    def within(self, seconds: float) -> float:
        """P(TTFT ≤ seconds)."""
        return sum(path.share * path.within(seconds) for path in self.paths)

    @property
    def mean_s(self) -> float:
        return sum(path.share * path.mean_s for path in self.paths)

    def quantile_s(self, q: float) -> float:
        """The time that a share q of requests doesn't exceed, to a millisecond."""
        low, high = 0.0, 1.0
        while self.within(high) < q and high < 1e9:
            high *= 2
        while high - low > 5e-4:
            middle = (low + high) / 2
            low, high = (low, middle) if self.within(middle) >= q else (middle, high)
        return high


def cells_of_paths(
    system: System, threshold_tokens: float, count: int
) -> tuple[float, list[float], list[float]]:
    """p, and lengths of equal weight that stand for the long prompts and for the short ones."""
    lengths = system.lengths
    p = lengths.share_above(threshold_tokens)
    long = [lengths.quantile(1 - p + p * (i + 0.5) / count) for i in range(count)] if p > 0 else []
    short = [lengths.quantile((1 - p) * (i + 0.5) / count) for i in range(count)] if p < 1 else []
    return p, long, short


def transfer_tail_s(system: System, tokens: float, free_bps: float) -> float:
    """From the end of prefill to the last byte's arrival, on a link that gives this transfer `free_bps`.

    KV leaves chunk by chunk while prefill goes on; after it remain the last chunk and the state, or more
    where the link is slower than prefill; and half a round trip.
    """
    size = system.kv(tokens)
    last = size - system.kv(max(tokens - system.chunk_tokens, 0.0)) + system.state_bytes
    left = max(min(last, size), size - system.prfaas_prefill(tokens) * free_bps / 8)
    return system.rtt_s / 2 + 8 * left / free_bps


def zero_queue(system: System, threshold_tokens: float, count: int = 1000) -> Ttft:
    """Bare prefill times, as the report's TTFTs are: no queue, no transfer."""
    none = Wait(0.0, 0.0, 0.0)
    p, long, short = cells_of_paths(system, threshold_tokens, count)
    paths = []
    if long:
        paths.append(PathTimes(p, each(system.prfaas_prefill, long), np.zeros(len(long)), none))
    if short:
        paths.append(PathTimes(1 - p, each(system.local_prefill, short), np.zeros(len(short)), none))
    return Ttft(tuple(paths))


def ttft_at(system: System, threshold_tokens: float, prefill: int, rate_rps: float, count: int = 400) -> Ttft:
    """TTFT with queues, at a rate that every path can carry. Raises ValueError where one can't, saying which.

    The link is shared evenly by the transfers on it (processor sharing): one alone gets the rate, one among
    others on average what the load leaves, B · (1 − ρ).
    """
    p, long, short = cells_of_paths(system, threshold_tokens, count)
    paths = []
    if long:
        sent_bps = rate_rps * p * 8 * sum(map(system.kv, long)) / len(long)
        if not sent_bps < system.egress_bps:
            raise ValueError(
                f"the link can't carry {rate_rps:g} requests a second: {sent_bps / 1e9:.3g} Gbit/s"
            )
        free_bps = system.egress_bps - sent_bps
        service = each(system.prfaas_prefill, long)
        after = each(lambda tokens: transfer_tail_s(system, tokens, free_bps), long)
        wait = _wait("PrfaaS prefill", system.prfaas_instances, rate_rps * p, service)
        paths.append(PathTimes(p, service, after, wait))
    if short:
        service = each(system.local_prefill, short)
        wait = _wait("local prefill", prefill, rate_rps * (1 - p), service)
        paths.append(PathTimes(1 - p, service, np.zeros(len(short)), wait))
    return Ttft(tuple(paths))


def each(function: Callable[[float], float], lengths: Sequence[float]) -> Floats:
    """A function's value at each length."""
    return np.array([function(tokens) for tokens in lengths])


def _wait(name: str, servers: int, rate_rps: float, service_s: Floats) -> Wait:
    try:
        return mgk_wait(servers, rate_rps, service_s)
    except ValueError:
        mean = float(service_s.mean())
        raise ValueError(
            f"{name}: {servers} instances serve {servers / mean:.3g} of {rate_rps:.3g} requests a second"
        ) from None
