"""Shadow prices of the fluid optimum, from recent requests and the capacities of now.

The report's optimum (fill prefill at both ends and the link alike) is the solution of a linear programme
over the requests of late: choose a path for each so that the highest utilisation is least. Its dual has one
multiplier ν a resource, and at the optimum a request takes the path with the smallest Σ ν · work: a
threshold on the uncached length, for lengths where long prompts carry less KV for their compute.
Multipliers are found by exponentiated gradient ascent, a few steps at a time from where they were; they sum
to one within each group of resources that share requests.

Work is in seconds of a whole resource: instance-seconds over instances, bits over the link's rate. A link
that falls to a tenth therefore costs ten times as much at the next request, before any multiplier has
moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

K_WINDOW = 256  # requests that stand for the traffic of late
K_ENOUGH = 16  # requests before which nothing is said
K_STEPS = (8, 60)  # gradient steps when little, and when much, has changed
K_STEP = (0.3, 0.01)  # first and last of those when much has changed; the latter always, otherwise
K_LARGE_STEPS: list[float] = np.geomspace(*K_STEP, K_STEPS[1]).tolist()
K_SMALL_STEPS = [K_STEP[1]] * K_STEPS[0]
K_NONE = 1e-9  # stands for a capacity of 0
K_MOVED = 0.2  # share of a capacity that is much
K_AFTER = 64  # requests after which those kept have surely been solved for once more
K_SMOOTH = 0.9  # of the last average of ν kept at each step
K_LEAST = 1e-4  # ν never falls below: a resource must be able to come back
K_NEVER = 1e12  # seconds: cost of a path that a request doesn't have
K_NO_OPTION = (0, K_NEVER, -1, 0.0)


class Option(NamedTuple):
    """One path of one request: work at a prefill site, and on a link (-1: none)."""

    site: int
    prefill_s: float
    link: int
    bits: float


class DualPrices:
    """Multipliers by resource number; numbers are given out by the caller, from 0, without holes."""

    def __init__(self) -> None:
        self.multipliers: list[float] = []
        self._parent: list[int] = []
        self._seen: set[tuple[int, ...]] = set()
        self._groups: tuple[NDArray[np.intp], bool] | None = None
        """As `_grouped` found them last; None: a request has joined some since."""
        self._count = 0
        self._fresh: list[float] = []
        """Observed and not yet written down: the figures of `_options` paths of each, one after the other."""
        self._fresh_at = 0
        """The count at which all requests kept have come since a capacity last moved by much."""
        self._options = 1
        self._kept = np.empty((K_WINDOW, 1, len(K_NO_OPTION)))
        self._nu = np.zeros(0)
        self._mean = np.zeros(0)
        self._capacity = np.zeros(0)

    def observe(self, options: Sequence[tuple[int, float, int, float]]) -> None:
        """A request came, and could take these paths: each an Option, or a tuple in its order."""
        missing = self._options - len(options)
        if missing < 0:
            self._widen(len(options))
        self._count += 1
        fresh = self._fresh
        touched: list[int] = []
        for option in options:
            fresh += option
            touched.append(option[0])
            if option[2] >= 0:
                touched.append(option[2])
        if missing > 0:
            fresh += K_NO_OPTION * missing
        if len(fresh) >= 2 * self._kept.size:
            self._take_in()
        key = tuple(touched)
        if key not in self._seen:
            self._join(key)

    def _take_in(self) -> None:
        """Write down those that came since the last solution: all at once costs a tenth of one by one."""
        width = self._options * len(K_NO_OPTION)
        fresh = self._fresh[-K_WINDOW * width :]
        rows = len(fresh) // width
        if not rows:
            return
        new = np.fromiter(fresh, np.float64, len(fresh)).reshape(rows, *self._kept.shape[1:])
        first = (self._count - rows) % K_WINDOW
        until_end = min(rows, K_WINDOW - first)
        self._kept[first : first + until_end] = new[:until_end]
        self._kept[: rows - until_end] = new[until_end:]
        self._fresh.clear()

    def solve(self, capacity: Sequence[float]) -> None:
        """Follows the traffic and `capacity` (instances, or bits a second, by resource; 0: out of use)."""
        size = len(capacity)
        rows = min(self._count, K_WINDOW)
        if rows < K_ENOUGH or size == 0:
            return
        self._take_in()
        old = self._nu
        if len(old) < size:
            self._nu = np.concatenate([old, np.full(size - len(old), 1.0 / size)])
            self._mean = np.concatenate([self._mean, np.full(size - len(old), 1.0 / size)])
        if self.moved(capacity):
            self._fresh_at = self._count + K_WINDOW
        # Requests that came while a link was down know no path over it: small steps would lead back only
        # in thousands of requests.
        much = self._count <= self._fresh_at + K_AFTER
        now = self._capacity = np.maximum(np.asarray(capacity, dtype=float), K_NONE)
        group, together = self._grouped(size)
        kept = self._kept[:rows]
        site, link = kept[:, :, 0].astype(np.intp), np.maximum(kept[:, :, 2], 0).astype(np.intp)
        site_s, link_s = kept[:, :, 1] / now[site], kept[:, :, 3] / now[link]
        # By place in one row of all: a step costs half of what it costs by row and column.
        sites, links, links_s = site.ravel(), link.ravel(), link_s.ravel()
        sites_s = np.minimum(site_s, K_NEVER).ravel()
        first_option = np.arange(rows) * self._options
        nu, mean = self._nu, self._mean
        for step in K_LARGE_STEPS if much else K_SMALL_STEPS:
            best = first_option + (site_s * nu[site] + link_s * nu[link]).argmin(axis=1)
            used = np.bincount(sites[best], sites_s[best], size)
            used += np.bincount(links[best], links_s[best], size)
            if together:
                # Lists' sums and maxima: these are few, and an array's cost as much as its arithmetic.
                nu = nu * np.exp(step * used / max(*used.tolist(), 1e-12))
                nu = np.maximum(nu / sum(nu.tolist()), K_LEAST)
            else:
                highest = np.zeros(size)
                np.maximum.at(highest, group, used)
                nu = nu * np.exp(step * used / np.maximum(highest[group], 1e-12))
                nu = np.maximum(nu / np.bincount(group, nu, size)[group], K_LEAST)
            mean = K_SMOOTH * mean + (1 - K_SMOOTH) * nu
        self._nu, self._mean = nu, mean
        self.multipliers = mean.tolist()

    def _grouped(self, size: int) -> tuple[NDArray[np.intp], bool]:
        """Which group each resource belongs to, and whether all are in one."""
        known = self._groups
        if known is None or len(known[0]) != size:
            group = np.asarray([self._root(index) for index in range(size)])
            known = self._groups = (group, bool((group == group[0]).all()))
        return known

    def moved(self, capacity: Sequence[float]) -> bool:
        """Whether a capacity differs by much from what was last solved for."""
        known = self._capacity.tolist()
        return len(known) != len(capacity) or any(
            abs(max(now, K_NONE) - before) > K_MOVED * before
            for now, before in zip(capacity, known, strict=True)
        )

    def _widen(self, options: int) -> None:
        self._take_in()
        more = np.broadcast_to(np.array(K_NO_OPTION), (K_WINDOW, options - self._options, len(K_NO_OPTION)))
        self._kept = np.concatenate([self._kept, more], axis=1)
        self._options = options

    def _join(self, touched: tuple[int, ...]) -> None:
        """Resources that one request could use belong together."""
        self._seen.add(touched)
        self._groups = None
        while len(self._parent) <= max(touched):
            self._parent.append(len(self._parent))
        first = self._root(touched[0])
        for other in touched[1:]:
            self._parent[self._root(other)] = first

    def _root(self, index: int) -> int:
        while len(self._parent) <= index:
            self._parent.append(len(self._parent))
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index
