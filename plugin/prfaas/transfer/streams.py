"""How many TCP connections a peer needs, from what they measure.

One loss-driven stream carries about MSS/RTT * 1.22/sqrt(p) (Mathis et al., 1997), so a link with loss p
that isn't congestion needs more of them. A far peer has K_FAR_STREAMS from the start, for each step costs
ten round trips there. While there is a backlog and packets are lost the number is doubled (fourfold above
0.5% loss, by half from K_FINE_FROM on), until packets wait in a queue: then the link is full, and the loss
is its own. Two steps that
bring less than K_GAIN more goodput although nothing waits end it too (two, for new streams take their time);
the number then stays, to be tried again after K_RETRY_S.

Slow start alone fills any link. What it leaves the streams with goes within seconds on a far path: 24 of them
fell from 195 to 115 Mbit/s in three, at 150 ms and 0.1%. So a goodput below K_FALLEN of what the link was
last seen full with, and no queue, is looked at after K_EARLY_RTT round trips and not ten.

A loss that has passed leaves more streams than are needed, each with its work and its memory. After K_CALM_S
of sending in which hardly a packet was lost a third of them goes, and so on, down to the number that the path
began with. A path that loses more than K_LOSS keeps all that it has, whatever loses: random loss wants them
(200 Mbit/s, 40 ms, 1%: 36 carried 110 Mbit/s, 48 136, 64 165), and a queue of the link's own, once it is
full of many streams, can't be told from it by what one sender sees.

A rate-driven control (BBR) doesn't slow down for loss, and many such streams only fill each other's queue:
32 of them sent half of all bytes twice at 150 ms and 1% loss, where 4 carried 1.4 times as much. They stay
at K_FAR_RATE_DRIVEN. Where packets overtake others by most of the way it is no use (pump/tcpinfo.py), and the
number grows as for a loss-driven one.
"""

from __future__ import annotations

K_LOSS = 2e-4
K_LOSS_HIGH = 5e-3
K_GAIN = 1.08
K_SETTLE_RTT = 10.0
K_SETTLE_S = 0.5
K_EARLY_RTT = 3.0
K_FALLEN = 0.85
K_FULL_S = 60.0
"""A link that was full so long ago may be another by now."""
K_RETRY_S = 15.0
K_QUEUE_S = 0.003
K_QUEUE_SHARE = 0.15
"""A smoothed round trip longer than the shortest by this much (and share of it): packets wait."""
K_FAR_S = 0.01
K_FAR_STREAMS = 8
K_FAR_RATE_DRIVEN = 4
K_FINE_FROM = 16
K_FRUITLESS = 2
K_UNMEASURED_BYTES = 64 * 1024
K_CALM_S = 15.0
K_FALL = 1.5
K_LONG_PATH_S = 0.002
"""On a shorter path a lost packet is mended at once, and more streams are only more work. The shortest round
trip tells: on a busy machine even loopback answers late, and resends for it."""


