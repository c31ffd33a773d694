"""Opening a peer's streams, and when to try again after it failed.

A peer that is away is dialled again after a growing, bounded pause, for as long as somebody wants to. Two
failures are for good: nothing but refusals for `K_REFUSED_S`, and a wrong certificate every time.
"""

from __future__ import annotations

import errno
import itertools
import logging
import socket

from prfaas.config.pump import split_address
from prfaas.pump import tcpinfo
from prfaas.pump.backoff import Backoff
from prfaas.pump.handler import Handler
from prfaas.pump.loop import Loop
from prfaas.pump.measured import K_UNSENT_FIRST_BYTES
from prfaas.pump.resolving import Address, Resolver
from prfaas.pump.stream import Stream
from prfaas.pump.tls import TlsContext
from prfaas.pump.trust import Trust

log = logging.getLogger(__name__)

K_REFUSED_S = 10.0
K_UNTRUSTED_TRIES = 3
K_RESOLVING_S = 0.02
"""How soon to dial again while the peer's name is being looked up."""
K_WARM_TRIES = 10
"""Failures in a row after which a peer that nothing waits for isn't dialled any more."""
K_UNDER_WAY = (0, errno.EAGAIN, errno.EINPROGRESS)
_serial = itertools.count(1)


class NotAllowed(Exception):
    """Our own rules forbid the connection; the text says which."""


class Dialling:
    """Dials `address` for `handler`, which the new streams report to."""

    def __init__(
        self, loop: Loop, trust: Trust, resolver: Resolver, address: str, handler: Handler, now: float
    ) -> None:
        self._loop, self._trust, self._resolver, self._handler = loop, trust, resolver, handler
        self._address = address
        self._host, self._port = split_address(address)
        self._backoff = Backoff(now)
        self._untrusted = 0
        self.last_error = ""
        self.is_resolving = False
        """Whether the last call of `dial` gave nothing because the name is being looked up."""

    def dial(self, *, wanted: int, n_open: int, n_ready: int, now: float) -> list[Stream]:
        """New streams, on their way to be ready, so that `wanted` are open; none during a pause.

        Raises NotAllowed.
        """
        self.is_resolving = False
        if now < self._backoff.next_s:
            return []
        # One connection tries a peer that doesn't answer; the others follow when it does.
        missing = wanted - n_open
        if self._backoff.failures and not n_ready:
            missing = min(missing, 1 - n_open)
        if missing <= 0:
            return []
        tls = self._trust.context(server=False)
        if tls is None and not self._trust.plaintext_allowed(self._host):
            raise NotAllowed(f"{self._host}: plaintext is for loopback only (allow_plaintext)")
        try:
            where = self._resolver.find(self._host, self._port, now)
        except OSError as error:
            self.failed(str(error), refused=False, now=now)
            return []
        self.is_resolving = where is None
        tried = [self._dial_one(where, tls, now) for _ in range(missing)] if where is not None else []
        return [stream for stream in tried if stream is not None]

    def _dial_one(self, where: Address, tls: TlsContext | None, now: float) -> Stream | None:
        family, target = where
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            self.failed(str(error), refused=False, now=now)
            return None
        sock.setblocking(False)
        tcpinfo.prepare(sock, K_UNSENT_FIRST_BYTES)
        code = sock.connect_ex(target)
        if code not in K_UNDER_WAY:
            sock.close()
            self.failed(f"connect: error {code}", refused=True, now=now)
            return None
        return Stream(self._loop, sock, self._handler, next(_serial), dialled=True, tls=tls, now=now)

    def failed(self, reason: str, *, refused: bool, now: float) -> None:
        """A try came to nothing. `refused`: somebody was there, and said no."""
        self.last_error = reason
        if not self._backoff.failures:
            log.warning("peer %s: not connected: %s; it is tried while it is wanted", self._address, reason)
        self._backoff.failed(now, refused=refused)

    def succeeded(self, now: float) -> None:
        self._untrusted = 0
        if failures := self._backoff.failures:
            log.info("peer %s: connected, after %d tries in vain", self._address, failures)
        self._backoff.succeeded(now)

    def lost(self, reason: str, *, last: bool, now: float) -> None:
        """A stream that had worked was lost. `last`: no other works."""
        self.last_error = reason
        if last:
            self._backoff.wait(now)

    def untrusted(self) -> bool:
        """A peer couldn't prove who it is; whether that has happened often enough to believe it."""
        self._untrusted += 1
        return self._untrusted >= K_UNTRUSTED_TRIES

    def is_refused(self, now: float) -> bool:
        """Whether the peer has refused for so long that it is given up."""
        return self._backoff.refused_s(now) > K_REFUSED_S

    @property
    def is_trying(self) -> bool:
        """Whether it has failed, but not so often that it isn't dialled any more without need."""
        return 0 < self._backoff.failures < K_WARM_TRIES

    @property
    def worth_warming(self) -> bool:
        """Whether the peer answers often enough to be dialled although nothing waits for it."""
        return self._backoff.failures < K_WARM_TRIES
