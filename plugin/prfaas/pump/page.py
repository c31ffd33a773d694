"""The pump's own HTTP face: GET /metrics for Prometheus, /links and /stats as JSON. In the loop, a request a
connection.
"""

from __future__ import annotations

import json
import selectors
import socket
from collections.abc import Callable, Mapping
from typing import Any

from prfaas.pump.loop import Loop
from prfaas.telemetry.pump_metrics import PumpMetrics

K_REQUEST_MAX_BYTES = 8192
K_PATIENCE_S = 5.0
K_MOST_OPEN = 16
R, W = selectors.EVENT_READ, selectors.EVENT_WRITE
Stats = Callable[[float], Mapping[str, Any]]


class Page:
    """Serves what `stats` says."""

    def __init__(self, loop: Loop, stats: Stats) -> None:
        self._loop, self._stats = loop, stats
        self._metrics = PumpMetrics()
        self.open: set[_Request] = set()

    def accept(self, sock: socket.socket, now: float) -> None:
        if len(self.open) >= K_MOST_OPEN:
            sock.close()
            return
        sock.setblocking(False)
        request = _Request(self, self._loop, sock)
        self.open.add(request)
        self._loop.call_at(now + K_PATIENCE_S, lambda _: request.close())

    def answer(self, request: bytes, now: float) -> bytes:
        """The whole response to a request's head."""
        method, _, rest = request.partition(b" ")
        path = rest.split(b" ")[0].split(b"?")[0]
        if method != b"GET":
            return _response("405 Method Not Allowed", "text/plain", b"GET only\n")
        if path == b"/metrics":
            return _response("200 OK", self._metrics.content_type, self._metrics.page(self._stats(now)))
        if path in (b"/stats", b"/links"):
            stats = self._stats(now)
            body = json.dumps(stats["links"] if path == b"/links" else stats).encode()
            return _response("200 OK", "application/json", body)
        return _response("404 Not Found", "text/plain", b"/metrics, /links, /stats\n")

    def close(self) -> None:
        for request in list(self.open):
            request.close()


class _Request:
    def __init__(self, page: Page, loop: Loop, sock: socket.socket) -> None:
        self._page, self._loop, self._sock = page, loop, sock
        self._got, self._out = b"", b""
        loop.add(sock.fileno(), R, self)

    def on_ready(self, mask: int, now: float) -> None:
        try:
            if self._out:
                self._send()
                return
            data = self._sock.recv(4096)
            self._got += data
            if not data or len(self._got) > K_REQUEST_MAX_BYTES:
                self.close()
            elif b"\r\n\r\n" in self._got:
                self._out = self._page.answer(self._got, now)
                self._loop.modify(self._sock.fileno(), W, self)
                self._send()
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def _send(self) -> None:
        n = self._sock.send(self._out)
        self._out = self._out[n:]
        if not self._out:
            self.close()

    def close(self) -> None:
        if self in self._page.open:
            self._page.open.discard(self)
            self._loop.remove(self._sock.fileno())
            self._sock.close()


def _response(status: str, kind: str, body: bytes) -> bytes:
    fields = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close"
    return f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n".encode() + body
