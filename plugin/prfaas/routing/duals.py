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

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

K_WINDOW = 256  # requests that stand for the traffic of late
K_ENOUGH = 16  # requests before which nothing is said
K_STEPS = (8, 60)  # gradient steps when little, and when much, has changed
K_STEP = (0.3, 0.01)  # first and last of those when much has changed; the latter always, otherwise
K_NONE = 1e-9  # stands for a capacity of 0
K_MOVED = 0.2  # share of a capacity that is much
K_AFTER = 64  # requests after which those kept have surely been solved for once more
K_SMOOTH = 0.9  # of the last average of ν kept at each step
K_LEAST = 1e-4  # ν never falls below: a resource must be able to come back
K_NEVER = 1e12  # seconds: cost of a path that a request doesn't have


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
        self._count = 0
        self._fresh: deque[Sequence[tuple[int, float, int, float]]] = deque(maxlen=K_WINDOW)
        """Observed and not yet written down."""
        self._fresh_at = 0
        """The count at which all requests kept have come since a capacity last moved by much."""
        self._options = 1
        self._site = np.zeros((K_WINDOW, 1), dtype=np.int64)
        self._prefill_s = np.full((K_WINDOW, 1), K_NEVER)
        self._link = np.zeros((K_WINDOW, 1), dtype=np.int64)
        self._bits = np.zeros((K_WINDOW, 1))
        self._nu = np.zeros(0)
        self._mean = np.zeros(0)
        self._capacity = np.zeros(0)

    def observe(self, options: Sequence[tuple[int, float, int, float]]) -> None:
        """A request came, and could take these paths: each an Option, or a tuple in its order."""
        self._count += 1
        self._fresh.append(options)
        touched: list[int] = []
        for site, _, link, _ in options:
            touched.append(site)
            if link >= 0:
                touched.append(link)
        self._join(touched)

    def _take_in(self) -> None:
        """Write down those that came since the last solution: all at once costs a fifth of one by one."""
        fresh = self._fresh
        if not fresh:
            return
        most = max(map(len, fresh))
        if most > self._options:
            self._widen(most)
        none = Option(0, K_NEVER, 0, 0.0)
        rows = np.array([[*options, *[none] * (self._options - len(options))] for options in fresh])
        place = np.arange(self._count - len(fresh), self._count) % K_WINDOW
        self._site[place] = rows[:, :, 0]
        self._prefill_s[place] = rows[:, :, 1]
        self._link[place] = np.maximum(rows[:, :, 2], 0)
        self._bits[place] = rows[:, :, 3]
        fresh.clear()

    def solve(self, capacity: Sequence[float]) -> None:
        """Follows the traffic and `capacity` (instances, or bits a second, by resource; 0: out of use)."""
        now = np.maximum(np.asarray(capacity, dtype=float), K_NONE)
        size = len(now)
        rows = min(self._count, K_WINDOW)
        if rows < K_ENOUGH or size == 0:
            return
        self._take_in()
        old = self._nu
        if len(old) < size:
            self._nu = np.concatenate([old, np.full(size - len(old), 1.0 / size)])
            self._mean = np.concatenate([self._mean, np.full(size - len(old), 1.0 / size)])
        first, last = K_STEP
        if self.moved(capacity):
            self._fresh_at = self._count + K_WINDOW
        # Requests that came while a link was down know no path over it: small steps would lead back only
        # in thousands of requests.
        much = self._count <= self._fresh_at + K_AFTER
        sizes = np.geomspace(first, last, K_STEPS[1]) if much else np.full(K_STEPS[0], last)
        self._capacity = now
        group = np.asarray([self._root(index) for index in range(size)])
        together = bool((group == group[0]).all())
        site, link = self._site[:rows], self._link[:rows]
        site_s = self._prefill_s[:rows] / now[site]
        link_s = self._bits[:rows] / now[link]
        # By place in one row of all: a step costs half of what it costs by row and column.
        sites, links, links_s = site.ravel(), link.ravel(), link_s.ravel()
        sites_s = np.minimum(site_s, K_NEVER).ravel()
        first_option = np.arange(rows) * site.shape[1]
        nu, mean = self._nu, self._mean
        for step in sizes.tolist():
            best = first_option + (site_s * nu[site] + link_s * nu[link]).argmin(axis=1)
            used = np.bincount(sites[best], sites_s[best], size)
            used += np.bincount(links[best], links_s[best], size)
            if together:
                nu = np.maximum(nu * np.exp(step * used / max(used.max(), 1e-12)), 1e-300)
                nu = np.maximum(nu / np.bincount(group, nu, size)[group[0]], K_LEAST)
            else:
                highest = np.zeros(size)
                np.maximum.at(highest, group, used)
                nu = np.maximum(nu * np.exp(step * used / np.maximum(highest[group], 1e-12)), 1e-300)
                nu = np.maximum(nu / np.bincount(group, nu, size)[group], K_LEAST)
            mean = K_SMOOTH * mean + (1 - K_SMOOTH) * nu
        self._nu, self._mean = nu, mean
        self.multipliers = self._mean.tolist()

    def moved(self, capacity: Sequence[float]) -> bool:
        """Whether a capacity differs by much from what was last solved for."""
        known = self._capacity.tolist()
        return len(known) != len(capacity) or any(
            abs(max(now, K_NONE) - before) > K_MOVED * before
            for now, before in zip(capacity, known, strict=True)
        )

    def _widen(self, options: int) -> None:
        more = options - self._options
        self._options = options
        self._site = np.pad(self._site, ((0, 0), (0, more)))
        self._link = np.pad(self._link, ((0, 0), (0, more)))
        self._bits = np.pad(self._bits, ((0, 0), (0, more)))
        self._prefill_s = np.pad(self._prefill_s, ((0, 0), (0, more)), constant_values=K_NEVER)

    def _join(self, touched: list[int]) -> None:
        """Resources that one request could use belong together."""
        key = tuple(touched)
        if key in self._seen:
            return
        self._seen.add(key)
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
