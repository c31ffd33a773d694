"""Listening sockets in the loop."""

from __future__ import annotations

import logging
import selectors
import socket
from collections.abc import Callable

from prfaas.config.pump import split_address
from prfaas.model.errors import MachineError
from prfaas.pump.loop import Loop

log = logging.getLogger(__name__)

K_BACKLOG = 512
K_TURN = 64
"""Connections accepted in one turn."""
K_REST_S = 0.2
"""Without descriptors or memory for another connection the socket would stay ready, and the loop spin."""
R = selectors.EVENT_READ


def bound(address: str, field: str) -> socket.socket:
    """A listening socket. Raises MachineError, which names the configuration's field."""
    host, port = split_address(address)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(K_BACKLOG)
    except OSError as error:
        sock.close()
        raise MachineError(f"{field} {address}: {error.strerror}") from None
    return sock


class Acceptor:
    """Hands each connection of `sock`, which is in the loop from now on, to `accept`. `close` ends both."""

    def __init__(
        self, loop: Loop, sock: socket.socket, accept: Callable[[socket.socket, float], None]
    ) -> None:
        self._loop, self._sock, self._accept = loop, sock, accept
        self._resting = self._closed = False
        sock.setblocking(False)
        loop.add(sock.fileno(), R, self)

    def on_ready(self, mask: int, now: float) -> None:
        for _ in range(0 if self._closed else K_TURN):
            try:
                conn, _ = self._sock.accept()
            except ConnectionAbortedError:
                continue
            except BlockingIOError:
                return
            except OSError as error:
                self._rest(error, now)
                return
            self._resting = False
            self._accept(conn, now)

    def _rest(self, error: OSError, now: float) -> None:
        """Who dials waits in the kernel's queue meanwhile."""
        if not self._resting:
            log.warning("no more connections are accepted for now: %s", error.strerror)
        self._resting = True
        self._loop.remove(self._sock.fileno())
        self._loop.call_at(now + K_REST_S, self._again)

    def _again(self, now: float) -> None:
        if not self._closed:
            self._loop.add(self._sock.fileno(), R, self)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove(self._sock.fileno())
            self._sock.close()
