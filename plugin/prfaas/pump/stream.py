"""One TCP connection to a peer: whole frames in, whole frames out, with or without TLS.

It reads exactly what it needs next (a header; a body into one buffer, and the header that follows it), so a
block is never moved again before its copy to the pages, and sends a block's header, table and payload from
one buffer. All calls return at once; each turn is bounded, so that no stream keeps the others waiting.
It is woken for what completes a block (SO_RCVLOWAT), not for every packet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import ssl
from enum import Enum

from prfaas.model.errors import RemoteProtocolError
from prfaas.pump import tcpinfo
from prfaas.pump.handler import Handler
from prfaas.pump.loop import Loop
from prfaas.pump.measured import Measured
from prfaas.pump.memory import Buffer
from prfaas.pump.tls import TlsContext, TlsEnd, reason_of
from prfaas.transfer.frames import (
    K_BLOCK_MAX_BYTES,
    K_CONTROL_MAX_BYTES,
    K_HEADER_BYTES,
    K_HELLO_VERSION,
    K_TABLE_MAX_BYTES,
    FrameType,
    Header,
    Hello,
    ack_frames,
    checksum,
    control_frame,
    decode_message,
    message_frame,
)

logger = logging.getLogger(__name__)
K_TURN_BYTES = 2 << 20
"""Most bytes read or written in one turn."""
K_QUEUE_MAX_BYTES = 8 << 20
"""A peer that doesn't read our answers to its own frames loses the stream."""
K_FORWARD_DEAD_S = 45.0
"""Without an acknowledgement for so long a forwarded connection is over; it outlives an outage of 30 s."""
K_PONG_BYTES = 16  # of a PING that its answer carries back: enough to tell it by, and no load on the way back
K_SMALL_BUFFER_BYTES = K_CONTROL_MAX_BYTES
K_LARGE_BUFFER_BYTES = K_BLOCK_MAX_BYTES + K_TABLE_MAX_BYTES + K_HEADER_BYTES
K_LOWAT_MOST_BYTES = 256 * 1024
"""Of a longer rest of a block so much is worth waking up for."""
K_NO_BUFFER = Buffer(1)
R, W = selectors.EVENT_READ, selectors.EVENT_WRITE


class State(Enum):
    CONNECTING = "connecting"
    TLS = "tls handshake"
    HELLO = "hello"
    READY = "ready"
    CLOSED = "closed"


