from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.lengths import Constant, Empirical, Lengths, Scaled, TruncatedLognormal, Uniform

K_REPORT = TruncatedLognormal(9.90, 1.00, 128, 131072)


def test_the_truncated_lognormal_agrees_with_a_numeric_integral() -> None:
    cells = 200_000
    step = (math.log(131072) - math.log(128)) / cells
    mass = [0.0, 0.0, 0.0]  # of everything, of tokens, of tokens above 19.6K
    above = 0.0
    for i in range(cells):
        z = math.log(128) + (i + 0.5) * step
        density = math.exp(-((z - 9.9) ** 2) / 2)
        tokens = math.exp(z)
        mass[0] += density
        mass[1] += density * tokens
        if tokens > 19_600:
            above += density
            mass[2] += density * tokens
    assert K_REPORT.mean == pytest.approx(mass[1] / mass[0], rel=1e-4)
    assert K_REPORT.share_above(19_600) == pytest.approx(above / mass[0], rel=1e-3)
    assert K_REPORT.mass_above(19_600) == pytest.approx(mass[2] / mass[0], rel=1e-3)


def test_truncation_renormalises_and_leaves_no_mass_on_the_bounds() -> None:
    assert K_REPORT.share_above(131071.9) == pytest.approx(0, abs=1e-6)
    assert K_REPORT.share_above(128.1) == pytest.approx(1, abs=1e-6)
    assert K_REPORT.share_above(1e9) == 0
    assert K_REPORT.share_above(0) == 1


K_EACH: list[Lengths] = [
    K_REPORT,
    Uniform(100, 300),
    Constant(77),
    Empirical([5, 1, 3, 3, 9]),
    Empirical([10, 20], [1, 3]),
    Scaled(Uniform(10, 30), 7),
]


@pytest.mark.parametrize("lengths", K_EACH, ids=lambda one: type(one).__name__)
@given(st.floats(0, 1))
def test_a_share_u_does_not_exceed_the_quantile_of_u(lengths: Lengths, u: float) -> None:
    at = lengths.quantile(u)
    assert lengths.low <= at <= lengths.high
    assert 1 - lengths.share_above(at * (1 + 1e-9)) >= u - 1e-6


@pytest.mark.parametrize("lengths", K_EACH, ids=lambda one: type(one).__name__)
def test_the_means_above_and_below_make_the_mean(lengths: Lengths) -> None:
    for t in (0, 4, 15, 77, 150, 19_600, 1e6):
        p = lengths.share_above(t)
        long, short = lengths.mean_above(t), lengths.mean_below(t)
        assert (long is None) == (p == 0)
        assert p * (long or 0) + (1 - p) * (short or 0) == pytest.approx(lengths.mean)
        if long is not None and short is not None:
            assert short <= t < long


def test_counted_lengths_give_hand_computed_figures() -> None:
    lengths = Empirical([1, 3, 3, 5, 9])
    assert lengths.mean == pytest.approx(21 / 5)
    assert lengths.share_above(3) == pytest.approx(2 / 5)
    assert lengths.mean_above(3) == pytest.approx(7)
    assert lengths.mean_below(3) == pytest.approx(7 / 3)
    assert [lengths.quantile(u) for u in (0, 0.2, 0.21, 0.6, 0.61, 1)] == [1, 1, 3, 3, 5, 9]
    weighted = Empirical([10, 20], [1, 3])
    assert weighted.mean == pytest.approx(17.5)
    assert weighted.quantile(0.25) == 10
    assert weighted.quantile(0.26) == 20


@pytest.mark.parametrize(
    ("tokens", "weights", "problem"),
    [
        ([], None, "at least one"),
        ([1], [1, 2], "2 weights"),
        ([1], [0], "all 0"),
        ([1, 2], [-1, 2], "negative"),
    ],
)
def test_impossible_counts_are_refused(tokens: list[int], weights: list[int] | None, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Empirical(tokens, weights)


def test_the_mean_of_a_function_over_cells_approaches_its_integral() -> None:
    squares = [tokens**2 for tokens in Uniform(0, 2).cells(2000)]
    assert sum(squares) / len(squares) == pytest.approx(4 / 3, rel=1e-5)
    assert sum(K_REPORT.cells(2000)) / 2000 == pytest.approx(K_REPORT.mean, rel=1e-3)
