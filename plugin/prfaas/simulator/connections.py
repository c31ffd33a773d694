"""The HTTP connections that a door keeps to one server, as the router's pool does: one that rests keeps the
window that it has reached, so that a prompt sent by it doesn't start slowly again.

That holds where the kernel is told so (`net.ipv4.tcp_slow_start_after_idle=0`), as in the testbed's sites.
"""

from __future__ import annotations

from prfaas.simulator.flows import K_INITIAL_WINDOW, K_MSS_BYTES, further_rounds

K_KEEP_ALIVE_S = 4.0  # as the router's
K_COLD_BYTES = float(K_INITIAL_WINDOW * K_MSS_BYTES)


class Connections:
    """To one server. `now` never goes back."""

    def __init__(self) -> None:
        self._idle: list[tuple[float, float]] = []
        """Since when, and the window, bytes; the last one that was given back is taken first."""

    def send(self, sent_bytes: float, now: float) -> tuple[int, float]:
        """A request of so many bytes: the round trips that it waits before its last byte may leave, and the
        window, bytes, that its connection has once all is acknowledged.
        """
        window_bytes = K_COLD_BYTES
        if self._idle:
            since_s, kept_bytes = self._idle.pop()
            if now - since_s <= K_KEEP_ALIVE_S:
                window_bytes = kept_bytes
            else:
                self._idle.clear()  # those below it rest for longer still
        rounds = further_rounds(sent_bytes, window_bytes)
        # A segment more for each that is acknowledged, as long as the window is what limits.
        return rounds, window_bytes + sent_bytes if rounds else window_bytes

    def release(self, window_bytes: float, now: float) -> None:
        """Its answer has come."""
        self._idle.append((now, window_bytes))
