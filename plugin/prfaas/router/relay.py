"""A stream from a decode server's socket to a client's, in the event loop's callbacks: its head, its events,
its end.

Whole events go on as they come; a client that is slow slows the server down (nothing is read from it while
more than K_HIGH_BYTES wait for the client), and one that takes nothing for long is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.web_request import BaseRequest

from prfaas.router.errors import error_event
from prfaas.router.sse import EventCutter
from prfaas.router.upstream import Connection, UpstreamError

K_HIGH_BYTES = 256 << 10
K_LOW_BYTES = 64 << 10
K_LOOK_S = 0.05
"""How often a slow client's buffer is looked at. A client that keeps up costs no timer."""


class EventStream(web.StreamResponse):
    """The answer to a streaming request, written to its connection here rather than by aiohttp, whose head
    alone costs as much as five events. aiohttp finds it begun and ended, and goes on with the connection.
    """

    def __init__(self, request: web.Request, headers: dict[str, str]) -> None:
        """Header values are printable: what they are made of has been checked."""
        super().__init__()
        self._transport = request.transport
        self.chunks = request.version >= (1, 1)
        """Whether the body is sent in chunks; else the connection's end is its end."""
        keep = request.keep_alive and self.chunks
        self._keep_alive = keep
        lines = ["HTTP/1.1 200 OK" if self.chunks else "HTTP/1.0 200 OK"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines.append(f"Date: {rfc822_formatted_time()}")
        if self.chunks:
            lines.append("Transfer-Encoding: chunked")
        if not keep:
            lines.append("Connection: close")
        self._head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def send(self, events: bytes) -> None:
        """Whole events, the first time behind the head. Raises ConnectionResetError: the client left."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client left")
        data = b"%x\r\n%b\r\n" % (len(events), events) if self.chunks else events
        if self._head:
            data, self._head = self._head + data, b""
        transport.write(data)

    async def prepare(self, request: BaseRequest) -> None:
        """It is begun by `send`."""

    async def fail(self, message: str, code: str) -> None:
        """Its end, with an error. Raises ConnectionResetError: the client left."""
        self.send(error_event(message, "server_error", code))
        await self.write_eof()

    async def write_eof(self, data: bytes = b"") -> None:
        """Its end, once."""
        if self._eof_sent:
            return
        self._eof_sent = True
        if self.chunks and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"0\r\n\r\n")


class Relay:
    """One stream after its first events. `run` once."""

    def __init__(
        self, request: web.Request, out: EventStream, server: Connection, cutter: EventCutter
    ) -> None:
        """The first events of `out` are sent."""
        self._client = request.transport
        self._chunked = out.chunks
        self._server, self._cutter = server, cutter
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[str | None] = self._loop.create_future()
        self._heard = True
        self._slow = False
        self._taken_s = 0.0
        self._waiting_bytes = 0

    async def run(self, stall_s: float, client_stall_s: float) -> str | None:
        """None when the stream came to its end, else what broke it. Raises ConnectionResetError: the client.

        A server that says nothing for once to twice stall_s counts as silent.
        """
        self._stall_s, self._client_stall_s = stall_s, client_stall_s
        watch = self._loop.call_later(stall_s, self._look_at_server)
        self._watch: asyncio.TimerHandle = watch
        try:
            self._server.pipe(self._on_data, self._on_end, self._on_chunk if self._chunked else None)
            return await self._done
        finally:
            self._watch.cancel()
            if not self._done.done():
                self._done.cancel()

    def _on_data(self, data: bytes) -> None:
        self._heard = True
        if self._done.done():
            return
        try:
            events = self._cutter.feed(data)
        except ValueError:
            self._finish("garbage")
            return
        if not events:
            return
        self._write(b"%x\r\n%b\r\n" % (len(events), events) if self._chunked else events)

    def _on_chunk(self, chunks: bytes, last: int) -> bool:
        """Whole chunks with their sizes: what the server wrote is what the client gets."""
        if not self._cutter.passes(chunks, last, len(chunks) - 2):
            return False
        self._heard = True
        if not self._done.done():
            self._write(chunks)
        return True

    def _write(self, data: bytes) -> None:
        client = self._client
        if client is None or client.is_closing():
            self._fail()
            return
        client.write(data)
        if client.get_write_buffer_size() > K_HIGH_BYTES and not self._slow:
            self._slow = True
            self._server.pause()
            self._waiting_bytes, self._taken_s = client.get_write_buffer_size(), self._loop.time()
            self._loop.call_later(K_LOOK_S, self._look_at_client)

    def _on_end(self, error: UpstreamError | None) -> None:
        if error is not None:
            self._finish("lost")
        else:
            self._finish(None if self._cutter.done else "incomplete")

    def _look_at_server(self) -> None:
        if self._heard or self._slow:
            self._heard = False
            self._watch = self._loop.call_later(self._stall_s, self._look_at_server)
        else:
            self._finish("silent")

    def _look_at_client(self) -> None:
        client = self._client
        if self._done.done() or client is None:
            return
        if client.is_closing():
            self._fail()
            return
        waiting = client.get_write_buffer_size()
        now = self._loop.time()
        if waiting < self._waiting_bytes:
            self._waiting_bytes, self._taken_s = waiting, now
        if waiting <= K_LOW_BYTES:
            self._slow = False
            self._server.resume()
        elif now - self._taken_s > self._client_stall_s:
            client.abort()
            self._fail()
        else:
            self._loop.call_later(K_LOOK_S, self._look_at_client)

    def _finish(self, cause: str | None) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):
            self._done.set_result(cause)

    def _fail(self) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):
            self._done.set_exception(ConnectionResetError("the client takes nothing of its stream"))
