"""Kept connections to one server, bounded, reused, and none older than the server keeps its end."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from prfaas.router.upstream import Connection, NotConnected

K_KEEP_ALIVE_S = 4.0
"""Below the 5 s after which SGLang's server closes an idle connection (SGLANG_TIMEOUT_KEEP_ALIVE)."""
K_CONNECT_S = 3.0
K_MAX_IDLE = 1024


class UpstreamPool:
    """Kept connections to one server."""

    def __init__(
        self, url: str, headers: dict[str, str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._clock = clock
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._head = ("\r\n".join(lines) + "\r\nContent-Length: ").encode("latin-1")
        self._idle: list[Connection] = []
        self._closed = False

    async def post(self, path: str, body: bytes) -> Connection:
        """The request on a connection; its answer hasn't begun. Raises NotConnected."""
        connection = self._take() or await self._connect()
        connection.send(
            b"POST %b HTTP/1.1\r\n%b%d\r\n\r\n%b" % (path.encode("latin-1"), self._head, len(body), body)
        )
        return connection

    def release(self, connection: Connection) -> None:
        """Its exchange has ended, or is given up: then the connection is closed."""
        if connection.reusable and not self._closed and len(self._idle) < K_MAX_IDLE:
            connection.idle_since_s = self._clock()
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def sweep(self) -> None:
        """Close what has been idle for too long."""
        oldest_s = self._clock() - K_KEEP_ALIVE_S
        stale = [one for one in self._idle if one.lost or one.idle_since_s < oldest_s]
        if stale:
            self._idle = [one for one in self._idle if not one.lost and one.idle_since_s >= oldest_s]
            for connection in stale:
                connection.close()

    def _take(self) -> Connection | None:
        oldest_s = self._clock() - K_KEEP_ALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since_s >= oldest_s:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(K_CONNECT_S):
                _, connection = await loop.create_connection(
                    Connection, self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise NotConnected(
                f"no connection to {self._host}:{self._port} within {K_CONNECT_S:g} s"
            ) from None
        except OSError as error:
            raise NotConnected(f"{self._host}:{self._port}: {error.strerror or error}") from None
        return connection
