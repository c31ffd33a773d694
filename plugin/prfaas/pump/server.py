"""The pump: one process that owns a node's streams to other sites, for all of the node's servers."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
from pathlib import Path

from prfaas.config.pump import PumpConfig, split_address
from prfaas.model.errors import MachineError, RemoteProtocolError
from prfaas.model.transfer import FailureReason
from prfaas.pump import tcpinfo
from prfaas.pump.accepting import K_BACKLOG, Acceptor, bound
from prfaas.pump.desk import LinkDesk
from prfaas.pump.exposing import Exposed
from prfaas.pump.forwarding import Forwards
from prfaas.pump.inbound import Inbound
from prfaas.pump.loop import Loop
from prfaas.pump.measured import K_UNSENT_FIRST_BYTES
from prfaas.pump.owner import Owner
from prfaas.pump.page import Page
from prfaas.pump.peer import Peer
from prfaas.pump.resolving import Resolver
from prfaas.pump.stream import Stream
from prfaas.pump.trust import Trust
from prfaas.pump_client import messages as m
from prfaas.telemetry.package import K_PACKAGE_VERSION
from prfaas.transfer.frames import FrameType, Hello, LedgerMessage, decode_message, message_frame
from prfaas.transfer.receiving import Broken, ReceiveEvent, Receiving
from prfaas.transfer.sending import Completed, SendEvent

log = logging.getLogger(__name__)

K_TICK_S = 0.1
K_NEW_S = 3.0
K_SITES_TOLD = 64
"""Sites' names come from their servers: no more of them are noted."""
R = selectors.EVENT_READ