class StreamCount:
    """Call `observe` about every quarter of a second; `wanted` is the number to have open."""

    def __init__(self, minimum: int, maximum: int) -> None:
        self.wanted = self._first = minimum
        self._maximum = maximum
        self._calm_s = 0.0
        self._since_s: float | None = None
        self._acked = 0
        self._sent = 0
        self._lost = 0
        self._queue_s = 0.0
        self._before_bps: float | None = None
        self._resume_s = 0.0
        self._fruitless = 0
        self._full_bps = 0.0
        self._full_s = 0.0
        self.goodput_bps = 0.0
        self.loss = 0.0

    def observe(
        self, now: float, *, open_streams: int, acked_bytes: int, sent_bytes: int, retransmitted_bytes: int,
        rtt_s: float, backlogged: bool, min_rtt_s: float = 0.0, rate_driven: bool = False,
    ) -> int:  # fmt: skip
        """Totals over all streams since the start, the mean smoothed and the least round trip of any (0:
        unknown), whether the streams are rate-driven and whether more waits to be sent; the number wanted.
        """
        if (min_rtt_s or rtt_s) >= K_FAR_S:
            far = min(K_FAR_RATE_DRIVEN if rate_driven else K_FAR_STREAMS, self._maximum)
            self._first = max(self._first, far)
            self.wanted = max(self.wanted, self._first)
        if not backlogged or open_streams < self.wanted:
            # Without a backlog the rate says nothing; while streams are still opening, neither.
            self._restart(now, acked_bytes, sent_bytes, retransmitted_bytes)
            return self.wanted
        if self._since_s is None:
            self._restart(now, acked_bytes, sent_bytes, retransmitted_bytes)
        assert self._since_s is not None
        self._queue_s = max(self._queue_s, rtt_s - (min_rtt_s or rtt_s))
        elapsed_s = now - self._since_s
        if elapsed_s < max(K_SETTLE_S, K_EARLY_RTT * rtt_s):
            return self.wanted
        loss = max(0.0, (retransmitted_bytes - self._lost) / max(sent_bytes - self._sent, 1))
        goodput_bps = 8.0 * (acked_bytes - self._acked) / elapsed_s
        if elapsed_s < max(K_SETTLE_S, K_SETTLE_RTT * rtt_s) and (
            loss < K_LOSS or not self._has_fallen(now, goodput_bps, min_rtt_s or rtt_s)
        ):
            return self.wanted
        self.loss, self.goodput_bps = loss, goodput_bps
        queue_s = self._queue_s
        self._restart(now, acked_bytes, sent_bytes, retransmitted_bytes)
        if self._is_calm(elapsed_s, min_rtt_s or rtt_s):
            self.wanted = max(self._first, int(self.wanted / K_FALL))
        else:
            self._decide(now, queue_s, min_rtt_s or rtt_s, rate_driven)
        return self.wanted

    def _is_calm(self, elapsed_s: float, min_rtt_s: float) -> bool:
        """Whether there are more streams than the path began with, and has been no loss to keep them for."""
        calm = self.loss < K_LOSS or min_rtt_s < K_LONG_PATH_S
        self._calm_s = self._calm_s + elapsed_s if calm else 0.0
        if self._calm_s < K_CALM_S or self.wanted <= self._first:
            return False
        self._calm_s, self._before_bps = 0.0, None
        return True

    def _restart(self, now: float, acked: int, sent: int, lost: int) -> None:
        self._since_s, self._acked, self._sent, self._lost = now, acked, sent, lost
        self._queue_s = 0.0

    def _has_fallen(self, now: float, goodput_bps: float, min_rtt_s: float) -> bool:
        """Whether much less is carried than when the link was full, and nothing waits there. Not while a step
        is judged: new streams take their time.
        """
        if self._before_bps is not None or _is_full(self._queue_s, min_rtt_s):
            return False
        return now - self._full_s < K_FULL_S and goodput_bps < K_FALLEN * self._full_bps

    def _decide(self, now: float, queue_s: float, min_rtt_s: float, rate_driven: bool) -> None:
        # A queue that overflowed was long at some time since the last look, however short it is now.
        full = _is_full(queue_s, min_rtt_s)
        if full:
            self._fruitless = 0
            self._full_bps, self._full_s = self.goodput_bps, now
        elif self._before_bps is not None and self.goodput_bps < self._before_bps * K_GAIN:
            self._fruitless += 1
            if self._fruitless >= K_FRUITLESS:
                self._before_bps, self._resume_s, self._fruitless = None, now + K_RETRY_S, 0
                self._full_bps = 0.0
                return
        else:
            self._fruitless = 0
        if (
            self.loss < K_LOSS
            or rate_driven
            or full
            or min_rtt_s < K_LONG_PATH_S
            or self.wanted >= self._maximum
            or now < self._resume_s
        ):
            self._before_bps = None
            return
        self._before_bps = self.goodput_bps
        factor = 1.5 if self.wanted >= K_FINE_FROM else 4 if self.loss > K_LOSS_HIGH else 2
        self.wanted = min(self._maximum, int(self.wanted * factor))


def _is_full(queue_s: float, min_rtt_s: float) -> bool:
    return queue_s > max(K_QUEUE_S, K_QUEUE_SHARE * min_rtt_s)


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
