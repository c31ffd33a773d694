"""When a peer that didn't answer is dialled again: after a growing, bounded pause."""

from __future__ import annotations

import random

K_BACKOFF_FIRST_S = 0.05
K_BACKOFF_MOST_S = 1.0


class Backoff:
    """Failures in a row, and the time of the next try. Times are the caller's monotonic seconds."""

    def __init__(self, now: float) -> None:
        self.next_s = now
        self.failures = 0
        self._first_s: float | None = None
        self._refused = False

    def failed(self, now: float, *, refused: bool) -> None:
        """A try failed. `refused`: somebody was there, and said no."""
        self._refused = refused
        self.failures += 1
        if self._first_s is None:
            self._first_s = now
        pause_s = min(K_BACKOFF_MOST_S, K_BACKOFF_FIRST_S * 2 ** min(self.failures, 10))
        self.next_s = now + pause_s * random.uniform(0.75, 1.25)

    def succeeded(self, now: float) -> None:
        self.failures = 0
        self._first_s = None
        self.next_s = now

    def wait(self, now: float) -> None:
        """A stream that had worked was lost: not at once again."""
        self.next_s = max(self.next_s, now + K_BACKOFF_FIRST_S)

    def refused_s(self, now: float) -> float:
        """How long nothing but refusals has come; 0 when the last try wasn't refused."""
        return now - self._first_s if self._refused and self._first_s is not None else 0.0
