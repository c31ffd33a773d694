from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest

from prfaas.model.lengths import Constant
from prfaas.model.profiles import Curve
from prfaas.planner.capacity import Impossible, Slo, instances_for
from prfaas.planner.cost import Prices, cost_per_request
from prfaas.planner.queueing import (
    PathTimes,
    Ttft,
    Wait,
    constant_share,
    erlang_c,
    mgk_wait,
    transfer_tail_s,
    ttft_at,
    zero_queue,
)
from prfaas.planner.system import System


def test_erlang_c_by_hand() -> None:
    # One server: the utilisation. Two servers at load 1: B = (1/2) / (1 + 1 + 1/2) = 1/5, C = 0.4 / 1.2.
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(3, 0.0) == 0.0
    with pytest.raises(ValueError, match="not below 2 servers"):
        erlang_c(2, 2.0)


def test_the_wait_of_m_d_1_is_pollaczek_and_khinchins() -> None:
    # ρ = 0.8, S = 2 s constant: λ E[S²] / (2 (1 − ρ)) = 0.4 · 4 / 0.4 = 4 s.
    wait = mgk_wait(1, 0.4, np.array([2.0]))
    assert wait.mean_s == pytest.approx(4.0)
    assert wait.utilisation == pytest.approx(0.8)
    # Two service times, 1 s and 3 s, alike: E[S²] = 5, W = 0.4 · 5 / 0.4.
    assert mgk_wait(1, 0.4, np.array([1.0, 3.0])).mean_s == pytest.approx(5.0)
    # Half as variable arrivals and constant service: half of that.
    assert mgk_wait(1, 0.4, np.array([2.0]), arrivals_scv=0.5).mean_s == pytest.approx(2.0)


def test_several_servers_of_constant_service_wait_more_than_half_as_long_as_exponential_ones() -> None:
    assert constant_share(1, 0.5) == 0.5
    # k = 4, ρ = 0.5: ½ (1 + 0.5 · 3 · (√24 − 2) / 32).
    assert constant_share(4, 0.5) == pytest.approx(0.5 * (1 + 1.5 * (math.sqrt(24) - 2) / 32))
    assert constant_share(4, 1 - 1e-9) == pytest.approx(0.5)  # in heavy traffic as with one
    assert constant_share(4, 1e-9) == 1.0


def mean_wait(servers: int, load: float, service_s: Sequence[float], count: int) -> float:
    """Of a simulated queue, Poisson arrivals, first come first served."""
    rng = Random(servers)
    rate = load * servers / (sum(service_s) / len(service_s))
    free, at, waited = [0.0] * servers, 0.0, 0.0
    for _ in range(count):
        at += rng.expovariate(rate)
        start = max(at, heapq.heappop(free))
        waited += start - at
        heapq.heappush(free, start + rng.choice(service_s))
    return waited / count


K_QUICK_AND_SLOW = [0.1 * -math.log((i + 0.5) / 300) for i in range(300)] + [
    3 * -math.log((i + 0.5) / 100) for i in range(100)
]


@pytest.mark.parametrize("servers", [1, 3, 8])
@pytest.mark.parametrize("load", [0.5, 0.75])
@pytest.mark.parametrize("service_s", [[1.0], [0.5, 1.5], K_QUICK_AND_SLOW], ids=["one", "two", "hyper"])
def test_the_mean_wait_is_within_a_tenth_of_a_simulated_queues(
    servers: int, load: float, service_s: list[float]
) -> None:
    rate = load * servers / (sum(service_s) / len(service_s))
    expected = mgk_wait(servers, rate, np.array(service_s)).mean_s
    assert expected == pytest.approx(mean_wait(servers, load, service_s, 200_000), rel=0.1)


def test_nothing_waits_without_arrivals() -> None:
    assert mgk_wait(3, 0.0, np.array([1.0])) == Wait(0.0, 0.0, 0.0)


