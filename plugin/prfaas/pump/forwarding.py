"""Connections of other programs, carried between two pumps: SGLang's bootstrap and control, and HTTP to its
servers, then cross between sites encrypted and authenticated like the data, through the pump's one port.

`Forwards` listens on loopback and dials the peer's pump once for each connection; `Exposed` knows which
endpoints of this node peers may reach, and connects to those. A stream carries one connection (relay.py).
"""

from __future__ import annotations

import dataclasses
import logging
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
_IN_USE = "no more connections can be forwarded"


class Forwards:
    """Listeners of this node for endpoints at other sites."""

    def __init__(self, pump: Pump) -> None:
        self.pump = pump
        self._fixed: list[_Listener] = []
        self._shared: dict[tuple[str, str, Forward], _Listener] = {}
        self.connections: set[_Dialled] = set()
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

    @property
    def _listeners(self) -> list[_Listener]:
        return [*self._fixed, *self._shared.values()]

    def stats(self, now: float) -> dict[str, int]:
        """Connections, and the counters of their streams."""
        total = dataclasses.replace(self.counters)
        for connection in self.connections:
            total.add(connection.counters(now))
        return {
            "endpoints": len(self._listeners), "connections": len(self.connections), "opened": self.opened,
            "failed": self.failed, **total.as_dict(),
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
        if len(self.forwards.connections) >= K_CONNECTIONS_MOST:
            self.failed(_IN_USE, now)
            tcpinfo.abort(sock)
        elif now < self._backoff.next_s:
            # A program that dials again and again is told no at once while the peer's pump rests.
            self.forwards.failed += 1
            tcpinfo.abort(sock)
        else:
            _Dialled(self, sock, now)

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
    """One accepted connection, on its way to the peer's pump and then to the endpoint."""

    def __init__(self, listener: _Listener, sock: socket.socket, now: float) -> None:
        self.forwards, self.site, self.listener = listener.forwards, listener.site, listener
        self.pump = self.forwards.pump
        self._sock: socket.socket | None = sock
        self._relay: Relay | None = None
        self._stream: Stream | None = None
        self.forwards.connections.add(self)
        self.forwards.opened += 1
        pump = self.pump
        self._dialling = Dialling(pump.loop, pump.trust, pump.resolver, listener.peer, self, now)
        self._give_up_s = now + K_CONNECT_S
        self._dial(now)

    def _dial(self, now: float) -> None:
        if self._sock is None:
            return  # it has ended meanwhile
        try:
            streams = self._dialling.dial(wanted=1, n_open=0, n_ready=0, now=now)
        except NotAllowed as error:
            self._fail(str(error), now)
            return
        if streams:
            self._stream = streams[0]
            self.pump.loop.call_at(self._give_up_s, self._expect)
        elif self._dialling.is_resolving and now < self._give_up_s:
            self.pump.loop.call_at(now + K_RESOLVING_S, self._dial)
        else:
            self._fail(self._dialling.last_error or "its name isn't found", now)

    def _expect(self, now: float) -> None:
        if self._relay is None and self._stream is not None:
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
        sock, self._sock = self._sock, None
        assert sock is not None
        stream.send_control(message_frame(stream.version, FrameType.FORWARD, self.listener.target))
        self._relay = Relay(self.pump.loop, sock, stream, self.end, connecting=False)

    def on_frame(self, stream: Stream, header: Header, body: memoryview, now: float) -> None:
        if header.type is FrameType.DATA and self._relay is not None:
            self.listener.succeeded(now)
            self._relay.on_data(header, body, now)
        elif header.type is FrameType.REFUSE:
            raise RemoteProtocolError(decode_message(body, Refuse).detail[:200])
        else:
            raise RemoteProtocolError(f"{header.type.name} on a forwarded connection")

    def on_lost(self, stream: Stream, reason: str, now: float) -> None:
        self._fail(reason, now)

    def _fail(self, reason: str, now: float) -> None:
        self.listener.failed(reason, now)
        self.end(now)

    def end(self, now: float) -> None:
        """Everything of this connection is over."""
        self.forwards.connections.discard(self)
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


class Exposed:
    """Endpoints of this node that peers' pumps may reach, and the connections they have to them."""

    def __init__(self, pump: Pump) -> None:
        self.pump = pump
        self._fixed: set[tuple[str, int]] = set()
        self._by_server: dict[object, set[tuple[str, int]]] = {}
        self._relays: dict[Stream, Relay] = {}

    def expose(self, host: str, port: int, server: object = None) -> None:
        """Let peers reach host:port, as long as the server is attached; without one, always."""
        (self._fixed if server is None else self._by_server.setdefault(server, set())).add((host, port))

    def withdraw(self, server: object) -> None:
        """What a server that has gone had exposed. Standing connections end by themselves."""
        self._by_server.pop(server, None)

    def _target(self, wanted: Forward) -> tuple[str, int] | None:
        """The endpoint meant: peers may know this node by another address than its programs do."""
        known = self._fixed.union(*self._by_server.values())
        if (wanted.host, wanted.port) in known:
            return wanted.host, wanted.port
        same = [endpoint for endpoint in known if endpoint[1] == wanted.port]
        return same[0] if len(same) == 1 else None

    def start(self, stream: Stream, body: memoryview, now: float) -> None:
        """A FORWARD frame. Raises RemoteProtocolError, which ends the stream alone."""
        if stream.version < K_VERSION:
            raise RemoteProtocolError(f"FORWARD in version {stream.version}")
        wanted = decode_message(body, Forward)
        target = self._target(wanted)
        if stream in self._relays:
            raise RemoteProtocolError("FORWARD twice")
        problem = ""
        if target is None:
            problem = f"{wanted.host}:{wanted.port} isn't exposed at this node"
        elif len(self._relays) >= K_CONNECTIONS_MOST:
            problem = _IN_USE
        if problem or target is None:
            self.pump.inbound.count_refusal("forward")
            log.warning("site %s: %s", stream.peer_site, problem)
            stream.send_control(message_frame(stream.version, FrameType.REFUSE, Refuse("forward", problem)))
            return
        host, port = target
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect_ex((host, port))
        except OSError as error:  # a name that nobody knows
            sock.close()
            raise RemoteProtocolError(f"{host}:{port}: {error}") from None
        # Whether it worked is seen when the socket is writable; until then what comes waits in the relay.
        self._relays[stream] = Relay(
            self.pump.loop, sock, stream, lambda at: self._ended(stream, at), connecting=True
        )

    def on_data(self, stream: Stream, header: Header, body: memoryview, now: float) -> None:
        relay = self._relays.get(stream)
        if relay is not None:
            relay.on_data(header, body, now)
        # else: it was refused, and its peer doesn't know yet

    def lost(self, stream: Stream, now: float) -> None:
        relay = self._relays.get(stream)
        if relay is not None:
            relay.close(now)

    def _ended(self, stream: Stream, now: float) -> None:
        self._relays.pop(stream, None)
        stream.lose("the forwarded connection ended", now)

    def __len__(self) -> int:
        return len(self._relays)
