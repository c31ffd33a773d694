"""The one loop: epoll over sockets, and timers. Single-threaded; whatever is ready gets a bounded turn."""

from __future__ import annotations

import heapq
import itertools
import selectors
import time
from collections.abc import Callable
from typing import Protocol


class Ready(Protocol):
    """Something with a file descriptor in the loop."""

    def on_ready(self, mask: int, now: float) -> None: ...


class Loop:
    """Register `Ready` objects and timers; `run` until `stop`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._serial = itertools.count()
        self._again: list[tuple[Ready, int]] = []
        self._first: set[int] = set()
        self._running = False

    @staticmethod
    def now() -> float:
        return time.monotonic()

    def add(self, fd: int, mask: int, ready: Ready, *, first: bool = False) -> None:
        """`first`: served before others that are ready at once (servers' messages before peers' frames)."""
        self._selector.register(fd, mask, ready)
        if first:
            self._first.add(fd)

    def modify(self, fd: int, mask: int, ready: Ready) -> None:
        self._selector.modify(fd, mask, ready)

    def remove(self, fd: int) -> None:
        self._first.discard(fd)
        try:
            self._selector.unregister(fd)
        except (KeyError, ValueError):
            pass

    def call_at(self, when: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._timers, (when, next(self._serial), call))

    def call_again(self, ready: Ready, mask: int) -> None:
        """Another turn soon, though its descriptor may not be ready: it holds bytes of its own (TLS)."""
        self._again.append((ready, mask))

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        self._running = True
        while self._running:
            self.turn(1.0)

    def turn(self, max_wait_s: float) -> None:
        """One round: wait at most so long, serve all that is ready, then the timers that are due."""
        now = self.now()
        wait_s = max_wait_s
        if self._again:
            wait_s = 0.0
        elif self._timers:
            wait_s = min(wait_s, max(0.0, self._timers[0][0] - now))
        ready = self._selector.select(wait_s)
        now = self.now()
        if self._first:
            ready.sort(key=lambda item: item[0].fd not in self._first)
        for key, mask in ready:
            key.data.on_ready(mask, now)
        again, self._again = self._again, []
        for target, mask in again:
            target.on_ready(mask, now)
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2](now)

    def close(self) -> None:
        self._selector.close()
        self._timers.clear()
        self._again.clear()
