"""A pump without descriptors for another connection rests, and accepts again when there are some."""

from __future__ import annotations

import errno
import logging
import os
import socket

import pytest

from prfaas.pump.accepting import Acceptor, bound
from prfaas.pump.loop import Loop


class Full:
    """A listening socket in front of a process that has no descriptor left, for as long as `full`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self.full, self.tries = sock, True, 0
        self.fileno, self.setblocking, self.close = sock.fileno, sock.setblocking, sock.close

    def accept(self) -> tuple[socket.socket, object]:
        self.tries += 1
        if self.full:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._sock.accept()


def test_without_descriptors_the_loop_does_not_spin_nor_the_log_fill(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop, accepted = Loop(), []
    sock = Full(bound("127.0.0.1:0", "listen"))
    acceptor = Acceptor(loop, sock, lambda conn, now: accepted.append(conn))
    with socket.create_connection(sock._sock.getsockname()), caplog.at_level(logging.WARNING):
        for _ in range(200):
            loop.turn(0.005)  # a second: ready sockets end a turn at once
        assert 1 <= sock.tries <= 20
        assert len(caplog.records) == 1
        sock.full = False
        for _ in range(200):
            loop.turn(0.01)
            if accepted:
                break
    assert len(accepted) == 1
    accepted[0].close()
    acceptor.close()
    acceptor.close()
    loop.close()


def test_one_that_is_closed_while_it_rests_stays_closed() -> None:
    loop = Loop()
    sock = Full(bound("127.0.0.1:0", "listen"))
    acceptor = Acceptor(loop, sock, lambda conn, now: conn.close())
    with socket.create_connection(sock._sock.getsockname()):
        loop.turn(1)
        assert sock.tries == 1
        acceptor.close()
        for _ in range(40):
            loop.turn(0.01)
    assert sock.tries == 1
    loop.close()
