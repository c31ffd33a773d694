"""A peer's streams and transfers in figures: what the kernel counts, and whether there is work for them."""

from __future__ import annotations

from prfaas.pump import gauges
from prfaas.pump.handler import Counters, Handler
from prfaas.pump.stream import Stream
from prfaas.pump.tcpinfo import K_LONG_PATH_S, TcpInfo
from prfaas.transfer.sending import Sending
from prfaas.transfer.slack import Slack
from prfaas.transfer.starving import Starving


class PeerFigures(Handler):
    """The streams that are open to a peer, and what goes over them."""

    def __init__(self, sending: Sending, allowed_control: str, now: float) -> None:
        self.sending, self.allowed_control = sending, allowed_control
        self.counters = Counters()
        """Of closed streams."""
        self._streams: dict[int, Stream] = {}
        self._starving = Starving(now)
        self._slack = Slack()

    @property
    def n_ready(self) -> int:
        return sum(s.ready for s in self._streams.values())

    @property
    def streams(self) -> list[Stream]:
        return list(self._streams.values())

    @property
    def rtt_s(self) -> float:
        """The smallest smoothed RTT of the open streams; 0 when unknown."""
        return gauges.rtt_s(self._infos())

    @property
    def min_rtt_s(self) -> float:
        """The shortest round trip of the path that any stream has seen; 0 when unknown."""
        return gauges.min_rtt_s(self._infos())

    @property
    def queue_s(self) -> float:
        """How much longer than the shortest its streams' round trips are in the mean."""
        return max(0.0, gauges.mean_rtt_s(self._infos()) - self.min_rtt_s)

    def _infos(self) -> list[TcpInfo]:
        return [s.info for s in self._streams.values() if s.info is not None]

    def totals(self) -> Counters:
        """Counters of closed and open streams together."""
        total = Counters()
        total.add(self.counters)
        for stream in self._streams.values():
            total.add(stream.counters)
        return total

    def starved_s(self, now: float) -> float:
        """Time without anything to send that the receivers' windows had room for, since last asked."""
        self._note_work(now)
        return self._starving.take_s(now)

    def slack_s(self, now: float) -> float:
        """How long the kernel may send from what it holds: more than at first when we have come late."""
        return self._slack.seconds(now)

    def on_dry(self, stream: Stream, now: float) -> None:
        # On a short path the kernel sends whatever it gets at once.
        if self.sending.can_send() and self.min_rtt_s >= K_LONG_PATH_S and self._slack.ran_dry(now):
            n_ready = self.n_ready
            for each in self._streams.values():
                self._let_hold(each, n_ready, now)

    def _settle(self, stream: Stream, overtaken: bool, n_ready: int, now: float) -> None:
        """Ask the kernel how the stream does, and set its socket by that."""
        stream.sample(now)
        stream.set_congestion_control(self.allowed_control, overtaken)
        self._let_hold(stream, n_ready, now)

    def _let_hold(self, stream: Stream, n_ready: int, now: float) -> None:
        """As much unsent as our own lateness asks for."""
        stream.set_unsent(self.slack_s(now), max(1, n_ready))

    @property
    def app_limited(self) -> bool:
        """Whether the kernel says of all streams that they were not kept full."""
        return gauges.all_app_limited(self._infos())

    def _has_block(self, now: float) -> bool:
        """One that waits, or a second copy of one that is late."""
        return self.sending.backlog_bytes > 0 or self.sending.can_double(now)

    def _note_work(self, now: float) -> None:
        has_work = self.sending.can_send()
        if has_work != self._starving.starved:
            return
        lasts_s = 0.0
        if not has_work:
            for stream in self._streams.values():
                stream.sample(now)
            lasts_s = gauges.unsent_s(self._infos())
        self._starving.look(has_work, now, lasts_s)
