"""TCP_INFO and the few socket options of a stream, parsed with struct (linux/tcp.h; later fields where the
kernel has them).
"""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass

from prfaas.transfer import spread

K_TCP_NOTSENT_LOWAT = 25
K_SIOCOUTQNSD = 0x894B
K_DRY_BYTES = 4096
K_LONG_PATH_S = 0.002
K_OVERTAKEN_FROM_S = 0.004
K_OVERTAKEN_SHARE = 0.05
"""A least round trip below so much of the smoothed one, where packets overtook others, isn't the path's: no
queue makes ten round trips of one and lets packets pass it.
"""
K_UNSENT_LEAST_BYTES = 64 * 1024
K_UNSENT_SHARED_BYTES = 1 << 20
K_UNSENT_MOST_BYTES = 4 << 20
_INT, _U32 = struct.Struct("=i"), struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """What the kernel says of one connection. Zero where it doesn't say."""

    rtt_s: float
    min_rtt_s: float
    cwnd_packets: int
    mss_bytes: int
    unacked_packets: int
    notsent_bytes: int
    retransmitted_bytes: int
    sent_bytes: int
    """Payload of TCP, retransmissions included."""
    acked_bytes: int
    received_bytes: int
    delivery_rate_bps: float
    segments_out: int
    segments_in: int
    app_limited: bool = False
    """The kernel's last rate sample is of a stream that had nothing to send for a part of it."""
    pacing_rate_bps: float = 0.0
    reorderings: int = 0
    """How often a packet was found to have overtaken others."""

    @property
    def is_overtaken(self) -> bool:
        """Whether single packets have saved so much of the way that the least round trip isn't the path's.

        netem lets a packet that overtakes skip the whole delay. A rate-driven control (BBR) holds no more in
        flight than twice the least round trip has room for: 8 Mbit/s of 100 at 150 ms.
        """
        return self.reorderings > 0 and self.is_doubtful

    @property
    def is_doubtful(self) -> bool:
        """Whether the least round trip is the path's only if all the rest is a queue."""
        return self.rtt_s >= K_OVERTAKEN_FROM_S and self.min_rtt_s < K_OVERTAKEN_SHARE * self.rtt_s

    @property
    def path_rtt_s(self) -> float:
        """The shortest round trip that can be the path's; 0 when unknown."""
        return self.rtt_s if self.is_overtaken else self.min_rtt_s

    @property
    def rate_bps(self) -> float:
        """What it may send now: as it is paced, but no more than its window in a round trip. The last rate
        sample alone is often of a moment in which it was held up.
        """
        window_bps = self.cwnd_packets * self.mss_bytes * 8 / self.rtt_s if self.rtt_s else 0.0
        return max(self.delivery_rate_bps, min(self.pacing_rate_bps, window_bps))


def _u32(data: bytes, at: int) -> int:
    return int(_U32.unpack_from(data, at)[0]) if len(data) >= at + 4 else 0


def _u64(data: bytes, at: int) -> int:
    return int(_U64.unpack_from(data, at)[0]) if len(data) >= at + 8 else 0


def parse(data: bytes) -> TcpInfo:
    """struct tcp_info as getsockopt gives it."""
    mss = _u32(data, 16)
    return TcpInfo(
        rtt_s=_u32(data, 68) / 1e6,
        min_rtt_s=_u32(data, 148) / 1e6,
        cwnd_packets=_u32(data, 80),
        mss_bytes=mss,
        unacked_packets=_u32(data, 24),
        notsent_bytes=_u32(data, 144),
        # Kernels before 4.19 count retransmitted segments alone.
        retransmitted_bytes=_u64(data, 208) if len(data) >= 216 else _u32(data, 100) * mss,
        sent_bytes=_u64(data, 200),
        acked_bytes=_u64(data, 120),
        received_bytes=_u64(data, 128),
        delivery_rate_bps=_u64(data, 160) * 8.0,
        segments_out=_u32(data, 136),
        segments_in=_u32(data, 140),
        app_limited=len(data) > 7 and bool(data[7] & 1),
        pacing_rate_bps=_u64(data, 104) * 8.0,
        reorderings=_u32(data, 220),
    )


def parse_room(data: bytes) -> int:
    """Bytes that the stream carries within a round trip besides what it has (transfer/spread.py)."""
    mss = _u32(data, 16)
    unacked, sacked, lost, retransmitted = (_u32(data, at) for at in (24, 28, 32, 36))
    return spread.room_bytes(
        cwnd_bytes=_u32(data, 80) * mss,
        pacing_bytes_per_s=_u64(data, 104),
        rtt_s=_u32(data, 68) / 1e6,
        in_flight_bytes=(unacked - sacked - lost + retransmitted) * mss,
        unsent_bytes=_u32(data, 144),
    )


def room_bytes(sock: socket.socket) -> int:
    """See parse_room; 0 when the socket can't say (closed)."""
    try:
        return parse_room(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
    except OSError:
        return 0


def unsent_bytes(info: TcpInfo, wait_s: float, n_streams: int) -> int:
    """What the kernel may hold unsent, to last it for `wait_s` at the stream's rate (it asks for more at half
    of that).
    """
    wanted = K_UNSENT_MOST_BYTES
    if info.path_rtt_s >= K_LONG_PATH_S:
        wanted = int(info.rate_bps / 8 * wait_s)
    # A rate measured while too little was unsent is too low: without a floor each holds down the other.
    least = max(K_UNSENT_LEAST_BYTES, K_UNSENT_SHARED_BYTES // n_streams)
    return max(least, min(K_UNSENT_MOST_BYTES, wanted))


def is_dry(sock: socket.socket) -> bool:
    """Whether the kernel has hardly anything of it left to send."""
    try:
        (unsent,) = _INT.unpack(fcntl.ioctl(sock.fileno(), K_SIOCOUTQNSD, bytes(_INT.size)))
    except (OSError, ValueError):
        return False
    return bool(unsent < K_DRY_BYTES)


def read(sock: socket.socket) -> TcpInfo | None:
    """None when the socket can't say (closed)."""
    try:
        return parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
    except OSError:
        return None


def control_for(wanted: str, info: TcpInfo | None, overtaken: bool) -> str:
    """The congestion control for a stream by what is known of its path (`overtaken`: gauges.is_overtaken).

    "auto" is bbr on a long path, where loss costs a loss-driven control most of its rate, and cubic on a
    short one, where pacing costs more than loss, and where the least round trip misleads bbr.
    """
    if wanted != "auto":
        return wanted
    is_long = info is not None and info.min_rtt_s >= K_LONG_PATH_S
    return "bbr" if is_long and not overtaken else "cubic"


def set_congestion_control(sock: socket.socket, name: str) -> str:
    """Try `name`; the one in force, whichever it is."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except OSError:
        pass
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
    except OSError:
        return ""


def prepare(sock: socket.socket, notsent_lowat_bytes: int) -> None:
    """Options of every stream: no Nagle, keep-alive, a short unsent queue (so that order is decided late)."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    set_notsent_lowat(sock, notsent_lowat_bytes)


def give_up_after(sock: socket.socket, seconds: float) -> None:
    """End the connection when what it sends isn't acknowledged for so long."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
    except OSError:
        pass


def set_notsent_lowat(sock: socket.socket, lowat_bytes: int) -> None:
    """Most bytes that wait unsent in the kernel before the socket stops being writable."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, K_TCP_NOTSENT_LOWAT, lowat_bytes)
    except OSError:
        pass


def abort(sock: socket.socket) -> None:
    """Close with a reset, so that nothing queued is delivered later."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass
    sock.close()
