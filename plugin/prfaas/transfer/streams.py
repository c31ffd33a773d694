"""How many TCP connections a peer needs, from what they measure.

One loss-driven stream carries about MSS/RTT * 1.22/sqrt(p) (Mathis et al., 1997), so a link with loss p
that isn't congestion needs more of them, but not any number: which is found by climbing.py from the goodput
that the receiver acknowledges. A far peer has K_FAR_STREAMS from the start, for each step costs tens of round
trips there, and never fewer. Streams once opened stay open: those beyond the number rest, and are warm when
it grows again.

A rate-driven control (BBR) doesn't slow down for loss, and many such streams only fill each other's queue:
32 of them sent half of all bytes twice at 150 ms and 1% loss, where 4 carried 1.4 times as much. They stay at
K_FAR_RATE_DRIVEN. Two would carry a little more there (87 to 89 of 100 Mbit/s, begin and end included, where
4 carried 82) and send half as much twice at 40 ms, but Linux's default buffers hold 160 Mbit/s a stream at
150 ms, and on a faster link each stream fewer is a part of the rate.
"""

from __future__ import annotations

from prfaas.transfer.climbing import Climb, Look

K_LOOK_RTT = 10.0
K_LOOK_S = 0.5
K_REST_S = 2.0
"""Without anything to send for so long the number goes back to the last good one."""
K_QUEUE_S = 0.003
K_QUEUE_SHARE = 0.15
"""A smoothed round trip longer than the shortest by this much (and share of it): packets wait."""
K_FAR_S = 0.01
K_FAR_STREAMS = 8
K_FAR_RATE_DRIVEN = 4
K_UNMEASURED_BYTES = 64 * 1024
K_LONG_PATH_S = 0.002
"""On a shorter path a lost packet is mended at once, and more streams are only more work."""


class StreamCount:
    """Call `observe` several times in K_LOOK_S; `wanted` is the number to use."""

    def __init__(self, minimum: int, maximum: int, *, remembered: int = 0) -> None:
        """`remembered`: the number that was good for this path before; 0: nothing is known of it."""
        self._climb = Climb(minimum, maximum, remembered=remembered)
        self._since_s: float | None = None
        self._busy_s: float | None = None
        self._acked = self._sent = self._lost = 0
        self._queue_s = 0.0
        self.goodput_bps = 0.0
        self.loss = 0.0

    @property
    def wanted(self) -> int:
        return self._climb.wanted

    @property
    def good(self) -> int:
        """The number that has carried most so far."""
        return self._climb.good

    def observe(
        self, now: float, *, open_streams: int, acked_bytes: int, sent_bytes: int, retransmitted_bytes: int,
        rtt_s: float, backlogged: bool, min_rtt_s: float = 0.0, rate_driven: bool = False,
    ) -> int:  # fmt: skip
        """Totals over all streams since the start, of which `acked_bytes` is the receiver's word; the mean
        smoothed and the least round trip of any (0: unknown), whether the streams are rate-driven and whether
        more waits to be sent; the number wanted.
        """
        shortest_s = min_rtt_s or rtt_s
        if shortest_s >= K_FAR_S:
            self._climb.at_least(K_FAR_RATE_DRIVEN if rate_driven else K_FAR_STREAMS)
        if not backlogged and self._busy_s is not None and now - self._busy_s > K_REST_S:
            self._climb.rest()
            self._busy_s = None
        elif backlogged:
            self._busy_s = now
        if not backlogged or open_streams < self.wanted or self._since_s is None:
            # Without a backlog the rate says nothing; while streams are still opening, neither.
            self._restart(now, acked_bytes, sent_bytes, retransmitted_bytes)
            return self.wanted
        self._queue_s = max(self._queue_s, rtt_s - shortest_s)
        elapsed_s = now - self._since_s
        if elapsed_s < max(K_LOOK_S, K_LOOK_RTT * rtt_s):
            return self.wanted
        self.loss = max(0.0, (retransmitted_bytes - self._lost) / max(sent_bytes - self._sent, 1))
        self.goodput_bps = 8.0 * (acked_bytes - self._acked) / elapsed_s
        # A queue that overflowed was long at some time since the last look, however short it is now.
        full = self._queue_s > max(K_QUEUE_S, K_QUEUE_SHARE * shortest_s)
        self._restart(now, acked_bytes, sent_bytes, retransmitted_bytes)
        short = rtt_s < K_LONG_PATH_S
        self._climb.look(Look(self.goodput_bps, self.loss, full), may_grow=not (rate_driven or short))
        return self.wanted

    def _restart(self, now: float, acked: int, sent: int, lost: int) -> None:
        self._since_s, self._acked, self._sent, self._lost = now, acked, sent, lost
        self._queue_s = 0.0


def block_bytes_for(rate_per_stream_bps: float, rtt_s: float | None, most_bytes: int) -> int:
    """The block size that keeps one block's time on a stream near 20 ms, in powers of two from 16 KiB to
    `most_bytes`.

    Small blocks let a short transfer spread over all streams and end on all at once; large ones cost fewer
    turns. Without a measured rate: large on a short path, K_UNMEASURED_BYTES on a long or unknown (None) one:
    a cold stream that holds a block of 2 MiB brings its transfer's end seconds later than the others do.
    """
    if rate_per_stream_bps <= 0:
        short = rtt_s is not None and rtt_s < K_LONG_PATH_S
        return most_bytes if short else min(most_bytes, K_UNMEASURED_BYTES)
    size = 16 * 1024
    while size * 2 <= most_bytes and size * 2 * 8 / rate_per_stream_bps <= 0.02:
        size *= 2
    return min(size, most_bytes)
