"""Virtual time: a heap of things to do. Equal times keep the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush

Call = Callable[[float], None]


class Agenda:
    """`now` only moves in `run`; what is asked for in the past happens now."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        """Handled so far."""
        self._heap: list[tuple[float, int, Call]] = []
        self._serial = 0
        self._background = 0

    def at(self, at_s: float, call: Call) -> None:
        """`call(now)` at `at_s`. There is no cancelling: a caller whose plan changed ignores the call."""
        self._serial = serial = self._serial + 1
        heappush(self._heap, (at_s if at_s > self.now else self.now, serial, call))

    def at_in_background(self, at_s: float, call: Call) -> None:
        """As `at`, for what only watches: while nothing else is planned, nothing goes on."""
        self._background += 1
        self.at(at_s, partial(self._watch, call))

    def _watch(self, call: Call, now: float) -> None:
        self._background -= 1
        call(now)

    @property
    def foreground(self) -> int:
        """Calls planned that aren't in the background."""
        return len(self._heap) - self._background

    def run(self, until_s: float = float("inf")) -> None:
        """Handle everything up to `until_s`."""
        heap, pop, handled = self._heap, heappop, 0
        while heap and heap[0][0] <= until_s:
            self.now, _, call = pop(heap)
            call(self.now)
            handled += 1
        self.events += handled
        if until_s != float("inf"):
            self.now = max(self.now, until_s)
