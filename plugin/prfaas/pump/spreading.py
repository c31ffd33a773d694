"""Small transfers, and the last of large ones, over all streams of a peer: why is in transfer/spread.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prfaas.pump import gauges
from prfaas.pump.loop import Loop
from prfaas.pump.stream import Stream
from prfaas.pump.tcpinfo import TcpInfo
from prfaas.transfer.spread import Allowance, by_room, little_left

K_ROOM_S = 0.002
"""How often streams whose windows were full are looked at while little is left to send."""


class Spreading:
    """Which streams may take a block while little is left. `look`: called when a window may have opened."""

    def __init__(self, loop: Loop, look: Callable[[float], None]) -> None:
        self._loop, self._look_at = loop, look
        self._allowance = Allowance()
        self._windows_bytes = 0
        self._looking = False
        self._first_until_s = 0.0

    def measure(self, infos: Sequence[TcpInfo]) -> None:
        """What the streams' windows hold now."""
        self._windows_bytes = gauges.windows_bytes(infos)

    def begins(self, infos: Sequence[TcpInfo], now: float) -> None:
        """There is something to send after a rest. `infos`: of all streams."""
        self.measure(infos)
        self._first_until_s = now + gauges.mean_rtt_s(infos) if self._windows_bytes else 0.0

    def is_on(self, backlog_bytes: int, now: float) -> bool:
        """Whether what waits is to be spread."""
        first = backlog_bytes > 0 and now < self._first_until_s
        return first or little_left(backlog_bytes, self._windows_bytes)

    def with_room(self, able: Sequence[Stream], infos: Sequence[TcpInfo], now: float) -> list[Stream]:
        """Those of `able` that have room, the most first, and what they may take by now. `infos`: of all
        streams, just sampled.
        """
        self.measure(infos)
        self._allowance.refill(now, self._windows_bytes, gauges.mean_rtt_s(infos))
        return by_room({s: s.room_bytes() for s in able})

    def may_take(self, stream: Stream) -> bool:
        return self._allowance.open and stream.room_bytes() > 0

    def spent(self, sent_bytes: int) -> None:
        self._allowance.spent(sent_bytes)

    def look_again(self, now: float) -> None:
        """What no window had room for waits for whichever opens first."""
        if not self._looking:
            self._looking = True
            self._loop.call_at(now + K_ROOM_S, self._look)

    def _look(self, now: float) -> None:
        self._looking = False
        self._look_at(now)
