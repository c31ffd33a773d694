"""Distributions of token counts: sampled by workloads, integrated by the planner.

For a threshold t on the length L, the planner needs p = P(L > t), l_long = E[L | L > t] and
l_short = E[L | L ≤ t]; a sampler needs the quantile function, drawn at a uniform number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from statistics import NormalDist

_NORMAL = NormalDist()


class Lengths(ABC):
    """A distribution of lengths in tokens. `low` and `high` bound it."""

    low: float
    high: float

    @abstractmethod
    def share_above(self, tokens: float) -> float:
        """P(L > tokens)."""

    @abstractmethod
    def mass_above(self, tokens: float) -> float:
        """E[L; L > tokens]: the tokens of an average request that belong to requests longer than that."""

    @abstractmethod
    def quantile(self, u: float) -> float:
        """The least length that a share `u` of requests, 0 ≤ u ≤ 1, does not exceed."""

    @cached_property
    def mean(self) -> float:
        return self.mass_above(-1.0)

    def mean_above(self, tokens: float) -> float | None:
        """l_long = E[L | L > tokens]; None where nothing is longer."""
        share = self.share_above(tokens)
        return self.mass_above(tokens) / share if share > 0 else None

    def mean_below(self, tokens: float) -> float | None:
        """l_short = E[L | L ≤ tokens]; None where everything is longer."""
        share = 1.0 - self.share_above(tokens)
        return (self.mean - self.mass_above(tokens)) / share if share > 1e-12 else None

    def cells(self, count: int) -> list[float]:
        """`count` lengths of equal probability that stand for the distribution, rising: cell i is quantile
        (i + ½) / count. An average of f over them approaches E[f(L)]."""
        return [self.quantile((i + 0.5) / count) for i in range(count)]


@dataclass(frozen=True)
class Constant(Lengths):
    """Always the same."""

    tokens: float

    @property
    def low(self) -> float:  # type: ignore[override]
        return self.tokens

    @property
    def high(self) -> float:  # type: ignore[override]
        return self.tokens

    def share_above(self, tokens: float) -> float:
        return 1.0 if self.tokens > tokens else 0.0

    def mass_above(self, tokens: float) -> float:
        return self.tokens if self.tokens > tokens else 0.0

    def quantile(self, u: float) -> float:
        return self.tokens


@dataclass(frozen=True)
class Uniform(Lengths):
    """Every length between two alike."""

    low: float
    high: float

    def _cut(self, tokens: float) -> float:
        return min(max(tokens, self.low), self.high)

    def share_above(self, tokens: float) -> float:
        if self.low == self.high:
            return 1.0 if self.low > tokens else 0.0
        return (self.high - self._cut(tokens)) / (self.high - self.low)

    def mass_above(self, tokens: float) -> float:
        return self.share_above(tokens) * (self._cut(tokens) + self.high) / 2

    def quantile(self, u: float) -> float:
        return self.low + u * (self.high - self.low)


def _cdf(z: float) -> float:
    """Φ, of the standard normal distribution."""
    return 0.5 * math.erfc(-z * _K_ROOT_HALF)


_K_ROOT_HALF = math.sqrt(0.5)


@dataclass(frozen=True)
class TruncatedLognormal(Lengths):
    """ln L ~ N(mu, sigma²), restricted to [low, high] and renormalised: no mass sits on the bounds."""

    mu: float
    sigma: float
    low: float
    high: float

    def _z(self, tokens: float) -> float:
        return (math.log(min(max(tokens, self.low), self.high)) - self.mu) / self.sigma

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        """Φ at both bounds."""
        return _cdf(self._z(self.low)), _cdf(self._z(self.high))

    @property
    def kept(self) -> float:
        """Probability that an unrestricted length lies within the bounds."""
        below, above = self._bounds
        return above - below

    @cached_property
    def _mass(self) -> tuple[float, float]:
        """Φ(z_high − sigma), and exp(mu + sigma²/2) over the probability that is kept."""
        return _cdf(self._z(self.high) - self.sigma), math.exp(self.mu + self.sigma**2 / 2) / self.kept

    def share_above(self, tokens: float) -> float:
        return (self._bounds[1] - _cdf(self._z(tokens))) / self.kept

    def mass_above(self, tokens: float) -> float:
        # E[L; a < L ≤ b] = exp(mu + sigma²/2) [Φ(z_b − sigma) − Φ(z_a − sigma)], over the mass that is kept.
        upper, factor = self._mass
        return factor * (upper - _cdf(self._z(tokens) - self.sigma))

    def quantile(self, u: float) -> float:
        at = min(max(self._bounds[0] + u * self.kept, 1e-300), 1 - 1e-16)
        return min(max(math.exp(self.mu + self.sigma * _NORMAL.inv_cdf(at)), self.low), self.high)


@dataclass(frozen=True)
class Scaled(Lengths):
    """Another distribution with every length `factor` times as long."""

    inner: Lengths
    factor: float

    @property
    def low(self) -> float:  # type: ignore[override]
        return self.inner.low * self.factor

    @property
    def high(self) -> float:  # type: ignore[override]
        return self.inner.high * self.factor

    def share_above(self, tokens: float) -> float:
        return self.inner.share_above(tokens / self.factor)

    def mass_above(self, tokens: float) -> float:
        return self.inner.mass_above(tokens / self.factor) * self.factor

    def quantile(self, u: float) -> float:
        return self.inner.quantile(u) * self.factor


class Empirical(Lengths):
    """Lengths that were counted, each with its weight (1 where none is given)."""

    def __init__(self, tokens: Iterable[float], weights: Iterable[float] | None = None) -> None:
        """Raises ValueError without any length, or where weights are negative, all 0 or of another number."""
        values = list(tokens)
        given = [1.0] * len(values) if weights is None else list(weights)
        if not values:
            raise ValueError("needs at least one length")
        if len(given) != len(values):
            raise ValueError(f"{len(given)} weights for {len(values)} lengths")
        if min(given) < 0 or not sum(given) > 0:
            raise ValueError("weights must not be negative, nor all 0")
        pairs = sorted(zip(values, given, strict=True))
        self._total = sum(w for _, w in pairs)
        self._values = [float(v) for v, _ in pairs]
        self._share = [0.0, *accumulate(w / self._total for _, w in pairs)]
        self._mass = [0.0, *accumulate(v * w / self._total for v, w in pairs)]
        # Exactly: sums of shares miss it by rounding, and "everything is longer" must be P = 1.
        self._share[-1] = 1.0
        self.low, self.high = self._values[0], self._values[-1]

    def share_above(self, tokens: float) -> float:
        return max(0.0, self._share[-1] - self._share[bisect_right(self._values, tokens)])

    def mass_above(self, tokens: float) -> float:
        return max(0.0, self._mass[-1] - self._mass[bisect_right(self._values, tokens)])

    def quantile(self, u: float) -> float:
        # Least i with share[i + 1] ≥ u; a hair of tolerance for sums that miss a round number.
        at = bisect_right(self._share, max(u, 0.0) - 1e-12) - 1
        return self._values[min(max(at, 0), len(self._values) - 1)]
