"""Connections of other programs, carried between two pumps: SGLang's bootstrap and control, and HTTP to its
servers, then cross between sites encrypted and authenticated like the data, through the pump's one port.

`Forwards` listens on loopback and carries each connection over a stream of its own (relay.py) to the
peer's pump, which reaches the endpoint (exposing.py). Behind one that was carried, `K_SPARES` streams are
kept ready for a while: opening one takes three round trips, for TCP, TLS and HELLO, and the next connection's
first bytes then don't wait for them.
"""

from __future__ import annotations

import dataclasses
import logging
import selectors
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from prfaas.config.pump import ForwardConfig, is_loopback, split_address
from prfaas.model.errors import MachineError, RemoteProtocolError
from prfaas.pump import tcpinfo
from prfaas.pump.accepting import Acceptor, bound
from prfaas.pump.backoff import Backoff
from prfaas.pump.dialling import K_RESOLVING_S, Dialling, NotAllowed
from prfaas.pump.handler import Counters, Handler
from prfaas.pump.relay import Relay
from prfaas.pump.stream import K_FORWARD_DEAD_S, Stream
from prfaas.transfer.frames import (
    Forward,
    FrameType,
    Header,
    Hello,
    Refuse,
    agree_version,
    control_frame,
    decode_message,
    message_frame,
)

if TYPE_CHECKING:
    from prfaas.pump.server import Pump

log = logging.getLogger(__name__)

K_VERSION = 2
"""Older pumps don't know the frames."""
K_FORWARDS_MOST = 4096
K_CONNECTIONS_MOST = 1024
K_CONNECT_S = 10.0
K_SPARES = 2
"""A request's HTTP, and what SGLang asks the bootstrap server for it."""
K_SPARE_S = 20.0
K_YOUNG_S = 1.0
"""A stream that isn't ready after so long has lost packets, and TCP rests longer and longer before it tries
again: another is ready sooner, if the peer can be reached at all.
"""
K_IN_USE = "no more connections can be forwarded"


class Forwards:
    """Listeners of this node for endpoints at other sites."""

    def __init__(self, pump: Pump) -> None:
        self.pump = pump
        self._fixed: list[_Listener] = []
        self._shared: dict[tuple[str, str, Forward], _Listener] = {}
        self.connections: set[_Dialled] = set()
        self._spares: dict[tuple[str, str], list[_Dialled]] = {}
        """Those that carry nothing yet, by pump and site."""
        self.counters = Counters()
        self.opened = self.failed = 0

    def open_fixed(self, forward: ForwardConfig) -> None:
        """One of the configuration's, for as long as the pump lives. Raises MachineError."""
        target = Forward(*split_address(forward.to))
        self._fixed.append(_Listener(self, forward.pump, forward.site, target, forward.listen))

    def open(self, peer: str, site: str, target: Forward, listen: str, server: object) -> str:
        """host:port here that leads to the target at the node of the pump at `peer`, as long as one of the
        servers that asked for it is attached; the same for all of them.

        `listen`: where, if it is new; its port 0 takes a free one. Raises MachineError, ValueError.
        """
        split_address(peer)
        key = (peer, site, target)
        known = self._shared.get(key)
        if known is None:
            if len(self._shared) >= K_FORWARDS_MOST:
                raise MachineError(f"more than {K_FORWARDS_MOST} endpoints forwarded")
            known = self._shared[key] = _Listener(self, peer, site, target, listen)
        known.servers.add(server)
        return known.address

    def withdraw(self, server: object) -> None:
        """A server has gone: what it alone had asked for ends, but for connections that stand."""
        for key, listener in list(self._shared.items()):
            listener.servers.discard(server)
            if not listener.servers:
                listener.close()
                del self._shared[key]

    def carry(self, listener: _Listener, sock: socket.socket, now: float) -> None:
        """A connection that `listener` has accepted."""
        spares = self._spares.get((listener.peer, listener.site), [])
        ready = [one for one in spares if one.is_ready]
        young = [one for one in spares if now - one.began_s < K_YOUNG_S]
        spare = next(iter(ready + young), None)
        if spare is not None:
            spares.remove(spare)
        dialled = spare or _Dialled(self, listener.peer, listener.site, now)
        dialled.carry(listener, sock, now)

    def keep_spares(self, peer: str, site: str, now: float) -> None:
        """The pump at `peer` was reached just now."""
        spares = self._spares.setdefault((peer, site), [])
        while len(spares) < K_SPARES and len(self.connections) < K_CONNECTIONS_MOST:
            spare = _Dialled(self, peer, site, now)
            spares.append(spare)
            spare.dial(now)
            if spare not in spares:
                break  # it came to nothing at once
            self.pump.loop.call_at(now + K_SPARE_S, spare.end_spare)

    def ended(self, dialled: _Dialled) -> None:
        self.connections.discard(dialled)
        spares = self._spares.get((dialled.peer, dialled.site), [])
        if dialled in spares:
            spares.remove(dialled)
        if not spares:
            self._spares.pop((dialled.peer, dialled.site), None)

    @property
    def n_carried(self) -> int:
        """Connections, without the streams that are kept ready for the next ones."""
        return len(self.connections) - sum(map(len, self._spares.values()))

    @property
    def _listeners(self) -> list[_Listener]:
        return [*self._fixed, *self._shared.values()]

    def stats(self, now: float) -> dict[str, int]:
        """Connections, and the counters of their streams."""
        total = dataclasses.replace(self.counters)
        for connection in self.connections:
            total.add(connection.counters(now))
        carried = self.n_carried
        return {
            "endpoints": len(self._listeners), "connections": carried,
            "spares": len(self.connections) - carried, "opened": self.opened, "failed": self.failed,
            **total.as_dict(),
        }  # fmt: skip

    def close(self, now: float) -> None:
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.end(now)


