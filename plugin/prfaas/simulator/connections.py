"""The HTTP connections that a door keeps to one server, as the router's pool does: one that rests keeps the
window that it has reached, so that a prompt sent by it doesn't start slowly again.

That holds where the kernel is told so (`net.ipv4.tcp_slow_start_after_idle=0`), as in the testbed's sites.
Where packets are lost it reaches about what CUBIC carries at that loss (flows.stream_ceiling_bps); a prompt
goes by one connection, where pumps spread theirs over several. Held against single connections over the
emulated link, means of 15 at 20 ms and 1% loss, the bytes' own time off: 160 KB 60 to 91 ms (82 here), 640 KB
0.73 s on a kept one (0.64 here) and 0.37 s on a fresh one, which stays above its mean for a while.
"""

from __future__ import annotations

import math

from prfaas.simulator.flows import (
    K_INITIAL_WINDOW,
    K_MSS_BYTES,
    further_rounds,
    repeated_late_s,
    stream_ceiling_bps,
)

K_KEEP_ALIVE_S = 4.0  # as the router's
K_COLD_BYTES = float(K_INITIAL_WINDOW * K_MSS_BYTES)


class Connections:
    """To one server. `now` never goes back."""

    def __init__(self) -> None:
        self._idle: list[tuple[float, float]] = []
        """Since when, and the window, bytes; the last one that was given back is taken first."""

    def rests(self, now: float) -> bool:
        """Whether one is kept that a request could take now."""
        return bool(self._idle) and now - self._idle[-1][0] <= K_KEEP_ALIVE_S

    def send(self, sent_bytes: float, now: float, rtt_s: float, loss: float = 0.0) -> tuple[float, float]:
        """A request of so many bytes: how long its last byte waits to leave, beyond the way over, and the
        window, bytes, that its connection has once all is acknowledged.
        """
        window_bytes = K_COLD_BYTES
        if self._idle:
            since_s, kept_bytes = self._idle.pop()
            if now - since_s <= K_KEEP_ALIVE_S:
                window_bytes = kept_bytes
            else:
                self._idle.clear()  # those below it rest for longer still
        if loss > 0 and rtt_s > 0:
            return self._lossy(sent_bytes, window_bytes, rtt_s, loss)
        rounds = further_rounds(sent_bytes, window_bytes)
        # A segment more for each that is acknowledged, as long as the window is what limits.
        return rounds * rtt_s, window_bytes + sent_bytes if rounds else window_bytes

    @staticmethod
    def _lossy(sent_bytes: float, window_bytes: float, rtt_s: float, loss: float) -> tuple[float, float]:
        """Until the first packet is lost, on average the one in 1/loss, the window grows as on a clean link;
        what is left goes at the rate that CUBIC keeps at that loss.
        """
        kept_bytes = stream_ceiling_bps(rtt_s, loss, "cubic", math.inf) * rtt_s / 8
        window_bytes = min(window_bytes, max(K_COLD_BYTES, kept_bytes))
        clean_bytes = min(sent_bytes, K_MSS_BYTES / loss)
        rounds = further_rounds(clean_bytes, window_bytes)
        rounds += math.ceil((sent_bytes - clean_bytes) / kept_bytes)
        late_s = repeated_late_s(rtt_s, loss, sent_bytes, kept_bytes / rtt_s)
        return rounds * rtt_s + late_s, window_bytes + sent_bytes if rounds else window_bytes

    def release(self, window_bytes: float, now: float) -> None:
        """Its answer has come."""
        self._idle.append((now, window_bytes))
