"""Figures of a peer's streams together, from what the kernel says of each."""

from __future__ import annotations

from collections.abc import Sequence

from prfaas.pump.tcpinfo import K_LONG_PATH_S, TcpInfo


def rtt_s(infos: Sequence[TcpInfo]) -> float:
    """The smallest smoothed round trip; 0 when unknown."""
    return min((i.rtt_s for i in infos if i.rtt_s), default=0.0)


def min_rtt_s(infos: Sequence[TcpInfo]) -> float:
    """The shortest round trip of the path that any has seen; 0 when unknown. Where only packets that overtook
    others have made one, the smoothed one in the mean.
    """
    overtaken = is_overtaken(infos)
    believed = [i.min_rtt_s for i in infos if i.min_rtt_s and not (overtaken and i.is_doubtful)]
    if overtaken and not believed:
        return mean_rtt_s(infos)
    return min(believed, default=0.0)


def is_overtaken(infos: Sequence[TcpInfo]) -> bool:
    """Whether packets of any stream saved most of the way: it is one path for all of them."""
    return any(i.is_overtaken for i in infos)


def mean_rtt_s(infos: Sequence[TcpInfo]) -> float:
    """The smoothed round trip in the mean, each by its window; 0 when unknown."""
    known = [i for i in infos if i.rtt_s]
    packets = sum(i.cwnd_packets for i in known)
    return sum(i.rtt_s * i.cwnd_packets for i in known) / packets if packets else 0.0


def windows_bytes(infos: Sequence[TcpInfo]) -> int:
    """What the windows of all hold; 0 on a short path or with one stream, where there is nothing to spread
    (transfer/spread.py).
    """
    if len(infos) < 2 or min_rtt_s(infos) < K_LONG_PATH_S:
        return 0
    return sum(i.cwnd_packets * i.mss_bytes for i in infos)


def all_app_limited(infos: Sequence[TcpInfo]) -> bool:
    """Whether the kernel says of every stream that its sender was the limit: none was kept full."""
    return all(i.app_limited for i in infos)


def unsent_s(infos: Sequence[TcpInfo]) -> float:
    """How long the kernel has to send from what it holds unsent, at the rate that it last delivered."""
    rate_bps = sum(i.delivery_rate_bps for i in infos)
    return sum(i.notsent_bytes for i in infos) * 8 / rate_bps if rate_bps else 0.0