class _Listener:
    """One loopback port in the loop."""

    def __init__(self, forwards: Forwards, peer: str, site: str, target: Forward, listen: str) -> None:
        self.forwards, self.peer, self.site, self.target = forwards, peer, site, target
        host, port = split_address(listen)
        if not is_loopback(host):
            raise ValueError(
                f"{listen}: forwards listen on loopback, where only this node's programs reach them"
            )
        sock = bound(listen, "forward")
        host, port = sock.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.servers: set[object] = set()
        self._backoff = Backoff(forwards.pump.loop.now())
        log.info("%s leads to %s:%d by the pump at %s", self.address, target.host, target.port, peer)
        self._acceptor = Acceptor(forwards.pump.loop, sock, self._accept)

    def _accept(self, sock: socket.socket, now: float) -> None:
        if self.forwards.n_carried >= K_CONNECTIONS_MOST:
            self.failed(K_IN_USE, now)
            tcpinfo.abort(sock)
        elif now < self._backoff.next_s:
            # A program that dials again and again is told no at once while the peer's pump rests.
            self.forwards.failed += 1
            tcpinfo.abort(sock)
        else:
            self.forwards.carry(self, sock, now)

    def failed(self, reason: str, now: float) -> None:
        """A connection came to nothing. Told when it is the first in a row."""
        self.forwards.failed += 1
        if not self._backoff.failures:
            log.warning(
                "no connection to %s:%d by the pump at %s: %s",
                self.target.host, self.target.port, self.peer, reason,
            )  # fmt: skip
        self._backoff.failed(now, refused=False)

    def succeeded(self, now: float) -> None:
        self._backoff.succeeded(now)

    def close(self) -> None:
        self._acceptor.close()


class _Carrying(Handler):
    """What both ends of a forwarded connection share: no blocks."""

    def on_block(self, stream: Stream, header: Header, body: memoryview, address: int, now: float) -> None:
        raise RemoteProtocolError("a block on a forwarded connection")

    def next_block(self, stream: Stream, now: float) -> int:
        return 0


