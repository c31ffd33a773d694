"""One peer that we send to: its streams, which are opened once, kept, and replaced when they are lost.

The peer may be away: it is dialled again (pump/dialling.py) for as long as transfers wait and their deadlines
allow. Only a peer that refuses every connection, or whose certificate is wrong, fails its transfers earlier.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from prfaas.config.pump import is_loopback, split_address
from prfaas.model.errors import LocalProtocolError, RemoteProtocolError
from prfaas.model.transfer import FailureReason
from prfaas.pump import gauges
from prfaas.pump.dialling import K_RESOLVING_S, Dialling, NotAllowed
from prfaas.pump.memory import Gone, OwnerMemory, Withdrawn
from prfaas.pump.packing import Packer
from prfaas.pump.peer_figures import PeerFigures
from prfaas.pump.spreading import Spreading
from prfaas.pump.stream import Stream, W
from prfaas.telemetry.log_lines import Burst
from prfaas.transfer.frames import (
    K_VERSION_OLDEST,
    FrameType,
    Header,
    Hello,
    Open,
    Refuse,
    Window,
    agree_version,
    decode_acks,
    decode_message,
    message_frame,
)
from prfaas.transfer.plans import Blocks
from prfaas.transfer.sending import Failed, SendEvent, Sending
from prfaas.transfer.streams import StreamCount, block_bytes_for

if TYPE_CHECKING:
    from prfaas.pump.server import Pump

log = logging.getLogger(__name__)

K_TICK_S = 0.1
K_CONNECT_S = 3.0
K_HANDSHAKE_S = 5.0
K_CUT_S = 0.02
K_HEDGE_S = 0.04
K_LOG_QUIET_S = 5.0
K_SILENT_S = 1.0
K_FORGET_S = 60.0
"""A peer that went for good is forgotten: where servers come and go there are new addresses every day."""


class Peer(PeerFigures):
    """Transfers to `address`, over its streams."""

    def __init__(self, pump: Pump, address: str, now: float) -> None:
        self.pump, self.address, self.wanted_site = pump, address, ""
        self.site = ""
        super().__init__(Sending(pump.config.window_bytes), pump.config.congestion_control, now)
        self.count = StreamCount(pump.config.min_streams, pump.config.max_streams)
        self.boot: bytes | None = None
        self.version = K_VERSION_OLDEST
        """Of the protocol, as last agreed on."""
        self._sources: dict[int, tuple[OwnerMemory, tuple[int, int], Callable[[SendEvent], None]]] = {}
        self._dialling = Dialling(pump.loop, pump.trust, pump.resolver, address, self, now)
        self._spreading = Spreading(pump.loop, self.kick)
        self._keep_warm = self._paced = self._resolving = False
        self._packer = Packer(pump.config.faults)
        self._losses = Burst(K_LOG_QUIET_S)
        loop = pump.loop
        loop.call_at(now + K_TICK_S, self._tick)
        self._used_s = now
        self.alive = True

    # Asked by the pump

    def submit(
        self, site: str, transfer_id: int, opening: Open, plan_of: Callable[[int, int], Blocks],
        window_bytes: int, deadline_s: float, memory: OwnerMemory, guard: tuple[int, int],
        on_event: Callable[[SendEvent], None], now: float,
    ) -> None:  # fmt: skip
        """Begin a transfer to `site` (empty: whichever answers). `plan_of` makes its plan from a block size
        and a protocol version.

        Raises LocalProtocolError.
        """
        if site and site != (self.wanted_site or self.site or site):
            raise LocalProtocolError(
                f"{self.address} is site {self.wanted_site or self.site!r}, not {site!r}"
            )
        self.wanted_site = self.wanted_site or site
        most_bytes = self.pump.config.block_bytes
        if opening.lease_id:
            most_bytes = max(4096, min(most_bytes, window_bytes))
        plan = plan_of(self.block_bytes(most_bytes), self.version)
        opening.total_bytes, opening.n_blocks = plan.total_bytes, plan.n_blocks
        if not len(self.sending):
            self._spreading.begins(self._infos(), now)
        self.sending.submit(transfer_id, opening, plan, window_bytes, deadline_s, now)
        self._sources[transfer_id] = (memory, guard, on_event)
        self.prepare(now)
        self.kick(now)

    def prepare(self, now: float) -> None:
        """Have the streams open."""
        self._keep_warm, self._used_s = True, now
        self._dial(now)

    def block_bytes(self, most_bytes: int) -> int:
        # Nothing is known of a peer that isn't connected yet, but that it is this machine.
        rtt_s, n = self.rtt_s or (0.0 if self.is_local() else None), max(1, self.n_ready)
        rate = max(
            self.count.goodput_bps, sum(s.info.delivery_rate_bps for s in self._streams.values() if s.info)
        )
        return block_bytes_for(rate / n, rtt_s, most_bytes)

    def cancel(self, transfer_id: int, reason: FailureReason, detail: str, now: float) -> None:
        self._event(self.sending.fail(transfer_id, reason, detail), now)

    @property
    def last_error(self) -> str:
        return self._dialling.last_error

    def kick(self, now: float) -> None:
        """Let every stream that can take something have a turn."""
        self._note_work(now)
        if not self._has_block(now):
            return
        # Asked for each acknowledgement; while much waits hardly any stream can take more.
        able = [s for s in self._streams.values() if not s.waiting_to_write and s.ready]
        if able and self._spreads(now):
            for stream in able:
                stream.sample(now)
            able = self._spreading.with_room(able, self._infos(), now)
        for stream in able:
            if not self._has_block(now):
                return
            if stream.ready and not stream.waiting_to_write:
                stream.on_ready(W, now)
        if self.n_ready and self._spreads(now):
            self._spreading.look_again(now)
        self._note_work(now)

    def _spreads(self, now: float) -> bool:
        return self._spreading.is_on(self.sending.backlog_bytes, now)

    def is_given_up(self, now: float) -> bool:
        """Whether it doesn't answer, and for long nobody has wanted anything of it."""
        under_way = len(self.sending) or self._streams or self._dialling.is_trying
        return not under_way and now - self._used_s > K_FORGET_S

    def close(self, now: float) -> None:
        self.alive = False
        for stream in list(self._streams.values()):
            stream.close(now)
        self._streams.clear()

    def _dial(self, now: float) -> None:
        if not self.alive:
            return
        try:
            new = self._dialling.dial(
                wanted=self.count.wanted, n_open=len(self._streams), n_ready=self.n_ready, now=now
            )
        except NotAllowed as error:
            self._fail_all(FailureReason.PEER_UNTRUSTED, str(error), now)
            return
        self._streams.update((stream.index, stream) for stream in new)
        if self._dialling.is_resolving and not self._resolving:
            self._resolving = True
            self.pump.loop.call_at(now + K_RESOLVING_S, self._dial_resolved)

    def _dial_resolved(self, now: float) -> None:
        self._resolving = False
        self._dial(now)

    # Handler

    def check_certificate(self, certificate: Mapping[str, object]) -> str:
        return self.pump.trust.check_certificate(certificate, self.wanted_site)

    def our_hello(self, stream: Stream) -> Hello:
        return self.pump.hello(stream.index)

    def on_hello(self, stream: Stream, hello: Hello) -> int:
        version = agree_version(self.pump.config.protocol_versions, (hello.oldest, hello.newest))
        self.pump.check_site(stream, hello)
        if self.wanted_site and hello.site != self.wanted_site:
            stream.untrusted = f"site {hello.site!r} answers where {self.wanted_site!r} was expected"
            raise RemoteProtocolError(stream.untrusted)
        if self.boot is not None and hello.boot != self.boot:
            self._restarted(stream)
        self.boot, self.site, self.version = hello.boot, hello.site, version
        stream.peer_site = hello.site
        return version

    def _restarted(self, new: Stream) -> None:
        log.info("peer %s: another pump answers; what is under way is sent again", self.address)
        for name, stream in list(self._streams.items()):
            if stream is not new and stream.ready:
                stream.close(self.pump.loop.now())
                self._drop(name, stream)
        self.sending.on_peer_restarted()

    def on_ready(self, stream: Stream, now: float) -> None:
        self._settle(stream, gauges.is_overtaken(self._infos()), self.n_ready, now)
        self._dialling.succeeded(now)
        self.counters.streams_opened += 1
        self._observe(now)  # the first one tells how far the peer is, and so how many are wanted
        self._dial(now)

    def on_block(self, stream: Stream, header: Header, body: memoryview, address: int, now: float) -> None:
        raise RemoteProtocolError("a block on a stream that we opened")

    def on_frame(self, stream: Stream, header: Header, body: memoryview, now: float) -> None:
        kind = header.type
        if kind is FrameType.ACK:
            for transfer_id, block_id in decode_acks(body):
                self._event(self.sending.on_ack(transfer_id, block_id), now)
        elif kind is FrameType.NACK:
            stream.counters.corrupt_blocks += 1
            self._event(self.sending.on_nack(header.transfer_id, header.block_id), now)
        elif kind is FrameType.REFUSE:
            refuse = decode_message(body, Refuse)
            try:
                reason = FailureReason(refuse.reason)
            except ValueError:
                reason = FailureReason.BAD_REQUEST
            self._event(self.sending.on_refuse(header.transfer_id, reason, refuse.detail[:200]), now)
        elif kind is FrameType.WINDOW:
            window = decode_message(body, Window)
            self.sending.on_window(window.lease_id, window.window_bytes)
        elif kind is FrameType.LEDGER:
            self.pump.on_ledger_answer(self, body, now)
        elif kind is not FrameType.PONG:
            raise RemoteProtocolError(f"{kind.name} from a receiver")
        self.kick(now)

    def next_block(self, stream: Stream, now: float) -> int:
        if stream.is_cut or stream.is_retiring:
            return 0
        spread = self._spreads(now)
        if spread and not self._spreading.may_take(stream):
            self._spreading.look_again(now)
            return 0
        desk = self.pump.desks.get(self.site)
        if desk is not None and (wait_s := desk.wait_s(now)) > 0:
            if not self._paced:
                self._paced = True
                self.pump.loop.call_at(now + wait_s, self._resume)
            return 0
        while True:
            draw = self.sending.draw(stream.index, now)
            if draw is None:
                self._note_work(now)
                return 0
            if desk is not None:
                desk.spent(draw.payload_bytes)
            if spread:
                self._spreading.spent(draw.payload_bytes)
            memory, guard, _ = self._sources[draw.transfer_id]
            piece = self.sending.plan(draw.transfer_id).block(draw.block_id)
            opening = self.sending.opening(draw.transfer_id, now) if draw.open_first else None
            try:
                end = self._packer.pack(stream, draw, opening, piece, memory, guard)
            except Withdrawn:
                self.cancel(draw.transfer_id, FailureReason.CANCELLED, "the source was withdrawn", now)
                continue
            except Gone as error:
                self.cancel(draw.transfer_id, FailureReason.SOURCE_GONE, str(error), now)
                continue
            except LocalProtocolError as error:
                # A pump of an older version has taken the place of the one that this was planned for.
                self.cancel(draw.transfer_id, FailureReason.VERSION, str(error), now)
                continue
            if self._packer.cuts_here():
                stream.cut(end // 2)
                self.pump.loop.call_at(now + K_CUT_S, lambda when: stream.lose("cut by a test", when))
                return 0
            return end

    def _resume(self, now: float) -> None:
        self._paced = False
        self.kick(now)

    def on_lost(self, stream: Stream, reason: str, now: float) -> None:
        was_ready = self.boot is not None and stream.peer_site != ""
        self._drop(stream.index, stream)
        self.counters.streams_lost += 1
        if stream.untrusted and self._dialling.untrusted():
            self._fail_all(FailureReason.PEER_UNTRUSTED, stream.untrusted, now)
        if was_ready:
            self._used_s = now
            rest = self._losses.words(now)
            level = logging.DEBUG if rest is None else logging.INFO
            log.log(level, "peer %s: a stream was lost: %s%s", self.address, reason, rest or "")
            self._dialling.lost(reason, last=not self.n_ready, now=now)
        else:
            self._dialling.failed(reason, refused=stream.answered or "refused" in reason, now=now)
        self._dial(now)
        self.kick(now)

    def _drop(self, name: int, stream: Stream) -> None:
        if self._streams.pop(name, None) is not None:
            self.sending.on_stream_lost(name)
            self.counters.add(stream.counters)

    # Time

    def _tick(self, now: float) -> None:
        if not self.alive:
            return
        for event in self.sending.tick(now):
            self._event(event, now)
        overtaken, n_ready = gauges.is_overtaken(self._infos()), self.n_ready
        for stream in self.streams:
            self._check(stream, overtaken, n_ready, now)
        busy = len(self.sending) > 0
        self._spreading.measure(self._infos())
        self._observe(now)
        self.sending.hedge_after_s = 1.5 * self.rtt_s + self.slack_s(now) + K_HEDGE_S
        if busy and not self.n_ready and self._dialling.is_refused(now):
            self._fail_all(FailureReason.PEER_UNREACHABLE, self.last_error, now)
        if busy or (self._keep_warm and self._dialling.worth_warming):
            self._dial(now)
        self.kick(now)
        self.pump.loop.call_at(now + (K_TICK_S if busy else 5 * K_TICK_S), self._tick)

    def _check(self, stream: Stream, overtaken: bool, n_ready: int, now: float) -> None:
        if not stream.ready:
            limit_s = K_CONNECT_S if stream.state.value == "connecting" else K_HANDSHAKE_S
            if now - stream.opened_s > limit_s:
                stream.lose(f"no answer ({stream.state.value})", now)
            return
        self._settle(stream, overtaken, n_ready, now)
        rtt_s = stream.info.rtt_s if stream.info else 0.0
        if now - stream.progress_s > max(self.pump.config.stall_s, 8 * rtt_s):
            stream.lose(f"nothing was acknowledged for {now - stream.progress_s:.1f} s", now)

    def _observe(self, now: float) -> None:
        totals, infos = self.totals(), self._infos()
        before = self.count.wanted
        wanted = self.count.observe(
            now, open_streams=self.n_ready, acked_bytes=totals.bytes_acked, sent_bytes=totals.tcp_bytes_sent,
            retransmitted_bytes=totals.retransmitted_bytes, rtt_s=gauges.mean_rtt_s(infos),
            backlogged=self.sending.backlog_bytes > 0, min_rtt_s=gauges.min_rtt_s(infos),
            rate_driven=any(s.congestion_control == "bbr" for s in self._streams.values()),
        )  # fmt: skip
        if wanted != before:
            log.info("peer %s: %d streams, for %.2f%% loss", self.address, wanted, 100 * self.count.loss)
            self._dial(now)
        self._retire(now)

    def _retire(self, now: float) -> None:
        """Those beyond the number wanted, the newest, take no more blocks, and end when all that they carry
        is acknowledged and their peer has been silent for a while: an answer might still come.
        """
        ready = [s for s in self.streams if s.ready]
        for place, stream in enumerate(ready):
            stream.is_retiring = place >= self.count.wanted
            over = stream.is_retiring and stream.is_silent and now - stream.heard_s > K_SILENT_S
            if over and not self.sending.carries(stream.index):
                stream.close(now, reset=False)
                self._drop(stream.index, stream)

    # Ends

    def _event(self, event: SendEvent | None, now: float) -> None:
        if event is None:
            return
        _, _, on_event = self._sources.pop(event.transfer_id)
        if isinstance(event, Failed) and event.tell_peer:
            self._tell_cancelled(event)
        on_event(event)

    def _tell_cancelled(self, event: Failed) -> None:
        """A receiver that never heard of the transfer ignores it; one that can't be reached ends it by its
        deadline.
        """
        why = Refuse(event.reason.value, event.detail)
        for stream in self._streams.values():
            if stream.ready:
                # By each: by one alone it might overtake what another still has on its way, and that would
                # open the transfer again.
                stream.send_control(message_frame(stream.version, FrameType.CANCEL, why, event.transfer_id))
                self.pump.loop.call_again(stream, W)

    def _fail_all(self, reason: FailureReason, detail: str, now: float) -> None:
        for event in self.sending.fail_all(reason, detail):
            self._event(event, now)

    def is_local(self) -> bool:
        return is_loopback(split_address(self.address)[0])
