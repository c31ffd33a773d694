"""What TCP can carry: the ceiling that loss puts on a stream, and how it gathers speed."""

from __future__ import annotations

import math
from typing import Literal

K_MSS_BYTES = 1448  # payload of a full frame with timestamps
K_FRAME_BYTES = 1514  # the same with all its headers: what a link's rate counts
K_INITIAL_WINDOW = 10  # segments, RFC 6928
K_BBR_LOSS_LIMIT = 0.15  # beyond this loss BBR's model of the path breaks down
K_BBR_PROBE, K_BBR_CYCLE = 1.25, 8  # of its estimate, in one of so many round trips
K_BBR_WINDOW = 2.0  # of what its estimate carries in a round trip
K_RTO_MIN_S = 0.2  # Linux's TCP_RTO_MIN, beyond the smoothed round trip
K_LEAST_LOSS, K_MOST_LOSS = 1e-9, 0.4  # less is none; with more, nothing that is said here holds


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


def rto_s(rtt_s: float) -> float:
    """A stream's retransmission time-out on a path whose round trips are steady."""
    return rtt_s + K_RTO_MIN_S


def further_rounds(sent_bytes: float, window_bytes: float = K_INITIAL_WINDOW * K_MSS_BYTES) -> int:
    """Round trips that a stream waits before the last of so many bytes may leave: its window, a cold one's
    at first, doubles.
    """
    return max(0, math.ceil(math.log2(sent_bytes / window_bytes + 1.0)) - 1)


def repeated_late_s(rtt_s: float, loss: float, sent_bytes: float, rate_bytes_per_s: float) -> float:
    """What a transfer's end waits, on average, for what was lost of its last round trip to come again: a
    round trip for each time that at least one of those packets is lost.
    """
    segments = max(1.0, min(sent_bytes, rate_bytes_per_s * rtt_s) / K_MSS_BYTES)
    rounds, lost = 0.0, min(loss, K_MOST_LOSS)
    while lost > K_LEAST_LOSS:
        again = 1.0 - math.pow(1.0 - lost, segments)
        if again < K_LEAST_LOSS:
            break
        rounds += again
        lost *= min(loss, K_MOST_LOSS)
    return rtt_s * rounds


def answered_late_s(rtt_s: float, loss: float) -> float:
    """What an answer of one packet is late by, on average, for having been lost: nothing that follows shows
    the loss, so that the time-out does, each time twice as long (RFC 6298 section 5.5).
    """
    loss = min(loss, K_MOST_LOSS)
    return loss * rto_s(rtt_s) / (1.0 - 2.0 * loss)


def standing_queue(
    rate_bytes_per_s: float, rtt_s: float, streams: int, buffer_bytes: float, busy_s: float
) -> tuple[float, float]:
    """Bytes that wait before a link which BBR's streams alone have kept busy for so long, and the share of
    packets that finds no room there.

    Each stream's estimate is the most that it got in ten round trips, which is what it had while it probed
    and the others didn't. So once each has probed they believe in more than there is, and their queue grows
    by the difference (Cardwell et al., ACM Queue 2016; Ware et al., IMC 2019). A window of twice the estimate
    and three bursts (Linux's tcp_bbr.c: cwnd_gain, bbr_quantization_budget) ends that, where the buffer
    doesn't before. Beyond the path's own 1%, iperf3 lost 0, 8, 8, 12 and 15% by 1, 4, 8, 16 and 32 streams
    (200 Mbit/s, 40 ms, a buffer of a round trip; results/bench), pumps 13% by 4; here 0, 15, 18, 19 and 19%.
    """
    believed = K_BBR_PROBE * streams / (streams - 1 + K_BBR_PROBE)
    bandwidth_delay_bytes = rate_bytes_per_s * rtt_s
    burst_bytes = max(2 * K_MSS_BYTES, rate_bytes_per_s / streams * 1e-3)
    windows_bytes = K_BBR_WINDOW * believed * bandwidth_delay_bytes + 3 * streams * burst_bytes
    most_bytes = max(0.0, windows_bytes - bandwidth_delay_bytes)
    grown_bytes = (believed - 1.0) * rate_bytes_per_s * max(0.0, busy_s - K_BBR_CYCLE * rtt_s)
    if buffer_bytes <= min(most_bytes, grown_bytes):
        return buffer_bytes, 1.0 - 1.0 / believed
    return min(most_bytes, grown_bytes), 0.0


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
