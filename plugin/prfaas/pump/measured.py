"""What the kernel says of a stream's connection, and the few options that follow from it."""

from __future__ import annotations

import socket

from prfaas.pump import tcpinfo
from prfaas.pump.handler import Counters

K_UNSENT_FIRST_BYTES = 256 * 1024


class Measured:
    """A connection's socket and its figures."""

    def __init__(self, sock: socket.socket, now: float) -> None:
        self.counters = Counters()
        self.info: tcpinfo.TcpInfo | None = None
        self.progress_s = now
        self.acked_bytes = 0
        self.congestion_control = ""
        self._asked_control = ""
        self._unsent_bytes = K_UNSENT_FIRST_BYTES
        self._sock = sock

    def sample(self, now: float) -> None:
        """Read TCP_INFO; bytes that the peer's kernel acknowledged count as progress."""
        info = tcpinfo.read(self._sock)
        if info is None:
            return
        if info.acked_bytes > self.acked_bytes or (not info.unacked_packets and not info.notsent_bytes):
            self.progress_s = now
        self.info, self.acked_bytes = info, info.acked_bytes
        self.counters.take(info)

    @property
    def has_unacked(self) -> bool:
        """Whether the kernel has anything yet that the peer's hasn't."""
        return self.info is None or self.info.unacked_packets > 0 or self.info.notsent_bytes > 0

    def is_dry(self) -> bool:
        """Whether the kernel has hardly anything of it left to send."""
        return tcpinfo.is_dry(self._sock)

    def room_bytes(self) -> int:
        """What it carries within a round trip besides what its kernel has already."""
        return tcpinfo.room_bytes(self._sock)

    def set_congestion_control(self, wanted: str, overtaken: bool) -> None:
        """By what the path is, as far as is known, and whether packets overtake there. The kernel isn't asked
        twice for the same.
        """
        name = tcpinfo.control_for(wanted, self.info, overtaken)
        if name != self._asked_control:
            self._asked_control = name
            self.congestion_control = tcpinfo.set_congestion_control(self._sock, name)

    def set_unsent(self, wait_s: float, n_streams: int) -> None:
        """Let the kernel hold `wait_s` of the stream's rate unsent: enough to outlast our absence, and no
        more, for what it holds can't be overtaken by a more urgent block.
        """
        if self.info is None:
            return
        wanted = tcpinfo.unsent_bytes(self.info, wait_s, n_streams)
        if not self._unsent_bytes / 1.5 < wanted < self._unsent_bytes * 1.5:
            self._unsent_bytes = wanted
            tcpinfo.set_notsent_lowat(self._sock, wanted)
