"""The threshold that prices imply: the length from which a prompt without cached prefix would go out now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prfaas.model.ids import SiteId
from prfaas.routing.paths import PathFinder
from prfaas.routing.pricing import PriceList

K_GRID = [64]
"""Lengths tried: each a fiftieth more than the one before."""
while K_GRID[-1] < 1 << 18:
    K_GRID.append(max(K_GRID[-1] + 1, int(K_GRID[-1] * 1.02)))

FloatArray: TypeAlias = NDArray[np.float64]


class ImpliedThresholds:
    """For logs and figures: no decision asks for one."""

    def __init__(self, paths: PathFinder, prices: PriceList) -> None:
        self._paths, self._prices = paths, prices
        self._works: dict[int, tuple[FloatArray, FloatArray]] = {}
        """By the costs' identity: the path finder holds them all."""

    def thresholds(self, homes: Iterable[SiteId]) -> Mapping[SiteId, float]:
        """By home, for those that some link leads to."""
        found = {}
        for home in sorted(homes):  # the same order in every process
            sources = [link.source for link in self._prices.links() if link.target == home]
            if sources:
                found[home] = self._threshold(home, sources)
        return found

    def _threshold(self, home: SiteId, sources: Sequence[SiteId]) -> float:
        """The first length of the grid at which some source is cheaper in the fluid optimum; inf if none."""
        local_s, _ = self._grid_works(home)
        local = self._prices.price_of_work(home) * local_s
        out = np.zeros(len(K_GRID), dtype=bool)
        for source in sources:
            site_price = self._prices.price_of_work(source)
            link_price = self._prices.price_of_work(self._paths.link_id(source, home))
            if not math.isinf(site_price + link_price):
                away_s, bits = self._grid_works(source)
                out |= site_price * away_s + link_price * bits < local
        return float(K_GRID[int(np.argmax(out))]) if out.any() else math.inf

    def _grid_works(self, site: SiteId) -> tuple[FloatArray, FloatArray]:
        """Seconds of prefill and bits to send, for each length of the grid."""
        costs = self._paths.costs(site, "")
        found = self._works.get(id(costs))
        if found is None:
            found = self._works[id(costs)] = (
                np.array([costs.prefill_s(tokens, 0) for tokens in K_GRID]),
                np.array([costs.transfer_bytes(tokens, 0) * 8.0 for tokens in K_GRID]),
            )
        return found
