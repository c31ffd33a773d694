"""Peers that send to us: their blocks are checked, copied under their lease's guard, and acknowledged."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prfaas.model.errors import RemoteProtocolError
from prfaas.model.transfer import FailureReason, TransferKind
from prfaas.pump.handler import Counters, Handler
from prfaas.pump.memory import Gone, Withdrawn
from prfaas.pump.sessions import Session, Sessions
from prfaas.pump.stream import K_FORWARD_DEAD_S, Stream, W
from prfaas.telemetry.log_lines import Burst
from prfaas.transfer.frames import (
    FrameType,
    Header,
    Hello,
    Open,
    Refuse,
    agree_version,
    decode_message,
    message_frame,
)
from prfaas.transfer.receiving import Apply, Incoming, Known, Refused
from prfaas.transfer.tables import decode_table

if TYPE_CHECKING:
    from prfaas.pump.server import Pump

log = logging.getLogger(__name__)

K_HANDSHAKE_S = 5.0
K_LOG_QUIET_S = 5.0
K_FORWARDED_STREAMS = 1024
K_UNKNOWN_STREAMS = 256
"""Most connections that haven't said HELLO yet."""


class Inbound(Handler):
    """All streams that peers opened to this pump."""

    def __init__(self, pump: Pump) -> None:
        self.pump = pump
        self.streams: set[Stream] = set()
        self.counters = Counters()
        self.refusals: dict[str, int] = {}
        self._ends: dict[str, Burst] = {}
        """By the site that was proved."""
        self._serial = 0
        self._sessions: Sessions[Stream] = Sessions()

    def accept(self, stream: Stream) -> None:
        self.streams.add(stream)
        self.pump.loop.call_at(stream.opened_s + K_HANDSHAKE_S, lambda now: self._expect_hello(stream, now))

    @property
    def crowded(self) -> bool:
        return sum(not s.ready for s in self.streams) >= K_UNKNOWN_STREAMS

    def _expect_hello(self, stream: Stream, now: float) -> None:
        if not stream.ready:
            stream.lose("no HELLO", now)

    def count_refusal(self, reason: str) -> None:
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def check_certificate(self, certificate: Mapping[str, object]) -> str:
        return self.pump.trust.check_certificate(certificate, "")

    def our_hello(self, stream: Stream) -> Hello:
        return self.pump.hello(stream.index)

    def on_hello(self, stream: Stream, hello: Hello) -> int:
        version = agree_version(self.pump.config.protocol_versions, (hello.oldest, hello.newest))
        self.pump.check_site(stream, hello)
        if len(hello.boot) != 16:
            raise RemoteProtocolError(f"a boot id of {len(hello.boot)} bytes")
        session: Session = (hello.site, hello.boot)
        if hello.forwarding:
            # Apart from the others: what is told to the peer's pump goes by none of these, and they take no
            # place from those that carry data.
            if sum(s.forwarding for s in self.streams) >= K_FORWARDED_STREAMS and not self._end_resting():
                raise RemoteProtocolError(f"more than {K_FORWARDED_STREAMS} forwarded connections")
            stream.peer_site, stream.session, stream.forwarding = hello.site, session, True
            stream.give_up_after(K_FORWARD_DEAD_S)
            return version
        given_up = self._sessions.join(session, stream, self.pump.receiving.peers())
        stream.peer_site, stream.session = hello.site, session
        for one in given_up:
            one.lose(
                "its place is needed: its site has more pumps than may stream here", self.pump.loop.now()
            )
        return version

    def _end_resting(self) -> bool:
        """End the oldest forwarding stream that only waits for a connection, for one that has one, or will
        sooner. Whether there was any.
        """
        resting = [s for s in self.streams if s.forwarding and not self.pump.exposed.carries(s)]
        if resting:
            oldest = min(resting, key=lambda s: s.opened_s)
            oldest.lose("its place is needed", self.pump.loop.now())
        return bool(resting)

    def on_ready(self, stream: Stream, now: float) -> None:
        self.counters.streams_opened += 1

    def on_lost(self, stream: Stream, reason: str, now: float) -> None:
        self.streams.discard(stream)
        self.pump.exposed.lost(stream, now)
        self.counters.add(stream.counters)
        self.counters.streams_lost += not stream.ended_by_peer
        self._sessions.leave(stream.session, stream)
        if stream.session is None:
            self.count_refusal("untrusted" if stream.untrusted else "handshake")
        self._log_end(stream, reason, now)

    def _log_end(self, stream: Stream, reason: str, now: float) -> None:
        who = f"{stream.peer_site or 'an unknown peer'} at {stream.dialled_from}"
        if stream.forwarding:  # each forwarded connection ends one; those that carry data stand for hours
            log.debug("a stream from %s ended: %s", who, reason)
            return
        # By the certificate: sites that have one are few, names that others give themselves aren't.
        rest = self._ends.setdefault(stream.proved_site, Burst(K_LOG_QUIET_S)).words(now)
        level = logging.DEBUG if rest is None else logging.INFO
        log.log(level, "a stream from %s ended: %s%s", who, reason, rest or "")

    def any_stream(self, peer: object) -> Stream | None:
        """An open stream of the peer, to tell it something."""
        return next((s for s in self._sessions.of(peer) if s.ready), None)

    def next_block(self, stream: Stream, now: float) -> int:
        return 0

    def on_frame(self, stream: Stream, header: Header, body: memoryview, now: float) -> None:
        kind = header.type
        if stream.forwarding is not (kind in (FrameType.DATA, FrameType.FORWARD)):
            raise RemoteProtocolError(f"{kind.name} on a stream of the other kind")
        if kind is FrameType.OPEN:
            self._open(stream, header.transfer_id, decode_message(body, Open), now)
        elif kind is FrameType.CANCEL:
            why = decode_message(body, Refuse)
            try:
                reason = FailureReason(why.reason)
            except ValueError:
                reason = FailureReason.CANCELLED
            event = self.pump.receiving.on_cancel(
                stream.session, header.transfer_id, reason, why.detail[:200]
            )
            if event is not None:
                self.pump.on_receive_event(event, now)
        elif kind is FrameType.LEDGER:
            self.pump.on_ledger_question(stream, body, now)
        elif kind is FrameType.DATA:
            self.pump.exposed.on_data(stream, header, body, now)
        elif kind is FrameType.FORWARD:
            self.pump.exposed.start(stream, body, now)
        elif kind is not FrameType.PONG:
            raise RemoteProtocolError(f"{kind.name} from a sender")

    def _open(self, stream: Stream, transfer_id: int, opening: Open, now: float) -> None:
        receiving = self.pump.receiving
        refused = receiving.on_open(stream.session, stream.peer_site, transfer_id, opening, now)
        if refused is not None and refused.reason is FailureReason.LEASE_UNKNOWN:
            # Its grant may be in a server's socket already, not yet read in this turn.
            self.pump.read_servers(now)
            refused = receiving.on_open(stream.session, stream.peer_site, transfer_id, opening, now)
        if refused is not None and refused.reason is FailureReason.LEASE_UNKNOWN and self.pump.is_new(now):
            # A pump before us was killed: its servers are on their way to tell us their leases.
            raise RemoteProtocolError("just started: leases aren't known yet")
        if refused is not None:
            self._refuse(stream, transfer_id, refused)

    def _refuse(self, stream: Stream, transfer_id: int, refused: Refused) -> None:
        self.count_refusal(refused.reason.value)
        why = Refuse(refused.reason.value, refused.detail)
        stream.send_control(message_frame(stream.version, FrameType.REFUSE, why, transfer_id))

    def tell_refused(self, incoming: Incoming, reason: FailureReason, detail: str) -> None:
        """Our side ended a transfer: say so to its sender, if it can be reached."""
        stream = self.any_stream(incoming.peer)
        if stream is not None:
            self._refuse(stream, incoming.transfer_id, Refused(reason, detail))
            self.pump.loop.call_again(stream, W)

    def on_block(self, stream: Stream, header: Header, body: memoryview, address: int, now: float) -> None:
        payload_bytes = header.body_bytes - header.table_bytes
        pieces = decode_table(body[: header.table_bytes], stream.version, payload_bytes)
        receiving = self.pump.receiving
        answer = receiving.on_block(stream.session, header.transfer_id, header.block_id, pieces)
        if isinstance(answer, Known):
            stream.acknowledge(header.transfer_id, header.block_id)
            return
        if isinstance(answer, Apply):
            incoming = answer.incoming
            owner = self.pump.owner(incoming.owner)
            lease = incoming.lease
            guard = lease.guard if lease else (0, 1)
            # KV's pages are leased whole and to this room alone. Of some kinds of state a lease covers
            # memory that the server itself writes to.
            alone = lease.ranges if lease and incoming.opening.kind == TransferKind.KV else None
            try:
                if owner is None:
                    raise Gone("the server has gone")
                owner.memory.write(guard, pieces, address + header.table_bytes, alone)
            except Withdrawn:
                broken = receiving.break_off(incoming, FailureReason.LEASE_ENDED, "revoked")
                self.pump.on_receive_event(broken, now)
                return
            except Gone as error:
                broken = receiving.break_off(incoming, FailureReason.OWNER_GONE, str(error))
                self.pump.on_receive_event(broken, now)
                return
            received = receiving.applied(incoming, header.block_id, payload_bytes)
            if received is not None:
                # The server hears of it before the sender does: what a killed pump has said stands.
                self.pump.on_receive_event(received, now)
            stream.acknowledge(header.transfer_id, header.block_id)
            return
        self._refuse(stream, header.transfer_id, answer)

    def close(self, now: float) -> None:
        for stream in list(self.streams):
            stream.close(now)
        self.streams.clear()
        self._sessions.clear()