class Stream(Measured):
    """See the module. `index` is its place among the peer's streams; `dialled` whether we opened it."""

    def __init__(
        self, loop: Loop, sock: socket.socket, handler: Handler, index: int, *, dialled: bool,
        tls: TlsContext | None, now: float,
    ) -> None:  # fmt: skip
        self.loop, self.handler, self.index, self.dialled = loop, handler, index, dialled
        self.state = State.CONNECTING if dialled else (State.TLS if tls else State.HELLO)
        self.version = K_HELLO_VERSION
        super().__init__(sock, now)
        self.peer_site = self.dialled_from = ""
        self.proved_site = ""
        """The site of the peer's certificate; empty without TLS."""
        self.untrusted = ""
        self.answered = self.is_cut = self.is_retiring = False
        """Whether anybody was there at all; it takes no more blocks: cut, or not wanted any more."""
        self.ended_by_peer = False
        """Whether its peer closed it, with nothing half sent."""
        self.opened_s = self.heard_s = now
        self.session: object = None
        self.forwarding = False
        self._context = tls
        self._tls: TlsEnd | None = None
        self._fd = sock.fileno()
        self._mask = 0
        self._queue: list[bytes] = []
        self._queue_bytes = 0
        self._acks: list[tuple[int, int]] = []
        self._out = memoryview(b"")
        self._blocked = False
        self._in = Buffer(K_SMALL_BUFFER_BYTES)
        self._in_large = False
        self._out_buffer: Buffer | None = None
        self._header: Header | None = None
        self._want = K_HEADER_BYTES
        self._got = 0
        self._lowat_bytes = 1
        if tls is not None and not dialled:
            self._wrap()
        self._interest(W if self.state is State.CONNECTING else R | W)

    @property
    def out_buffer(self) -> Buffer:
        if self._out_buffer is None:
            self._out_buffer = Buffer(K_LARGE_BUFFER_BYTES + K_SMALL_BUFFER_BYTES)
        return self._out_buffer

    @property
    def closed(self) -> bool:
        return self.state is State.CLOSED

    @property
    def ready(self) -> bool:
        return self.state is State.READY

    @property
    def waiting_to_write(self) -> bool:
        return self._blocked

    def _wrap(self) -> None:
        assert self._context is not None
        self._sock.setblocking(False)
        self._tls = self._context.end(self._sock, dialled=self.dialled)
        self._sock = self._tls.sock

    def _interest(self, mask: int) -> None:
        if mask == self._mask or self.state is State.CLOSED:
            return
        if not self._mask:
            self.loop.add(self._fd, mask, self)
        else:
            self.loop.modify(self._fd, mask, self)
        self._mask = mask

    # Readiness

    def on_ready(self, mask: int, now: float) -> None:
        if self.closed:
            return
        known = self.ready
        try:
            if self.state is State.CONNECTING:
                self._finish_connect()
            if self.state is State.TLS:
                if not self._handshake():
                    return
                mask |= R  # what came with the end of the handshake is off the socket already
            if self.state is State.HELLO and not self._queue and not self.counters.control_bytes_sent:
                self._send_hello()
            if mask & R:
                self._read(now)
            if not self.closed and (mask & W or self._queue or self._acks):
                self.write(now)
        except (RemoteProtocolError, OSError) as error:
            if isinstance(error, ssl.SSLError) and not (self.ready or isinstance(error, ssl.SSLEOFError)):
                self.untrusted = reason_of(error)
            self.lose(reason_of(error), now)
        except Exception as error:
            if known or self.ready:
                raise
            # Who isn't known yet, and brings out a fault of ours, loses his stream; others keep the pump.
            logger.exception("a stream that wasn't ready yet")
            self.lose(f"a fault here: {error}", now)

    def _finish_connect(self) -> None:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self.answered = True
        self.state = State.HELLO
        if self._context is not None:
            self.state = State.TLS
            self._wrap()
        self._interest(R | W)

    def _handshake(self) -> bool:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._interest(R)
            return False
        except ssl.SSLWantWriteError:
            self._interest(W)
            return False
        try:
            self.proved_site = self.handler.check_certificate(self._tls.getpeercert())
        except RemoteProtocolError as error:
            self.untrusted = str(error)
            raise
        self.state = State.HELLO
        self._interest(R | W)
        return True

    def _send_hello(self) -> None:
        self.send_control(message_frame(K_HELLO_VERSION, FrameType.HELLO, self.handler.our_hello(self)))

    # Reading

    def _read(self, now: float) -> None:
        budget, tls = K_TURN_BYTES, self._tls
        receive = self._sock.recv_into if tls is None else tls.recv_into
        while budget > 0 and not self.closed:
            header = self._header
            beyond = K_HEADER_BYTES if header is not None and header.type is FrameType.BLOCK else 0
            room = self._want + beyond - self._got
            try:
                n = receive(self._in.view[self._got : self._got + room])
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            if n == 0:
                self.ended_by_peer = self.ready and self._header is None and not self._got
                self.lose("closed by the peer", now)
                return
            budget -= n
            self._got += n
            self.progress_s = self.heard_s = now
            if self._got >= self._want:
                self._whole(now)
            if n < room:
                break  # there is no more
        if tls is not None and budget <= 0 and not self.closed and tls.pending():
            self.loop.call_again(self, R)
        else:
            self._sleep_until_worth_it()

    def _sleep_until_worth_it(self) -> None:
        """Be woken when the rest of a block has come, or K_LOWAT_MOST_BYTES of it; else by any byte."""
        if self.closed:
            return
        wanted = 1
        if self._header is not None and self._header.type is FrameType.BLOCK:
            rest = max(1, self._want - self._got)
            wanted = min(K_LOWAT_MOST_BYTES, self._tls.bytes_before(rest) if self._tls else rest)
        if not wanted // 2 <= self._lowat_bytes <= wanted:
            self._lowat_bytes = wanted
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)

    def _whole(self, now: float) -> None:
        """A header or a body is complete."""
        if self._header is None:
            version = self.version if self.state is State.READY else None
            self._header = header = Header.from_bytes(self._in.view[:K_HEADER_BYTES], version)
            self._got, self._want = 0, header.body_bytes
            if header.type is FrameType.BLOCK:
                self.counters.framing_bytes_received += K_HEADER_BYTES + header.table_bytes
                if not self._in_large:
                    self._in = Buffer(K_LARGE_BUFFER_BYTES)
                    self._in_large = True
            else:
                self.counters.control_bytes_received += K_HEADER_BYTES + header.body_bytes
            if header.body_bytes:
                return
        header, self._header = self._header, None
        body = self._in.view[: header.body_bytes]
        beyond, self._got, self._want = self._got - header.body_bytes, 0, K_HEADER_BYTES
        self._handle(header, body, now)
        if beyond and not self.closed:
            self._in.view[:beyond] = self._in.view[header.body_bytes : header.body_bytes + beyond]
            self._got = beyond
            if beyond == K_HEADER_BYTES:
                self._whole(now)

    def _handle(self, header: Header, body: memoryview, now: float) -> None:
        """A whole frame."""
        sound = checksum(body) == header.body_crc
        if header.type is FrameType.BLOCK:
            self._block(header, body, sound, now)
        elif not sound:
            raise RemoteProtocolError(f"{header.type.name} with a bad checksum")
        elif header.type is FrameType.HELLO:
            self.version = self.handler.on_hello(self, decode_message(body, Hello))
            self.state = State.READY
            self.handler.on_ready(self, now)
        elif header.type is FrameType.PING:
            self.send_control(control_frame(self.version, FrameType.PONG, bytes(body[:K_PONG_BYTES])))
        else:
            self.handler.on_frame(self, header, body, now)

    def _block(self, header: Header, body: memoryview, sound: bool, now: float) -> None:
        self.counters.blocks_received += 1
        self.counters.payload_bytes_received += header.body_bytes - header.table_bytes
        if sound:
            self.handler.on_block(self, header, body, self._in.address, now)
        else:
            self.counters.corrupt_blocks += 1
            self.send_control(
                control_frame(self.version, FrameType.NACK, b"", header.transfer_id, header.block_id)
            )

    # Writing

    def send_control(self, frame: bytes) -> None:
        """Queue a frame; it goes before any block that hasn't begun."""
        self._queue.append(frame)
        self._queue_bytes += len(frame)
        self.counters.control_bytes_sent += len(frame)
        if self._queue_bytes > K_QUEUE_MAX_BYTES:
            raise RemoteProtocolError("the peer doesn't read what we answer")

    def acknowledge(self, transfer_id: int, block_id: int) -> None:
        """Queue an acknowledgement; those of one turn share a frame."""
        self._acks.append((transfer_id, block_id))

    def write(self, now: float) -> None:
        """Send what is queued, then blocks, until the socket is full or the turn is over."""
        if self._blocked and self.is_dry():
            self.handler.on_dry(self, now)
        budget, tls = K_TURN_BYTES, self._tls
        send = self._sock.send if tls is None else tls.send
        while budget > 0 and not self.closed:
            if not self._out and not self._load(now):
                if tls is not None and not tls.flush():
                    break
                self._blocked = False
                self._interest(R)
                return
            try:
                n = send(self._out)
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                break
            budget -= n
            partly = n < len(self._out)
            self._out = self._out[n:]
            if partly and tls is None:
                break  # it takes no more
        self._blocked = True
        self._interest(R | W)

    def _load(self, now: float) -> bool:
        if self._acks and self.state is State.READY:
            for frame in ack_frames(self.version, self._acks):
                self.send_control(frame)
            self._acks.clear()
        if not self._queue and self.state is State.READY:
            n = self.handler.next_block(self, now)
            if n:
                self._out = self.out_buffer.view[:n]
                return True
        # next_block may have queued frames of its own (a CANCEL).
        if self._queue:
            self._out = memoryview(b"".join(self._queue))
            self._queue.clear()
            self._queue_bytes = 0
            return True
        return False

    # The end

    def give_up_after(self, seconds: float) -> None:
        """Lose the stream when what it sends isn't acknowledged for so long: keep-alive doesn't see that."""
        tcpinfo.give_up_after(self._sock, seconds)

    def lose(self, reason: str, now: float) -> None:
        """The stream ends here; its handler hears of it once."""
        if self.closed:
            return
        self.close(now)
        self.handler.on_lost(self, reason, now)

    def cut(self, n_bytes: int) -> None:
        """A fault to be tested against: the first bytes of out_buffer go out and no block after them, so that
        the one in it has to be sent again.
        """
        self.is_cut = True
        with contextlib.suppress(OSError):
            (self._tls or self._sock).send(self.out_buffer.view[:n_bytes])

    @property
    def is_silent(self) -> bool:
        """Whether nothing of ours waits here or, as last sampled, for the peer's kernel."""
        return not (self._out or self._queue or self.has_unacked)

    def close(self, now: float, *, reset: bool = True) -> None:
        """`reset`: what the kernel holds unsent is thrown away."""
        if self.closed:
            return
        self.sample(now)
        before, self.state = self.state, State.CLOSED
        if self._mask:
            self.loop.remove(self._fd)
        if reset and before in (State.READY, State.CONNECTING):
            tcpinfo.abort(self._sock)
        else:
            # What TLS has to say of a certificate it refuses must still reach the peer.
            if self._tls is not None:
                with contextlib.suppress(OSError):
                    self._tls.flush()
            self._sock.close()
        self._queue.clear()
        self._acks.clear()
        self._out = memoryview(b"")
        # Whoever still holds the stream (a timer) doesn't hold its buffers, nor those of its TLS.
        self._in, self._out_buffer, self._tls = K_NO_BUFFER, None, None
