"""Requests that the policy keeps at the door: the most urgent ask again first when something was freed."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

K_WAKE = 4
"""Requests that ask again for one thing freed. One that goes through wakes the next, so that a freed resource
that the first don't want still finds its taker, and 1,000 waiting requests don't all ask at once."""


class HoldingPen:
    """A bounded set of waiting requests."""

    def __init__(self) -> None:
        self.held = 0
        self._heap: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    @contextmanager
    def place(self) -> Iterator[None]:
        """One request's stay, over all its waits."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    async def wait(self, urgency_s: float, timeout_s: float) -> None:
        """Until woken, or the time is up. Smaller urgency wakes first."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, (urgency_s, next(self._order), future))
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            pass
        finally:
            future.cancel()  # leaves the heap when it comes up

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