class Pump:
    """Call `run`; `stop` from a signal handler ends it. `persistent`: stay without clients (an operator
    started it).
    """

    def __init__(self, config: PumpConfig, *, persistent: bool = True) -> None:
        self.config = config
        self.trust = Trust(config)
        self.loop, self.resolver = Loop(), Resolver()
        self.boot = secrets.token_bytes(16)
        self.receiving = Receiving(config.max_transfers)
        self.inbound = Inbound(self)
        self.forwards, self.exposed = Forwards(self), Exposed(self)
        self.ended: dict[str, int] = {}
        self._persistent = persistent
        self._owners: dict[bytes, Owner] = {}
        self._controls: set[Owner] = set()
        self._peers: dict[str, Peer] = {}
        self._last_client_s = self._started_s = self.loop.now()
        self.page = Page(self.loop, self.stats)
        self._page_socket: socket.socket | None = None
        self._listener = self._listen()
        try:
            self._serve_page()
            self._open_forwards()
            self._control = self._listen_control(config.control_path)
            self._control_inode = os.stat(config.control_path).st_ino
        except BaseException:
            self._listener.close()
            self.forwards.close(self.loop.now())
            if self._page_socket is not None:
                self._page_socket.close()
            self.loop.close()
            raise
        host, port = self._listener.getsockname()[:2]
        self.address = self._advertised(host, port)
        Acceptor(self.loop, self._listener, self._accept_peer)
        Acceptor(self.loop, self._control, self._accept_server)
        now = self.loop.now()
        self.desks = {link.peer_site: LinkDesk(self, link, now) for link in config.links}
        self._told_of = {config.site}
        self.loop.call_at(now + K_TICK_S, self._tick)

    def _listen(self) -> socket.socket:
        host, _ = split_address(self.config.listen)
        if not self.trust.encrypted and not self.trust.plaintext_allowed(host):
            raise MachineError(
                f"listen {host}: off loopback tls is needed (or allow_plaintext, which trusts the network)"
            )
        return bound(self.config.listen, "listen")

    def _serve_page(self) -> None:
        """The metrics page, where one is configured. Raises MachineError."""
        if self.config.metrics:
            self._page_socket = bound(self.config.metrics, "metrics")
            Acceptor(self.loop, self._page_socket, self.page.accept)

    def _open_forwards(self) -> None:
        """What the configuration forwards and exposes. Raises MachineError."""
        for forward in self.config.forwards:
            self.forwards.open_fixed(forward)
        for endpoint in self.config.exposes:
            self.exposed.expose(*split_address(endpoint))

    def _listen_control(self, path: Path) -> socket.socket:
        """The unix socket for servers of the same user. Whoever starts a pump holds the lock beside it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if path.exists():
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    if probe.connect_ex(str(path)) == 0:
                        raise MachineError(f"{path}: another pump is at work there")
                path.unlink()
            path.parent.mkdir(parents=True, exist_ok=True)
            before = os.umask(0o177)
            try:
                sock.bind(str(path))
            finally:
                os.umask(before)
            sock.listen(K_BACKLOG)
        except OSError as error:
            sock.close()
            raise MachineError(f"{path}: {error.strerror or error}") from None
        except MachineError:
            sock.close()
            raise
        return sock

    def _advertised(self, host: str, port: int) -> str:
        wanted = self.config.advertise
        if not wanted:
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            split_address(wanted)
        except ValueError:
            return f"{wanted}:{port}"
        return wanted

    def check_site(self, stream: Stream, hello: Hello) -> None:
        """Whether the peer is the site it says it is. Raises RemoteProtocolError."""
        if not hello.site or len(hello.site) > 64:
            raise RemoteProtocolError("a HELLO without a site")
        if self.trust.encrypted and hello.site != stream.proved_site:
            raise RemoteProtocolError(f"site {hello.site!r} with the certificate of {stream.proved_site!r}")

    # Peers

    def _accept_peer(self, sock: socket.socket, now: float) -> None:
        try:
            host = str(sock.getpeername()[0])
        except OSError:  # reset before we came to it
            sock.close()
            return
        tls = self.trust.context(server=True)
        if self.inbound.crowded or (tls is None and not self.trust.plaintext_allowed(host)):
            self.inbound.count_refusal("crowded" if self.inbound.crowded else "plaintext")
            tcpinfo.abort(sock)
            return
        sock.setblocking(False)
        tcpinfo.prepare(sock, K_UNSENT_FIRST_BYTES)
        stream = Stream(self.loop, sock, self.inbound, 0, dialled=False, tls=tls, now=now)
        stream.dialled_from = host
        self.inbound.accept(stream)
        stream.on_ready(0, now)

    def hello(self, index: int) -> Hello:
        oldest, newest = self.config.protocol_versions
        return Hello(oldest, newest, self.boot, self.config.site, self.address, index)

    def peer(self, address: str, now: float) -> Peer:
        """The peer at the address, known or new. Raises ValueError for what is no address."""
        split_address(address)
        if address not in self._peers:
            self._peers[address] = Peer(self, address, now)
        return self._peers[address]

    def peers_of(self, site: str) -> list[Peer]:
        """The peers that are pumps of the site."""
        return [p for p in self._peers.values() if site in (p.site, p.wanted_site)]

    def on_ledger_question(self, stream: Stream, body: memoryview, now: float) -> None:
        """A frame of a pump that dialled us: a question to a ledger kept here. Raises RemoteProtocolError."""
        message = decode_message(body, LedgerMessage)
        if not message.request:
            raise RemoteProtocolError("an answer of a ledger that we didn't ask by this stream")
        for desk in self.desks.values():
            if str(desk.link) == message.link:
                desk.on_question(stream, message, now)
                return
        error = LedgerMessage(message.link, False, message.serial, {"error": "no such link here"})
        stream.send_control(message_frame(stream.version, FrameType.LEDGER, error))

    def on_ledger_answer(self, peer: Peer, body: memoryview, now: float) -> None:
        """A frame of a pump that we dialled: what its ledger says, if it is the one that we ask. Raises
        RemoteProtocolError.
        """
        message = decode_message(body, LedgerMessage)
        for desk in self.desks.values():
            if str(desk.link) == message.link and not message.request and desk.asks(peer):
                desk.on_answer(message, now)
                return
        raise RemoteProtocolError("an answer of a ledger that nobody here asks")

    # Servers

    def is_new(self, now: float) -> bool:
        """Whether servers of a pump before this one may still be about to attach."""
        return now - self._started_s < K_NEW_S

    def _accept_server(self, sock: socket.socket, now: float) -> None:
        self._controls.add(Owner(self, sock))

    def owner(self, token: object) -> Owner | None:
        return self._owners.get(token) if isinstance(token, bytes) else None

    def attach(self, owner: Owner) -> None:
        self._owners[owner.token] = owner
        self.receiving.add_owner(owner.token, owner.token, owner.registered)

    def detach(self, owner: Owner, now: float) -> None:
        self._controls.discard(owner)
        self._last_client_s = now
        self.exposed.withdraw(owner)
        self.forwards.withdraw(owner)
        if self._owners.get(owner.token) is owner:
            del self._owners[owner.token]
            for event in self.receiving.remove_owner(owner.token):
                self.on_receive_event(event, now)

    def read_servers(self, now: float) -> None:
        """Handle what servers have sent but the loop hasn't come to."""
        for owner in list(self._controls):
            owner.on_ready(R, now)

    def end_lease(self, lease_id: int, now: float) -> None:
        for event in self.receiving.end(lease_id, FailureReason.CANCELLED):
            self.on_receive_event(event, now)

    def on_receive_event(self, event: ReceiveEvent, now: float) -> None:
        """Tell the owner, and the sender if it doesn't know."""
        incoming = event.incoming
        opening = incoming.opening
        broken = event if isinstance(event, Broken) else None
        if broken is not None:
            self.inbound.count_refusal(broken.reason.value)
            if broken.tell_peer:
                self.inbound.tell_refused(incoming, broken.reason, broken.detail)
        owner = self.owner(incoming.owner)
        if owner is not None and opening.lease_id:
            owner.send(
                m.Arrived(
                    opening.lease_id,
                    incoming.transfer_id,
                    opening.kind,
                    opening.index,
                    opening.count,
                    opening.source,
                    incoming.applied_bytes,
                    broken is None,
                    broken.reason.value if broken else "",
                    broken.detail if broken else "",
                )
            )

    # Figures

    def count_ended(self, event: SendEvent) -> None:
        name = "ok" if isinstance(event, Completed) else event.reason.value
        self.ended[name] = self.ended.get(name, 0) + 1

    def stats(self, now: float) -> dict[str, object]:
        """Counters of every peer and of what came in, in bytes, and each stream's TCP figures."""
        peers = []
        for peer in self._peers.values():
            for stream in peer.streams:
                stream.sample(now)
            streams = [
                {
                    "congestion_control": s.congestion_control, "rtt_s": s.info.rtt_s,
                    "min_rtt_s": s.info.min_rtt_s, "cwnd_packets": s.info.cwnd_packets,
                    "retransmitted_bytes": s.info.retransmitted_bytes,
                    "delivery_rate_bps": s.info.delivery_rate_bps, "acked_bytes": s.info.acked_bytes,
                    "tls": bool(s.proved_site),
                }
                for s in peer.streams if s.ready and s.info is not None
            ]  # fmt: skip
            peers.append(
                {
                    "address": peer.address, "site": peer.site, "streams": streams, "rtt_s": peer.rtt_s,
                    "streams_wanted": peer.count.wanted, "goodput_bps": peer.count.goodput_bps,
                    "loss": peer.count.loss, "backlog_bytes": peer.sending.backlog_bytes,
                    "in_flight_bytes": peer.sending.in_flight_bytes, "transfers": len(peer.sending),
                    "slack_s": peer.slack_s(now), "last_error": peer.last_error, **peer.totals().as_dict(),
                }
            )  # fmt: skip
        inbound = {"streams": len(self.inbound.streams), "refusals": dict(self.inbound.refusals)}
        for stream in self.inbound.streams:
            stream.sample(now)
        total = self.inbound.counters.as_dict()
        for stream in self.inbound.streams:
            for name, value in stream.counters.as_dict().items():
                total[name] += value
        cpu = os.times()
        return {
            "address": self.address, "site": self.config.site, "pid": os.getpid(), "peers": peers,
            "version": K_PACKAGE_VERSION, "protocol_versions": self.config.protocol_versions,
            "certificates": [
                {"file": file, "site": site, "kind": kind, "ends_unix_s": ends_unix_s}
                for (file, site, kind), ends_unix_s in self.trust.ends_unix_s.items()
            ],
            "inbound": {**inbound, **total}, "ended": dict(self.ended), "leases": self.receiving.n_leases,
            "incoming": self.receiving.n_transfers, "clients": len(self._owners),
            "links": [d.status(now) for d in self.desks.values()],
            "forwards": self.forwards.stats(now), "forwarded_in": len(self.exposed),
            "cpu_user_s": cpu.user, "cpu_system_s": cpu.system,
        }  # fmt: skip

    def tell_unkept(self, site: str) -> None:
        """Bytes go to a site whose link has no ledger. Meant, perhaps; but where others have one it may be a
        slip, by which nobody is refused any more: said once.
        """
        if self.desks and site not in self._told_of and len(self._told_of) < K_SITES_TOLD:
            self._told_of.add(site)
            named = ", ".join(self.desks)
            log.warning("no `links:` leads to %r, only to %s: all that goes there is admitted", site, named)

    # Life

    def _tick(self, now: float) -> None:
        for event in self.receiving.tick(now):
            self.on_receive_event(event, now)
        for owner in self._owners.values():
            owner.tell_progress(now)
        self._forget_peers(now)
        if self._controls:  # those that have not attached yet too: their model is still loading
            self._last_client_s = now
        elif not self._persistent and now - self._last_client_s > self.config.idle_exit_s:
            log.info("no clients for %.0f s: the pump ends", self.config.idle_exit_s)
            self.stop()
        self.loop.call_at(now + K_TICK_S, self._tick)

    def _forget_peers(self, now: float) -> None:
        """Those that are given up. Not by whom a link that is down is probed: nothing would tell of its
        return.
        """
        down = {site for site, desk in self.desks.items() if desk.is_down(now)}
        for address, peer in list(self._peers.items()):
            if peer.is_given_up(now) and not down & {peer.site, peer.wanted_site}:
                del self._peers[address]
                peer.close(now)

    def run(self) -> None:
        log.info(
            "pump of site %s at %s, control %s", self.config.site, self.address, self.config.control_path
        )
        try:
            self.loop.run()
        finally:
            n_out = sum(len(peer.sending) for peer in self._peers.values())
            log.info(
                "the pump ends: %d transfers out and %d in are left to the one that follows",
                n_out, self.receiving.n_transfers,
            )  # fmt: skip
            self.close()

    def stop(self) -> None:
        self.loop.stop()

    def _unlink_control(self) -> None:
        """Unless the path has become another pump's: one that waits for clients may end late."""
        path = self.config.control_path
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == self._control_inode:
                path.unlink()

    def close(self) -> None:
        now = self.loop.now()
        self._unlink_control()
        self._listener.close()
        self._control.close()
        self.page.close()
        if self._page_socket is not None:
            self._page_socket.close()
        self.forwards.close(now)
        self.exposed.close(now)
        for peer in self._peers.values():
            peer.close(now)
        for owner in list(self._controls):
            owner.close("", now)
        self.inbound.close(now)
        self.loop.close()
