"""One forwarded connection: a local socket on one side, a peer's stream on the other.

Each side may send `K_WINDOW_BYTES` that the other hasn't passed on yet, so memory is bounded and a slow
reader slows its own connection alone. A DATA frame carries bytes, or none; its transfer_id says how many its
sender has passed on so far in all, its block_id is 1 when its sender has nothing more to say. The end counts
as a byte, so that the side that dialled, which alone ends the stream, knows that nothing is lost with it.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable

from prfaas.model.errors import RemoteProtocolError
from prfaas.pump import tcpinfo
from prfaas.pump.loop import Loop
from prfaas.pump.stream import Stream
from prfaas.transfer.frames import FrameType, Header, control_frame

K_WINDOW_BYTES = 1 << 20
K_READ_BYTES = 32 * 1024
K_TELL_BYTES = K_WINDOW_BYTES // 4
"""What was passed on is told when it has grown by so much, not at every write."""
R, W = selectors.EVENT_READ, selectors.EVENT_WRITE


class Relay:
    """Joins `sock`, connected or on its way to be, to `stream`, which is ready. `ended` is called once, when
    both are over.
    """

    def __init__(
        self, loop: Loop, sock: socket.socket, stream: Stream, ended: Callable[[float], None], *,
        connecting: bool,
    ) -> None:  # fmt: skip
        self._loop, self._sock, self._stream, self._ended = loop, sock, stream, ended
        self._connecting = connecting
        self._sent_bytes = self._taken_bytes = 0
        """Of ours: sent to the peer, and what it says it has passed on."""
        self._passed_bytes = self._told_bytes = 0
        """Of the peer's: passed on to our socket, and what we have told it of that."""
        self._out = bytearray()
        self._our_end = self._their_end = self._shut = self.closed = False
        self._mask = 0
        sock.setblocking(False)
        self._interest()

    def _interest(self) -> None:
        if self.closed:
            return
        mask = 0
        if (
            not self._connecting
            and not self._our_end
            and self._sent_bytes - self._taken_bytes < K_WINDOW_BYTES
        ):
            mask |= R
        if self._connecting or self._out:
            mask |= W
        if mask == self._mask:
            return
        if not self._mask:
            self._loop.add(self._sock.fileno(), mask, self)
        elif not mask:
            self._loop.remove(self._sock.fileno())
        else:
            self._loop.modify(self._sock.fileno(), mask, self)
        self._mask = mask

    def on_ready(self, mask: int, now: float) -> None:
        if self.closed:
            return
        try:
            if self._connecting and mask & W:
                code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    self.close(now)
                    return
                self._connecting = False
            if mask & W:
                self._write(now)
            if mask & R and not self.closed:
                self._read(now)
        except (OSError, RemoteProtocolError):
            # The latter: so many small pieces wait for the peer that its stream's queue is full.
            self.close(now)
            return
        self._interest()

    def _read(self, now: float) -> None:
        while not self._our_end and self._sent_bytes - self._taken_bytes < K_WINDOW_BYTES:
            try:
                data = self._sock.recv(K_READ_BYTES)
            except BlockingIOError:
                break
            self._our_end = not data
            self._sent_bytes += len(data) or 1
            self._tell(data)
        self._stream.on_ready(W, now)
        self._finish(now)

    def _tell(self, data: bytes) -> None:
        self._told_bytes = self._passed_bytes
        self._stream.send_control(
            control_frame(self._stream.version, FrameType.DATA, data, self._passed_bytes, int(self._our_end))
        )

    def on_data(self, header: Header, body: memoryview, now: float) -> None:
        """A DATA frame of the peer. Raises RemoteProtocolError for one against the rules above."""
        if not self._taken_bytes <= header.transfer_id <= self._sent_bytes:
            raise RemoteProtocolError(f"{header.transfer_id} bytes passed on of {self._sent_bytes}")
        self._taken_bytes = header.transfer_id
        if body and self._their_end:
            raise RemoteProtocolError("data after the end")
        self._out += body
        self._their_end = self._their_end or bool(header.block_id)
        if len(self._out) > K_WINDOW_BYTES + K_READ_BYTES:
            raise RemoteProtocolError("more forwarded data than the window allows")
        try:
            if not self._connecting:
                self._write(now)
        except OSError:
            self.close(now)
            return
        self._finish(now)
        self._interest()

    def _write(self, now: float) -> None:
        try:
            while self._out:
                n = self._sock.send(self._out)
                del self._out[:n]
                self._passed_bytes += n
        except BlockingIOError:
            pass
        if self._their_end and not self._out and not self._shut:
            self._shut = True
            self._passed_bytes += 1
            self._sock.shutdown(socket.SHUT_WR)
        if self._shut or self._passed_bytes - self._told_bytes >= K_TELL_BYTES:
            self._tell(b"")
            self._loop.call_again(self._stream, W)
        self._finish(now)

    def _finish(self, now: float) -> None:
        if self._whole and self._stream.dialled:
            self.close(now)

    @property
    def _whole(self) -> bool:
        """Whether both sides have said all, and have passed it on."""
        return self._our_end and self._shut and self._taken_bytes == self._sent_bytes

    def close(self, now: float) -> None:
        """End both sides now. A second call does nothing."""
        if self.closed:
            return
        if self._mask:
            self._loop.remove(self._sock.fileno())
        self.closed = True
        if self._our_end and self._shut:
            self._sock.close()
        else:
            tcpinfo.abort(self._sock)  # a cut isn't an end: the program must see that it is one
        self._ended(now)
