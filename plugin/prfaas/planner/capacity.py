"""What an operator asks before buying: which link does this rate need, how many instances does this SLO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prfaas.planner import equations
from prfaas.planner.cost import Prices
from prfaas.planner.optimum import thresholds
from prfaas.planner.queueing import (
    Floats,
    PathTimes,
    Ttft,
    cells_of_paths,
    each,
    mgk_wait,
    transfer_tail_s,
)
from prfaas.planner.system import System, decode_limit_rps


@dataclass(frozen=True)
class LinkNeed:
    """The least link that carries a rate, and the plan that needs no more."""

    rate_rps: float
    egress_bps: float
    """Without headroom: the link would be full."""
    threshold_tokens: float
    prefill: int
    offloaded_share: float


def link_needed(system: System, rate_rps: float) -> LinkNeed | None:
    """The least link with which the two clusters serve `rate_rps`; None where no link is enough.

    The less is offloaded, the less is sent: so each split takes the largest threshold at which its local
    prefill instances still keep up, and the best split is the one that then sends least.
    """
    best: LinkNeed | None = None
    for prefill in range(system.local_instances):
        if decode_limit_rps(system, system.local_instances - prefill) < rate_rps:
            continue
        threshold = _largest_threshold(system, rate_rps, prefill)
        share = system.lengths.share_above(threshold)
        long = system.lengths.mean_above(threshold)
        sent = 0.0
        if long is not None:
            if rate_rps * share * system.prfaas_prefill(long) > system.prfaas_instances:
                continue
            sent = equations.egress_bps(rate_rps, share, system.kv(long))
        if best is None or sent < best.egress_bps:
            best = LinkNeed(rate_rps, sent, threshold, prefill, share)
    return best


def _largest_threshold(system: System, rate_rps: float, prefill: int) -> float:
    """The largest t with λ · (1 − p) · T_prefill(l_short) ≤ N_p; 0 where even that is too much."""

    def load(threshold: float) -> float:
        short = system.lengths.mean_below(threshold)
        if short is None:
            return 0.0
        return rate_rps * (1 - system.lengths.share_above(threshold)) * system.local_prefill(short)

    high = system.lengths.high
    if load(high) <= prefill:
        return high
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if load(middle) <= prefill else (low, middle)
    return low


@dataclass(frozen=True)
class Slo:
    """What is promised: a share of requests has its first token within a time."""

    ttft_s: float
    quantile: float = 0.9
    decode_utilisation: float = 0.9
    """Most of the decode slots in use."""
    link_utilisation: float = 0.9
    """Most of the link in use."""


@dataclass(frozen=True)
class Sizing:
    """Instances that keep an SLO at a rate, at least cost."""

    rate_rps: float
    threshold_tokens: float
    prfaas_instances: int
    prefill: int
    decode: int
    offloaded_share: float
    egress_bps: float
    ttft_quantile_s: float
    cost_per_hour: float
    """In the prices' unit."""


class Impossible(ValueError):
    """No number of instances can do it; the message says what stands in the way."""


def instances_for(system: System, rate_rps: float, slo: Slo, prices: Prices, grid: int = 48) -> Sizing:
    """The cheapest numbers of instances with which `rate_rps` keeps `slo`; the system's own are ignored.

    TTFT by the queueing approximation of prfaas.planner.queueing; thresholds from a grid, "nothing goes out"
    among them. Raises Impossible.
    """
    per_instance = decode_limit_rps(system, 1)
    decode = max(1, math.ceil(rate_rps / (per_instance * slo.decode_utilisation) - 1e-9))
    best: Sizing | None = None
    quickest = math.inf
    for threshold in thresholds(system, grid):
        option = _size(system, rate_rps, slo, prices, threshold, decode)
        if isinstance(option, float):
            quickest = min(quickest, option)
        elif best is None or option.cost_per_hour < best.cost_per_hour:
            best = option
    if best is None:
        raise Impossible(
            f"no number of instances gives a TTFT of {slo.ttft_s:g} s to {slo.quantile:.0%} of requests: "
            + (
                f"without any queue the best threshold that the link carries gives {quickest:.3g} s"
                if quickest < math.inf
                else f"the link carries too little at a utilisation of {slo.link_utilisation:g}"
            )
        )
    return best


