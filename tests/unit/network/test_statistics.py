import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.config.topology import BurstyLoss, Impairments
from prfaas_testbed.network.statistics import (
    Chain,
    binomial_interval,
    burst_interval,
    chain_interval,
    packets_needed,
    survival,
)


def losses(chain: Chain, packets: int, seed: int) -> list[bool]:
    """netem's own rule: the state that is found decides, the step happens beside it."""
    dice, bad, lost = random.Random(seed), False, []
    for _ in range(packets):
        lost.append(dice.random() < (chain.bad if bad else chain.good))
        bad = dice.random() >= chain.leave if bad else dice.random() < chain.enter
    return lost


def bursts(lost: list[bool]) -> list[int]:
    found, run = [], 0
    for one in [*lost, False]:
        if one:
            run += 1
        elif run:
            found.append(run)
            run = 0
    return found


def test_the_binomial_interval_of_a_tenth_of_a_percent_is_known() -> None:
    low, high = binomial_interval(20_000, 0.001)
    assert (round(low * 20_000), round(high * 20_000)) == (7, 36)


def test_a_link_without_loss_may_not_lose_more_than_a_stray_packet() -> None:
    low, high = binomial_interval(10_000, 0.0)
    assert low == 0
    assert high * 10_000 <= 3


@pytest.mark.parametrize("chain", [Chain(0.01, 0.25, 0, 1), Chain(0.02, 0.5, 0.001, 0.8)])
def test_the_chain_s_formulas_agree_with_its_simulation(chain: Chain) -> None:
    lost = losses(chain, 300_000, seed=7)
    low, high = chain_interval(len(lost), chain)
    assert low <= sum(lost) / len(lost) <= high
    runs = bursts(lost)
    assert sum(runs) / len(runs) == pytest.approx(chain.mean_burst, rel=0.05)


def test_the_chain_s_interval_holds_in_nearly_every_try_and_is_not_idle() -> None:
    chain = Chain(0.01, 0.25, 0, 1)
    low, high = chain_interval(5000, chain)
    shares = [sum(losses(chain, 5000, seed)) / 5000 for seed in range(60)]
    assert sum(low <= share <= high for share in shares) >= 59
    assert max(shares) > chain.mean + (high - chain.mean) / 4


def test_a_burst_s_mean_length_is_one_over_the_chance_to_leave() -> None:
    assert Chain.of(BurstyLoss(enter_percent=0.1, leave_percent=25)).mean_burst == pytest.approx(4)
    low, high = burst_interval(100, Chain(0.001, 0.25, 0, 1))
    assert low < 4 < high


@given(st.floats(0.0001, 0.5), st.floats(0.01, 1.0))
def test_the_mean_of_a_chain_is_that_of_its_link(enter: float, leave: float) -> None:
    loss = BurstyLoss(enter_percent=enter * 100, leave_percent=leave * 100)
    assert Chain.of(loss).mean == pytest.approx(Impairments(bursty_loss=loss).mean_loss)


def test_twenty_losses_are_waited_for_as_far_as_time_allows() -> None:
    assert packets_needed(0.001, 30_000) == 20_000
    assert packets_needed(0.0001, 30_000) == 30_000
    assert packets_needed(0.0, 30_000) == 10_000
    assert packets_needed(0.5, 30_000) == 2000
    assert packets_needed(0.001, 90_000, mean_burst=4.0) == 80_000
    assert packets_needed(0.5, 90_000, mean_burst=math.inf) == 90_000


def test_losses_of_a_path_multiply_and_corruption_counts_as_loss() -> None:
    path = [Impairments(loss_percent=10), Impairments(loss_percent=20), Impairments(corrupt_percent=10)]
    assert survival(path, 600) == pytest.approx(0.9 * 0.8 * (1 - 0.1 * 594 / 600))


def test_bursts_make_the_share_lost_vary_as_the_sum_of_all_covariances_says() -> None:
    chain = Chain(enter=0.01, leave=0.25, good=0.0, bad=0.8)
    packets = 5_000
    variance = chain.mean * (1 - chain.mean) / packets
    variance += 2 * sum((packets - lag) * chain.covariance(lag) for lag in range(1, packets)) / packets**2
    assert chain.mean_deviation(packets) == pytest.approx(math.sqrt(variance), rel=0.01)