class _Dialled(_Carrying):
    """A stream to a peer's pump for one connection: one that was accepted, or the next one."""

    def __init__(self, forwards: Forwards, peer: str, site: str, now: float) -> None:
        self.forwards, self.pump, self.peer, self.site = forwards, forwards.pump, peer, site
        self._listener: _Listener | None = None
        self._sock: socket.socket | None = None
        self._relay: Relay | None = None
        self._stream: Stream | None = None
        self._answered = self._ended = False
        forwards.connections.add(self)
        pump = self.pump
        self._dialling = Dialling(pump.loop, pump.trust, pump.resolver, peer, self, now)
        self.began_s, self._give_up_s = now, now + K_CONNECT_S

    @property
    def is_ready(self) -> bool:
        return self._stream is not None and self._stream.ready

    def carry(self, listener: _Listener, sock: socket.socket, now: float) -> None:
        self._listener, self._sock = listener, sock
        self.forwards.opened += 1
        self._give_up_s = now + K_CONNECT_S
        if self._stream is None:
            self.dial(now)
            return
        self.pump.loop.call_at(self._give_up_s, self._expect)
        if self._stream.ready:
            # What rested may have lost its way meanwhile: that is asked beside the first bytes.
            self._answered = False
            self._stream.send_control(control_frame(self._stream.version, FrameType.PING, b""))
            self._start(self._stream, now)

    def dial(self, now: float) -> None:
        if self._ended or self._stream is not None:
            return
        try:
            streams = self._dialling.dial(wanted=1, n_open=0, n_ready=0, now=now)
        except NotAllowed as error:
            self._fail(str(error), now)
            return
        if streams:
            self._stream = streams[0]
            self.pump.loop.call_at(self._give_up_s, self._expect)
        elif self._dialling.is_resolving and now < self._give_up_s:
            self.pump.loop.call_at(now + K_RESOLVING_S, self.dial)
        else:
            self._fail(self._dialling.last_error or "its name isn't found", now)

    def _expect(self, now: float) -> None:
        if not self._answered and self._stream is not None and now >= self._give_up_s:
            self._stream.lose(f"no answer within {K_CONNECT_S:.0f} s", now)

    def check_certificate(self, certificate: Mapping[str, object]) -> str:
        return self.pump.trust.check_certificate(certificate, self.site)

    def our_hello(self, stream: Stream) -> Hello:
        stream.give_up_after(K_FORWARD_DEAD_S)
        return msgspec.structs.replace(self.pump.hello(0), forwarding=True)

    def on_hello(self, stream: Stream, hello: Hello) -> int:
        version = agree_version(self.pump.config.protocol_versions, (hello.oldest, hello.newest))
        self.pump.check_site(stream, hello)
        stream.peer_site = hello.site
        if version < K_VERSION:
            raise RemoteProtocolError(
                f"the peer's pump speaks version {version}; forwarding came with {K_VERSION}"
            )
        return version

    def on_ready(self, stream: Stream, now: float) -> None:
        self._answered = True
        if self._sock is not None:
            self._start(stream, now)

    def _start(self, stream: Stream, now: float) -> None:
        sock, self._sock = self._sock, None
        assert sock is not None
        assert self._listener is not None
        stream.send_control(message_frame(stream.version, FrameType.FORWARD, self._listener.target))
        self._relay = Relay(self.pump.loop, sock, stream, self.end, connecting=False)
        self.pump.loop.call_again(stream, selectors.EVENT_WRITE)
        self.forwards.keep_spares(self.peer, self.site, now)

    def on_frame(self, stream: Stream, header: Header, body: memoryview, now: float) -> None:
        self._answered = True
        if header.type is FrameType.DATA and self._relay is not None and self._listener is not None:
            self._listener.succeeded(now)
            self._relay.on_data(header, body, now)
        elif header.type is FrameType.REFUSE:
            raise RemoteProtocolError(decode_message(body, Refuse).detail[:200])
        elif header.type is not FrameType.PONG:
            raise RemoteProtocolError(f"{header.type.name} on a forwarded connection")

    def on_lost(self, stream: Stream, reason: str, now: float) -> None:
        self._fail(reason, now)

    def _fail(self, reason: str, now: float) -> None:
        if self._listener is not None:
            self._listener.failed(reason, now)
        self.end(now)

    def end_spare(self, now: float) -> None:
        """Nothing has come to be carried."""
        if self._listener is None:
            self.end(now)

    def end(self, now: float) -> None:
        """Everything of this connection is over."""
        self._ended = True
        self.forwards.ended(self)
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._relay is not None:
            self._relay.close(now)
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close(now)
            self.forwards.counters.add(stream.counters)

    def counters(self, now: float) -> Counters:
        if self._stream is None:
            return Counters()
        self._stream.sample(now)
        return self._stream.counters
