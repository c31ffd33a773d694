"""What TCP can carry: the ceiling that loss puts on a stream, and how it gathers speed."""

from __future__ import annotations

import math
from typing import Literal

K_MSS_BYTES = 1448  # payload of a full frame with timestamps
K_FRAME_BYTES = 1514  # the same with all its headers: what a link's rate counts
K_INITIAL_WINDOW = 10  # segments, RFC 6928
K_BBR_LOSS_LIMIT = 0.15  # beyond this loss BBR's model of the path breaks down


def stream_ceiling_bps(
    rtt_s: float, loss: float, control: Literal["cubic", "bbr"], capacity_bps: float
) -> float:
    """Most bits a second of payload that one stream carries at this loss.

    CUBIC: the larger of its own law (RFC 9438 section 5.1, AVG_W_cubic with C = 0.4) and Reno's
    (Mathis et al. 1997, 1.22 / sqrt(p)), which it never falls below. BBR repeats what was lost.
    """
    if loss <= 0 or rtt_s <= 0:
        return capacity_bps
    if loss >= 1:
        return 0.0
    if control == "bbr":
        share = 1 - loss if loss < K_BBR_LOSS_LIMIT else 0.05
        return capacity_bps * share
    window: float = max(1.054 * (rtt_s / loss) ** 0.75, 1.22 / math.sqrt(loss))
    return min(capacity_bps, window * K_MSS_BYTES * 8 / rtt_s)


def further_rounds(sent_bytes: float, window_bytes: float = K_INITIAL_WINDOW * K_MSS_BYTES) -> int:
    """Round trips that a stream waits before the last of so many bytes may leave: its window, a cold one's
    at first, doubles.
    """
    return max(0, math.ceil(math.log2(sent_bytes / window_bytes + 1.0)) - 1)


def repeated_late_s(rtt_s: float, loss: float, sent_bytes: float, rate_bytes_per_s: float) -> float:
    """What a transfer's end waits, on average, for what was lost of its last round trip to come again."""
    segments = min(sent_bytes, rate_bytes_per_s * rtt_s) / K_MSS_BYTES
    return float(rtt_s * (1.0 - math.pow(1.0 - loss, max(1.0, segments))))


def payload_share() -> float:
    """Part of a link's rate that is left for the engine's bytes, Ethernet, IP and TCP headers taken off."""
    return K_MSS_BYTES / K_FRAME_BYTES


def ramp_bps(rtt_s: float, streams: int, since_s: float) -> float:
    """What `streams` cold streams have reached `since_s` after they began: a window that doubles each RTT."""
    if rtt_s <= 0:
        return math.inf
    doublings = min(60.0, math.floor(since_s / rtt_s))
    first_bps = streams * K_INITIAL_WINDOW * K_MSS_BYTES * 8 / rtt_s
    return first_bps * math.pow(2.0, doublings)
