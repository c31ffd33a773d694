"""For how long the kernel is to send on its own, from what it was handed (it asks for more at half of that).

What it holds can't be overtaken by a more urgent block, so it is to be little. But a process that shares its
cores comes late, and a stream that runs dry meanwhile leaves the link idle, with a rate-driven control for
longer than that: it takes what it could send for what the link carries. On a machine with five times more
work than cores four streams carried 0.92 of iperf3's goodput with 60 ms, and 0.99 with 200.

So it begins with little and grows when a stream ran dry although more waited, and falls again slowly.
"""

from __future__ import annotations

K_LEAST_S = 0.06
K_MOST_S = 0.4
K_GROWS = 1.5
K_SAME_S = 0.03
"""Streams that ran dry within so long did so by one absence."""
K_HALVES_S = 30.0


class Slack:
    """`now` doesn't go back."""

    def __init__(self) -> None:
        self._s = K_LEAST_S
        self._at_s: float | None = None

    def seconds(self, now: float) -> float:
        """What the kernel is to hold lasts for so long."""
        since_s = 0.0 if self._at_s is None else now - self._at_s
        return max(K_LEAST_S, self._s * float(0.5 ** (since_s / K_HALVES_S)))

    def ran_dry(self, now: float) -> bool:
        """A stream had sent all that it held, and more waited to be sent. Whether that makes it more."""
        if self._at_s is not None and now - self._at_s < K_SAME_S:
            return False
        before_s = self.seconds(now)
        self._s, self._at_s = min(K_MOST_S, K_GROWS * before_s), now
        return self._s > before_s