def test_a_wait_has_its_mean() -> None:
    wait = Wait(0.4, 3.0, 0.8)
    step = 0.01
    area = wait.above(step * (np.arange(20_000) + 0.5)).sum() * step
    assert area == pytest.approx(3.0, rel=1e-3)
    assert list(wait.above(np.array([0.0, -1.0]))) == [0.4, 1.0]


def test_quantiles_over_two_paths_by_hand() -> None:
    none = Wait(0.0, 0.0, 0.0)
    quick = PathTimes(0.5, np.array([1.0, 2.0]), np.zeros(2), none)
    times = Ttft((quick, PathTimes(0.5, np.array([3.0, 4.0]), np.full(2, 0.5), none)))
    assert times.mean_s == pytest.approx(0.5 * 1.5 + 0.5 * 4.0)
    assert times.quantile_s(0.5) == pytest.approx(2.0, abs=1e-3)
    assert times.quantile_s(0.75) == pytest.approx(3.5, abs=1e-3)
    assert times.within(3.4) == pytest.approx(0.5)


def test_zero_queue_times_are_the_reports(system: System) -> None:
    ours = zero_queue(system, 19_616)
    assert ours.mean_s == pytest.approx(2.22, rel=0.02)
    assert ours.quantile_s(0.9) == pytest.approx(3.51, rel=0.02)
    alone = zero_queue(system, 1e9)
    assert alone.mean_s == pytest.approx(4.44, rel=0.04)
    assert alone.quantile_s(0.9) == pytest.approx(9.73, rel=0.04)
    everything = zero_queue(system, 0)
    assert everything.mean_s == pytest.approx(1.74, rel=0.04)
    assert everything.quantile_s(0.9) == pytest.approx(3.51, rel=0.02)


