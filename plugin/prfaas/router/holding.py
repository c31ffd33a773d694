"""Requests that the policy keeps at the door, in order of service: the least `order` goes first.

Requests that wait for the same thing (a model at a site) keep that order among themselves, whoever comes
and whenever each asks again: `ahead` tells whether a request has to wait behind another.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

from prfaas.routing import Policy

K_WAKE = 4
"""Requests that ask again for one thing freed. One that goes through wakes the next, so that a freed resource
that the first don't want still finds its taker, and 1,000 waiting requests don't all ask at once."""


class Place:
    """One request's stay, over all its waits."""

    def __init__(self, pen: HoldingPen, since_s: float) -> None:
        self._pen, self.since_s = pen, since_s
        self.thing: Hashable = None
        self.order: tuple[float, int] = (0.0, 0)

    def at(self, thing: Hashable, order: float) -> None:
        """What it waits for now, and its order among those that do."""
        if self.order[1] and (self.thing, self.order[0]) == (thing, order):
            return
        self.leave()
        self.thing, self.order = thing, (order, next(self._pen.serials))
        insort(self._pen.queues.setdefault(thing, []), self.order)

    def leave(self) -> None:
        queue = self._pen.queues.get(self.thing)
        if queue is not None:
            at = bisect_left(queue, self.order)
            if at < len(queue) and queue[at] == self.order:
                del queue[at]
            if not queue:
                del self._pen.queues[self.thing]


class HoldingPen:
    """A bounded set of waiting requests."""

    def __init__(self) -> None:
        self.held = 0
        self.queues: dict[Hashable, list[tuple[float, int]]] = {}
        """Orders of those that wait, by what they wait for."""
        self.serials = itertools.count(1)
        self._heap: list[tuple[float, int, asyncio.Future[None]]] = []
        self._uncalled: dict[str, asyncio.Future[None]] = {}
        self._looks: asyncio.TimerHandle | None = None

    @contextmanager
    def place(self, since_s: float = 0.0) -> Iterator[Place]:
        """One request's stay, over all its waits."""
        self.held += 1
        place = Place(self, since_s)
        try:
            yield place
        finally:
            self.held -= 1
            place.leave()

    def ahead(self, thing: Hashable, order: float, place: Place | None = None) -> bool:
        """Whether another waits for `thing` that comes before `order` (and before `place`, if in the pen)."""
        queue = self.queues.get(thing)
        if not queue:
            return False
        mine = place.order if place is not None and place.thing == thing and place.order[1] else None
        if mine is not None and mine[0] == order:
            return queue[0] < mine
        first = queue[1] if queue[0] == mine and len(queue) > 1 else queue[0]
        return first != mine and first[0] <= order

    async def wait(self, order: float, timeout_s: float) -> None:
        """Until woken, or the time is up. The least order wakes first."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, (order, next(self.serials), future))
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            pass
        finally:
            future.cancel()  # leaves the heap when it comes up

    async def until_called(
        self, name: str, timeout_s: float, policy: Policy, clock: Callable[[], float]
    ) -> None:
        """Until `policy`, which knows its turn, recalls it, or the time is up."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._uncalled[name] = future
        self.recall(policy, clock)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            pass
        finally:
            if self._uncalled.get(name) is future:
                del self._uncalled[name]

    def call_all(self) -> None:
        """All of those ask again."""
        self._call(list(self._uncalled))

    def recall(self, policy: Policy, clock: Callable[[], float]) -> None:
        """Calls those whose turn it is by the policy: now, and when it says."""
        if self._looks is not None:
            self._looks.cancel()
            self._looks = None
        if self._uncalled:
            now = clock()
            names, next_s = policy.recalls(now)
            self._call(names)
            if next_s < math.inf:
                loop = asyncio.get_running_loop()
                self._looks = loop.call_later(max(0.0, next_s - now), self.recall, policy, clock)

    def _call(self, names: Iterable[str]) -> None:
        for name in names:
            future = self._uncalled.pop(name, None)
            if future is not None and not future.done():
                future.set_result(None)

    def wake(self, count: int = K_WAKE) -> None:
        """Something was freed."""
        while count and self._heap:
            _, _, future = heapq.heappop(self._heap)
            if not future.done():
                future.set_result(None)
                count -= 1
        if len(self._heap) > 2 * self.held + 64:
            self._heap = [entry for entry in self._heap if not entry[2].done()]
            heapq.heapify(self._heap)
