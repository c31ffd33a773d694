"""Shadow prices find back to where they were once an outage is over."""

from __future__ import annotations

from random import Random

import pytest

from prfaas.routing.duals import K_WINDOW, DualPrices, Option

K_UP, K_DOWN = [3.0, 4.0, 1e11], [3.0, 4.0, 0.0]


def play(prices: DualPrices, rng: Random, requests: int, capacity: list[float]) -> list[float]:
    """Requests as the 1T case has them; while the link is down they have the local path alone."""
    for place in range(requests):
        tokens = min(131_072.0, rng.lognormvariate(9.9, 1.0))
        options = [Option(0, 0.35 + tokens * 1.45e-4, -1, 0.0)]
        if capacity[2]:
            options.append(Option(1, 0.3 + tokens * 5e-5, 2, (1.8e8 + tokens * 1.7e4) * 8))
        prices.observe(options)
        if place % 32 == 31:
            prices.solve(capacity)
    return prices.multipliers


@pytest.mark.parametrize("outage", [40, 400])
def test_the_multipliers_find_back_after_an_outage(outage: int) -> None:
    prices, rng = DualPrices(), Random(7)
    before = list(play(prices, rng, 600, K_UP))
    assert before[0] == pytest.approx(1 - before[1], abs=0.05)
    during = list(play(prices, rng, outage, K_DOWN))
    assert during[0] > before[0] or outage < K_WINDOW
    after = play(prices, rng, K_WINDOW + 64, K_UP)
    assert after[0] == pytest.approx(before[0], abs=0.1)
    assert after[1] == pytest.approx(before[1], abs=0.1)