def served_fcfs(
    system: System, threshold: float, prefill: int, rate_rps: float, count: int, seed: int
) -> list[float]:
    """Prefill waits and times of a simulated queue per path, first come first served."""
    rng = Random(seed)
    free = {True: [0.0] * system.prfaas_instances, False: [0.0] * prefill}
    at, times = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate_rps)
        tokens = system.lengths.quantile(rng.random())
        out = tokens > threshold
        start = max(at, heapq.heappop(free[out]))
        end = start + (system.prfaas_prefill if out else system.local_prefill)(tokens)
        heapq.heappush(free[out], end)
        times.append(end - at)
    return times[count // 10 :]


@pytest.mark.parametrize(("load", "within"), [(0.5, 0.03), (0.75, 0.06), (0.9, 0.15)])
def test_the_approximation_agrees_with_a_simulated_queue(system: System, load: float, within: float) -> None:
    threshold, rate = 19_616, load * 3.196
    wide = system.changed(egress_bps=1e15, rtt_s=0.0)
    expected = ttft_at(wide, threshold, 3, rate)
    times = sorted(
        t for seed in range(3) for t in served_fcfs(wide, threshold, 3, rate, count=30_000, seed=seed)
    )
    assert expected.mean_s == pytest.approx(sum(times) / len(times), rel=within)
    for q in (0.5, 0.9, 0.99):
        assert expected.quantile_s(q) == pytest.approx(times[int(q * len(times))], rel=1.5 * within)


def test_the_tail_of_a_transfer_is_its_last_chunk_on_a_wide_link_and_the_rest_on_a_narrow_one() -> None:
    system = System(
        lengths=Constant(10_000),
        output_tokens=1,
        prfaas_instances=1,
        egress_bps=1e9,
        prfaas_prefill=Curve((1000.0,), (1.0,)),
        kv=Curve((1000.0,), (1e6,)),
        local_instances=2,
        local_prefill=Curve((1000.0,), (1.0,)),
        decode=None,  # type: ignore[arg-type]
        rtt_s=0.04,
        chunk_tokens=2000,
    )
    # 10 MB in 10 s of prefill; the last 2000 tokens are 2 MB = 16 Mbit: 16 ms, and half a round trip.
    assert transfer_tail_s(system, 10_000, 1e9) == pytest.approx(0.02 + 0.016)
    # At 4 Mbit/s prefill hides 40 of 80 Mbit: 10 s remain.
    assert transfer_tail_s(system, 10_000, 4e6) == pytest.approx(0.02 + 10.0)
    # A prompt shorter than a chunk is sent whole after its prefill.
    assert transfer_tail_s(system, 1000, 1e9) == pytest.approx(0.02 + 0.008)


@pytest.mark.parametrize(
    ("change", "rate", "problem"),
    [
        ({}, 4.0, "PrfaaS prefill: 4 instances serve"),
        ({"prfaas_instances": 40}, 4.0, "local prefill: 3 instances serve"),
        ({"egress_bps": 5e9}, 3.0, "link can't carry 3"),
    ],
)
def test_a_rate_beyond_capacity_says_which_path_is_full(
    system: System, change: dict[str, object], rate: float, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        ttft_at(system.changed(**change), 19_616, 3, rate)


def test_more_load_makes_every_quantile_worse(system: System) -> None:
    quantiles = [
        [ttft_at(system, 19_616, 3, rate).quantile_s(q) for q in (0.5, 0.9, 0.99)] for rate in (1, 2, 2.5, 3)
    ]
    for less, more in itertools.pairwise(quantiles):
        assert all(a < b for a, b in zip(less, more, strict=True))


K_PRICES = Prices(1.0, 1.0)


def test_the_sizing_keeps_its_promise_and_one_instance_less_breaks_it(system: System) -> None:
    slo = Slo(ttft_s=6.0)
    sizing = instances_for(system, 3.0, slo, K_PRICES)
    bought = system.changed(prfaas_instances=sizing.prfaas_instances)
    times = ttft_at(bought, sizing.threshold_tokens, sizing.prefill, 3.0)
    assert times.within(6.0) >= 0.9 - 0.01
    assert sizing.ttft_quantile_s <= 6.0 + 0.01
    assert sizing.cost_per_hour == sizing.prfaas_instances + sizing.prefill + sizing.decode
    assert sizing.decode == math.ceil(3.0 / (0.78125 * 0.9))
    fewer = system.changed(prfaas_instances=sizing.prfaas_instances - 1)
    try:
        worse = ttft_at(fewer, sizing.threshold_tokens, sizing.prefill, 3.0).within(6.0)
    except ValueError:
        worse = 0.0
    assert worse < 0.9


def test_dear_prfaas_instances_are_used_less(system: System) -> None:
    cheap = instances_for(system, 3.0, Slo(10.0), Prices(0.5, 1.0))
    dear = instances_for(system, 3.0, Slo(10.0), Prices(10.0, 1.0))
    assert dear.prfaas_instances < cheap.prfaas_instances
    assert dear.prefill > cheap.prefill


def test_an_slo_below_bare_prefill_is_impossible_and_says_how_far(system: System) -> None:
    with pytest.raises(Impossible, match=r"TTFT of 2 s to 90% .* gives 3\.[45]"):
        instances_for(system, 3.0, Slo(2.0), K_PRICES)


def test_cost_per_request_by_hand() -> None:
    # (4 · 30 + 8 · 10) / 3600 s and 8 Gbit/s = 1 GB/s at 0.01, over 2 req/s.
    prices = Prices(30.0, 10.0, 0.01, "USD")
    assert cost_per_request(prices, 4, 8, 2.0, 8e9) == pytest.approx((200 / 3600 + 0.01) / 2)


def test_equal_hardware_implies_prices() -> None:
    assert Prices.implied(4, 8, 12).prfaas_instance_hour == 1.0
    assert Prices.implied(4, 8, 18).prfaas_instance_hour == 2.5
    with pytest.raises(ValueError, match="nothing for 4 PrfaaS"):
        Prices.implied(4, 8, 8)
