"""Which streams carry a transfer's last blocks, or all of a small one's, and how fast they are handed out.

While much waits, a stream takes whatever its kernel lets it queue. With little left that would hand all of it
to the stream that is asked first, which then needs several round trips for what the windows of all together
carry in one. So then a stream takes a block only while its congestion window has room for it, the one with
the most room first, and what no window has room for waits here, for whichever opens first.

All windows at once are a burst of a whole round trip's bytes, which overflows queues before the link that the
link itself would have kept up with. So they are handed out at K_PACE of the rate that the windows allow,
K_BURST_SHARE of them at a time. For the same reason so is the first round trip of much after a rest: no
acknowledgements set its pace, and of all windows at once half was lost.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

K_WINDOWS = 1.0
"""Little is left when it is less than so many windows of all streams: about as many round trips."""

K_PACE = 1.25
K_BURST_BYTES, K_BURST_SHARE = 512 * 1024, 0.25
"""Most at once, and most of the windows, which hold up to what the link and the queue before it do."""
K_LOOKS_S = 0.004
"""But no less than the pace brings between two looks at the streams, or a fast link would wait for them."""

S = TypeVar("S", bound=Hashable)


def little_left(backlog_bytes: int, windows_bytes: int) -> bool:
    """Whether what waits is to be spread by room. `windows_bytes`: of all streams together; 0: unknown."""
    return 0 < backlog_bytes < K_WINDOWS * windows_bytes


def room_bytes(
    *, cwnd_bytes: int, pacing_bytes_per_s: float, rtt_s: float, in_flight_bytes: int, unsent_bytes: int
) -> int:
    """What a stream carries within a round trip besides what it has already; not positive when something
    waits there. Its window binds a loss-driven stream, its pace one that is driven by rate.
    """
    return int(min(cwnd_bytes, pacing_bytes_per_s * rtt_s)) - in_flight_bytes - unsent_bytes


def by_room(rooms_bytes: Mapping[S, int]) -> list[S]:
    """Those with room, the most first; equals in their order."""
    return sorted((s for s, room in rooms_bytes.items() if room > 0), key=lambda s: -rooms_bytes[s])


class Allowance:
    """Bytes that may be handed out now: a bucket that fills at the pace."""

    def __init__(self) -> None:
        self._bytes = float(K_BURST_BYTES)
        self._at_s: float | None = None

    def refill(self, now: float, windows_bytes: int, rtt_s: float) -> None:
        """Time has passed; all windows hold so much, and turn over in a round trip (0: unknown)."""
        since_s = 0.0 if self._at_s is None else now - self._at_s
        self._at_s = now
        pace = K_PACE * windows_bytes / rtt_s if rtt_s > 0 else float("inf")
        more = pace * since_s if since_s > 0 else 0.0
        most = float(K_BURST_BYTES)
        if windows_bytes and rtt_s > 0:
            most = max(min(most, K_BURST_SHARE * windows_bytes), pace * K_LOOKS_S)
        self._bytes = min(most, self._bytes + more)

    @property
    def open(self) -> bool:
        """Whether a block may go; it may be larger than what is left, and the next waits the longer."""
        return self._bytes > 0

    def spent(self, sent_bytes: int) -> None:
        self._bytes -= sent_bytes
