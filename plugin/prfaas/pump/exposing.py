"""Endpoints of this node that other sites' programs may reach, by way of their pumps (forwarding.py)."""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from prfaas.model.errors import RemoteProtocolError
from prfaas.pump.forwarding import K_CONNECTIONS_MOST, K_IN_USE, K_VERSION
from prfaas.pump.relay import Relay
from prfaas.pump.resolving import Address
from prfaas.pump.stream import Stream
from prfaas.transfer.frames import Forward, FrameType, Header, Refuse, decode_message, message_frame

if TYPE_CHECKING:
    from prfaas.pump.server import Pump

log = logging.getLogger(__name__)

K_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""What a server that listens everywhere is reached by."""
K_TOLD_MOST = 1024


class Exposed:
    """Endpoints of this node that peers' pumps may reach, and the connections they have to them."""

    def __init__(self, pump: Pump) -> None:
        self.pump = pump
        self._fixed: set[tuple[str, int]] = set()
        self._by_server: dict[object, set[tuple[str, int]]] = {}
        self._relays: dict[Stream, Relay] = {}
        self._told: set[tuple[str, Forward]] = set()
        """What was refused, and to which site, since it last went well."""

    def expose(self, host: str, port: int, server: object = None) -> None:
        """Let peers reach host:port, as long as the server is attached; without one, always."""
        (self._fixed if server is None else self._by_server.setdefault(server, set())).add((host, port))
        with contextlib.suppress(RemoteProtocolError):
            self._find(host, port, self.pump.loop.now())  # so that its name is known when a peer comes

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

    def _find(self, host: str, port: int, now: float) -> Address | None:
        """Where to connect; None: its name is being looked up, which nobody else's bytes wait for. Raises
        RemoteProtocolError for a name that nobody knows.
        """
        try:
            return self.pump.resolver.find(K_HERE.get(host, host), port, now)
        except OSError as error:
            raise RemoteProtocolError(f"{host}:{port}: {error}") from None

    def start(self, stream: Stream, body: memoryview, now: float) -> None:
        """A FORWARD frame. Raises RemoteProtocolError, which ends the stream alone."""
        if stream.version < K_VERSION:
            raise RemoteProtocolError(f"FORWARD in version {stream.version}")
        wanted = decode_message(body, Forward)
        if stream in self._relays:
            raise RemoteProtocolError("FORWARD twice")
        target, where, problem = self._target(wanted), None, ""
        if target is None:
            problem = f"{wanted.host}:{wanted.port} isn't exposed at this node"
        elif len(self._relays) >= K_CONNECTIONS_MOST:
            problem = K_IN_USE
        else:
            where = self._find(*target, now)
            problem = "" if where else f"{target[0]} is still being looked up"
        if where is None:
            self.pump.inbound.count_refusal("forward")
            self._tell(stream.peer_site, wanted, problem)
            stream.send_control(message_frame(stream.version, FrameType.REFUSE, Refuse("forward", problem)))
            return
        self._told.discard((stream.peer_site, wanted))
        family, address = where
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect_ex(address)
        # Whether it worked is seen when the socket is writable; until then what comes waits in the relay.
        self._relays[stream] = Relay(
            self.pump.loop, sock, stream, lambda at: self._ended(stream, at), connecting=True
        )

    def _tell(self, site: str, wanted: Forward, problem: str) -> None:
        """Once: a router asks for the load of a server that is still loading twice a second."""
        if (site, wanted) not in self._told:
            log.warning("site %s: %s", site, problem)
            if len(self._told) >= K_TOLD_MOST:
                self._told.clear()
            self._told.add((site, wanted))

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

    def carries(self, stream: Stream) -> bool:
        """Whether a connection goes by the stream; if not, it rests at the peer for the next one."""
        return stream in self._relays

    def close(self, now: float) -> None:
        """Cut all connections: to a program the end of this process would look like its peer's."""
        for relay in list(self._relays.values()):
            relay.close(now)

    def __len__(self) -> int:
        return len(self._relays)