@dataclass(frozen=True, eq=False)
class _Path:
    """One path without its queue."""

    share: float
    rate_rps: float
    service_s: Floats
    after_s: Floats

    @property
    def least_servers(self) -> int:
        return math.floor(self.rate_rps * float(self.service_s.mean())) + 1

    def with_servers(self, servers: int) -> PathTimes:
        wait = mgk_wait(servers, self.rate_rps, self.service_s)
        return PathTimes(self.share, self.service_s, self.after_s, wait)


def _size(
    system: System, rate_rps: float, slo: Slo, prices: Prices, threshold: float, decode: int
) -> Sizing | float:
    """The cheapest sizing at one threshold; where none is enough, the quantile without queues (inf: link)."""
    p, long, short = cells_of_paths(system, threshold, 200)
    sent = rate_rps * p * 8 * sum(map(system.kv, long)) / len(long) if long else 0.0
    free = system.egress_bps - sent
    if long and (system.egress_bps <= 0 or sent > slo.link_utilisation * system.egress_bps):
        return math.inf
    paths = []
    if long:
        after = each(lambda tokens: transfer_tail_s(system, tokens, free), long)
        paths.append(_Path(p, rate_rps * p, each(system.prfaas_prefill, long), after))
    if short:
        service = each(system.local_prefill, short)
        paths.append(_Path(1 - p, rate_rps * (1 - p), service, np.zeros(len(short))))
    plenty = [_enough(path) for path in paths]
    unqueued = Ttft(tuple(path.with_servers(n) for path, n in zip(paths, plenty, strict=True)))
    if unqueued.within(slo.ttft_s) < slo.quantile:
        return unqueued.quantile_s(slo.quantile)
    price_of = ([prices.prfaas_instance_hour] if long else []) + (
        [prices.local_instance_hour] if short else []
    )
    counts = _cheapest(paths, price_of, plenty, slo)
    times = Ttft(tuple(path.with_servers(n) for path, n in zip(paths, counts, strict=True)))
    by_price = sum(n * price for n, price in zip(counts, price_of, strict=True))
    return Sizing(
        rate_rps=rate_rps,
        threshold_tokens=threshold,
        prfaas_instances=counts[0] if long else 0,
        prefill=counts[-1] if short else 0,
        decode=decode,
        offloaded_share=p,
        egress_bps=sent,
        ttft_quantile_s=times.quantile_s(slo.quantile),
        cost_per_hour=by_price
        + decode * prices.local_instance_hour
        + prices.egress_per_gb * sent / 8e9 * 3600,
    )


def _enough(path: _Path) -> int:
    """So many servers that hardly anything waits."""
    servers = path.least_servers
    while path.with_servers(servers).wait.probability > 1e-4:
        servers += max(1, servers // 8)
    return servers


def _cheapest(paths: Sequence[_Path], prices: Sequence[float], plenty: Sequence[int], slo: Slo) -> list[int]:
    """Least cost of one or two paths with the mixture's quantile kept; `plenty` is known to keep it."""

    def least(index: int, fixed: list[PathTimes]) -> int | None:
        low, high = paths[index].least_servers, plenty[index]

        def kept(servers: int) -> bool:
            times = Ttft((*fixed, paths[index].with_servers(servers)))
            return times.within(slo.ttft_s) >= slo.quantile

        if not kept(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if kept(middle) else (middle + 1, high)
        return low

    if len(paths) == 1:
        return [least(0, []) or plenty[0]]
    best, cost = list(plenty), math.inf
    first = paths[0].least_servers
    # Up to a dozen counts of the first path, all of them for small ones.
    step = max(1, (plenty[0] - first) // 12)
    for count in range(first, plenty[0] + 1, step):
        second = least(1, [paths[0].with_servers(count)])
        if second is None:
            continue
        total = count * prices[0] + second * prices[1]
        if total < cost:
            best, cost = [count, second], total
    return best
