"""Requests to servers: kept HTTP/1.1 connections with as little between two sockets as can be.

A streamed token passes the router in one callback, from the server's socket to the client's, without a task
in between: with a general HTTP client tokens and requests cost so much more processor time that it shows in
the latency. What this client doesn't need it doesn't know: one method, no redirects, no cookies, no
compression (it asks for none). What breaks the rules of HTTP/1.1 ends the connection.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import cast

K_MAX_HEAD_BYTES = 65536
K_MAX_BODY_BYTES = 256 << 20
K_MAX_BUFFERED_BYTES = 1 << 20
"""Of a stream that nobody takes: then the server isn't read from."""
_STATUS = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: [^\r\n]*)?")
_PLAIN_SIZE = re.compile(rb"([1-9A-Fa-f][0-9A-Fa-f]{0,6})\r\n")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")
_LENGTH = re.compile(r"[0-9]{1,15}")


class UpstreamError(Exception):
    """A request got no (whole) answer."""


class NotConnected(UpstreamError):
    """Nobody there: the request was not sent."""


class ConnectionCut(UpstreamError):
    """The connection ended before the answer did."""


class NotHttp(UpstreamError):
    """The answer breaks the rules of HTTP/1.1, or is beyond bounds."""


class _State(Enum):
    IDLE = auto()
    HEAD = auto()
    LENGTH = auto()
    CHUNK_SIZE = auto()
    CHUNK_DATA = auto()
    CHUNK_END = auto()
    TRAILER = auto()
    UNTIL_CLOSE = auto()
    ENDED = auto()


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time: `send`, then `head`, then `whole`, or `part` and `pipe`."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """Lower-case names; of repeated ones the last."""
        self.idle_since_s = 0.0
        self.lost = False
        self._transport: asyncio.Transport | None = None
        self._state = _State.IDLE
        self._buffer = b""
        self._left = 0
        self._parts: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._keep = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._until_end = False
        self._paused = False
        self._on_data: Callable[[bytes], None] | None = None
        self._on_end: Callable[[UpstreamError | None], None] | None = None
        self._on_chunk: Callable[[bytes, int], bool] | None = None

    # What the router calls

    @property
    def reusable(self) -> bool:
        """The exchange has ended, and another may follow."""
        return self._state is _State.ENDED and self._keep and not self.lost and not self._buffer

    @property
    def _over(self) -> bool:
        return self._state is _State.ENDED or self._error is not None

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip() or "application/json"

    def send(self, data: bytes) -> None:
        """A whole request."""
        assert self._transport is not None
        self._state, self._buffer, self._error = _State.HEAD, b"", None
        self._parts.clear()
        self._buffered_bytes = 0
        self._until_end = False
        self._on_data = self._on_end = self._on_chunk = None
        self._transport.write(data)

    async def head(self) -> int:
        """The answer's status. Raises ConnectionCut, NotHttp."""
        while self._state is _State.HEAD:
            await self._wait()
        self._raise()
        return self.status

    async def whole(self) -> bytes:
        """The answer's whole body. Raises ConnectionCut, NotHttp."""
        self._until_end = True
        self.resume()
        while not self._over:
            await self._wait()
        self._raise()
        data = b"".join(self._parts)
        self._parts.clear()
        return data

    async def part(self) -> bytes:
        """The body's next bytes; empty at its end. Raises ConnectionCut, NotHttp."""
        while not self._parts:
            self._raise()
            if self._state is _State.ENDED:
                return b""
            await self._wait()
        data = self._parts.popleft()
        self._buffered_bytes -= len(data)
        if self._buffered_bytes == 0:
            self.resume()
        return data

    def pipe(
        self,
        on_data: Callable[[bytes], None],
        on_end: Callable[[UpstreamError | None], None],
        on_chunk: Callable[[bytes, int], bool] | None = None,
    ) -> None:
        """From now on call on_data with the body's bytes as they come, then on_end once.

        Whole chunks that come alone are given to `on_chunk` as they stand, with the place where the last
        one's data begin (they end two bytes before the chunk does); on_data gets the data if that says False.
        """
        self._on_data, self._on_end, self._on_chunk = on_data, on_end, on_chunk
        while self._parts:
            on_data(self._parts.popleft())
        self._buffered_bytes = 0
        if self._error is not None or self._state is _State.ENDED:
            self._end()
        else:
            self.resume()

    def pause(self) -> None:
        """Read no more from the server for now."""
        if not self._paused and self._transport is not None and not self.lost:
            self._transport.pause_reading()
            self._paused = True

    def resume(self) -> None:
        if self._paused and self._transport is not None and not self.lost:
            self._transport.resume_reading()
        self._paused = False

    def close(self) -> None:
        """At once, whatever is under way."""
        self._on_data = self._on_end = self._on_chunk = None
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self._state is _State.UNTIL_CLOSE and error is None:
            self._state = _State.ENDED
            self._end()
        elif self._state not in (_State.IDLE, _State.ENDED):
            self._fail(ConnectionCut(str(error) if error else "the server closed the connection"))
        self._wake()

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        if self._state in (_State.IDLE, _State.ENDED):
            # Bytes nobody asked for.
            self._keep = False
            self.close()
            return
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        elif self._on_chunk is not None and self._state is _State.CHUNK_SIZE and self._is_whole(data):
            return
        try:
            self._parse(data)
        except NotHttp as error:
            self._fail(error)
            if self._transport is not None:
                self._transport.abort()
        if self._waiter is not None and (self._over or not self._until_end):
            self._wake()

    def _is_whole(self, data: bytes) -> bool:
        """The common case of a stream: a token, a chunk, a segment. Taken as it is, or left alone."""
        assert self._on_chunk is not None
        start = end = 0
        size = len(data)
        while end < size:
            found = _PLAIN_SIZE.match(data, end)
            if found is None:
                return False
            start = found.end()
            end = start + int(found[1], 16) + 2
            if data[end - 2 : end] != b"\r\n":
                return False
        return self._on_chunk(data, start)

    # The parser

    def _parse(self, data: bytes) -> None:
        """Take in bytes; what isn't enough for a step stays in the buffer. Raises NotHttp."""
        at, size = 0, len(data)
        while at < size:
            state = self._state
            if state is _State.CHUNK_SIZE:
                end = data.find(b"\r\n", at, at + 1024)
                if end < 0:
                    if size - at >= 1024:
                        raise NotHttp("a chunk's size without end")
                    break
                found = _SIZE.fullmatch(data, at, end)
                if found is None:
                    raise NotHttp("a chunk without a size")
                self._left = int(found[1], 16)
                at = end + 2
                self._state = _State.CHUNK_DATA if self._left else _State.TRAILER
            elif state is _State.CHUNK_DATA or state is _State.LENGTH:
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                if self._left == 0:
                    self._state = _State.CHUNK_END if state is _State.CHUNK_DATA else _State.ENDED
                self._give(piece)
                if state is _State.LENGTH and self._left == 0:
                    self._end()
                    break
            elif state is _State.CHUNK_END:
                if size - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise NotHttp("a chunk longer than its size")
                at += 2
                self._state = _State.CHUNK_SIZE
            elif state is _State.UNTIL_CLOSE:
                self._give(data[at:])
                at = size
            elif state is _State.TRAILER:
                end = data.find(b"\r\n", at)
                if end < 0:
                    if size - at >= K_MAX_HEAD_BYTES:
                        raise NotHttp("a trailer without end")
                    break
                if end == at:
                    self._state = _State.ENDED
                    at += 2
                    self._end()
                    break
                at = end + 2
            else:
                end = data.find(b"\r\n\r\n", at)
                if end < 0:
                    if size - at > K_MAX_HEAD_BYTES:
                        raise NotHttp("headers without end")
                    break
                self._read_head(data[at:end])
                at = end + 4
        if at < size:
            self._buffer = data[at:]

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        found = _STATUS.fullmatch(first)
        if found is None:
            raise NotHttp("no status line")
        status = int(found[2])
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not name or name[:1] in b" \t" or name[-1:] in b" \t":
                raise NotHttp("a header that is none")
            key = name.decode("latin-1").lower()
            if key == "content-length" and headers.get(key, value.strip().decode("latin-1")) != (
                value.strip().decode("latin-1")
            ):
                raise NotHttp("two lengths")
            headers[key] = value.strip().decode("latin-1")
        if 100 <= status < 200:
            return  # an interim answer: the real one follows
        self.status, self.headers = status, headers
        self._keep = found[1] == b"1" and headers.get("connection", "").lower() != "close"
        coding = headers.get("transfer-encoding")
        length = headers.get("content-length")
        if headers.get("content-encoding", "identity") != "identity":
            raise NotHttp("a compressed answer, which nobody asked for")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise NotHttp("a transfer coding that is not chunked alone")
            self._state = _State.CHUNK_SIZE
        elif length is not None:
            if not _LENGTH.fullmatch(length) or int(length) > K_MAX_BODY_BYTES:
                raise NotHttp("a length that is none")
            self._left = int(length)
            self._state = _State.LENGTH if self._left else _State.ENDED
            if not self._left:
                self._end()
        elif status in (204, 304):
            self._state = _State.ENDED
            self._end()
        else:
            self._state, self._keep = _State.UNTIL_CLOSE, False

    def _give(self, piece: bytes) -> None:
        if self._on_data is not None:
            self._on_data(piece)
            return
        self._parts.append(piece)
        self._buffered_bytes += len(piece)
        if self._buffered_bytes > K_MAX_BODY_BYTES:
            raise NotHttp("an answer beyond bounds")
        if self._buffered_bytes > K_MAX_BUFFERED_BYTES and not self._until_end:
            self.pause()

    def _end(self) -> None:
        on_end, self._on_end, self._on_data, self._on_chunk = self._on_end, None, None, None
        if on_end is not None:
            on_end(self._error)

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None:
            self._error = error
            self._keep = False
            self._end()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
