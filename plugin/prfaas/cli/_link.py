"""Talks to a peer's pump as a pump would, to learn what the way there gives: no transfer, no lease, nothing
kept.

A pump answers each PING with a PONG that carries the first bytes of it back: empty PINGs measure the round
trip, full ones the rate, by any number of streams and any congestion control that this kernel lets us use.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import ssl
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

from prfaas.config.pump import split_address
from prfaas.model.errors import PrfaasError, RemoteProtocolError
from prfaas.pump import tcpinfo
from prfaas.pump.keys import peer_site, site_dns_name
from prfaas.transfer.frames import (
    K_HEADER_BYTES,
    K_HELLO_VERSION,
    K_VERSION_NEWEST,
    K_VERSION_OLDEST,
    FrameType,
    Header,
    Hello,
    agree_version,
    control_frame,
    decode_message,
    message_frame,
)

K_ANSWER_S = 5.0
K_PING_BYTES = 60_000
K_RTT_PINGS = 10
K_WARM_SHARE = 0.4  # of a rate measurement, given to slow start and not counted
K_READ_BYTES = 1 << 16
K_SENDS_A_TURN = 4  # of one stream, before the others and the clock have theirs


@dataclass(frozen=True)
class Rate:
    """What some streams carried together."""

    streams: int
    congestion_control: str
    goodput_bps: float
    loss: float
    """Share of TCP's bytes that were sent again."""


class LinkError(PrfaasError):
    """The peer can't be reached, or refuses us. The message says at which step."""


class Connection:
    """One stream to a peer's pump, past TLS and HELLO. Close it, or use it as a context."""

    def __init__(
        self, address: str, tls: ssl.SSLContext | None, our_site: str, peer: str, congestion_control: str = ""
    ) -> None:
        """`peer`: the site expected; empty: whichever answers. Raises LinkError."""
        self.address = address
        host, port = split_address(address)
        try:
            plain = socket.create_connection((host, port), timeout=K_ANSWER_S)
        except OSError as error:
            raise LinkError(f"{address}: can't be reached: {_reason(error)}") from None
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if congestion_control:
            tcpinfo.set_congestion_control(plain, congestion_control)
        self.sock: socket.socket = plain
        try:
            if tls is not None:
                tls.check_hostname = bool(peer)
                self.sock = tls.wrap_socket(plain, server_hostname=site_dns_name(peer) if peer else None)
            self._greet(our_site)
        except ssl.SSLError as error:
            self.sock.close()
            detail = getattr(error, "verify_message", "") or error.reason or str(error)
            if error.reason == "WRONG_VERSION_NUMBER":
                detail = "what is there doesn't speak it; is this the pump's port, and has that pump `tls:`?"
            raise LinkError(f"{address}: TLS: {detail}") from None
        except TimeoutError:
            self.sock.close()
            raise LinkError(
                f"{address}: connected, but nothing there speaks as a pump; is it plaintext?"
            ) from None
        except (OSError, RemoteProtocolError) as error:
            self.sock.close()
            said = _reason(error) if isinstance(error, OSError) else str(error)
            raise LinkError(f"{address}: connected, then: {said}") from None
        except BaseException:
            self.sock.close()
            raise

    def _greet(self, our_site: str) -> None:
        hello = Hello(K_VERSION_OLDEST, K_VERSION_NEWEST, secrets.token_bytes(16), our_site, "", 0)
        self.sock.sendall(message_frame(K_HELLO_VERSION, FrameType.HELLO, hello))
        header, body = self._receive(None)
        theirs = decode_message(body, Hello)
        self.version = agree_version((K_VERSION_OLDEST, K_VERSION_NEWEST), (theirs.oldest, theirs.newest))
        self.site = theirs.site
        proved = peer_site(self.sock) if isinstance(self.sock, ssl.SSLSocket) else None
        self.proved = proved is not None
        if proved is not None and proved != theirs.site:
            raise RemoteProtocolError(
                f"its certificate names site {proved!r}, itself it says {theirs.site!r}"
            )
        assert header.type is FrameType.HELLO

    def _receive(self, version: int | None) -> tuple[Header, bytes]:
        header = Header.from_bytes(self._exactly(K_HEADER_BYTES), version)
        return header, self._exactly(header.body_bytes)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise ConnectionResetError("it closed the connection; does it trust our authority?")
            data += piece
        return bytes(data)

    def round_trips(self, count: int = K_RTT_PINGS) -> list[float]:
        """Seconds of `count` empty PINGs, one after the other. Raises LinkError."""
        found = []
        try:
            for _ in range(count):
                began_s = time.perf_counter()
                self.sock.sendall(control_frame(self.version, FrameType.PING, b""))
                self._receive(self.version)
                found.append(time.perf_counter() - began_s)
        except (OSError, RemoteProtocolError) as error:
            raise LinkError(f"{self.address}: lost while measured: {error}") from None
        return found

    def info(self) -> tcpinfo.TcpInfo | None:
        return tcpinfo.read(self.sock)

    def congestion_control(self) -> str:
        name = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        return name.rstrip(b"\0").decode()

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Filler:
    """Keeps one connection full of PINGs and counts what was answered."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.answered_bytes = 0
        self._frame = control_frame(connection.version, FrameType.PING, bytes(K_PING_BYTES))
        self._left = memoryview(self._frame)
        self._in = bytearray()
        connection.sock.setblocking(False)

    def on_writable(self) -> None:
        try:
            for _ in range(K_SENDS_A_TURN):
                sent = self.connection.sock.send(self._left)
                self._left = self._left[sent:] if sent < len(self._left) else memoryview(self._frame)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return

    def on_readable(self) -> None:
        try:
            for _ in range(K_SENDS_A_TURN):
                data = self.connection.sock.recv(K_READ_BYTES)
                if not data:
                    raise LinkError(f"{self.connection.address}: closed the connection while measured")
                self._in += data
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        at = 0
        while len(self._in) - at >= K_HEADER_BYTES:
            header = Header.from_bytes(self._in[at : at + K_HEADER_BYTES], self.connection.version)
            if len(self._in) - at < K_HEADER_BYTES + header.body_bytes:
                break
            at += K_HEADER_BYTES + header.body_bytes
            self.answered_bytes += K_PING_BYTES if header.type is FrameType.PONG else 0
        del self._in[:at]


def measure_rate(connections: Iterable[Connection], seconds: float) -> Rate:
    """What these streams carry together in `seconds`, the first part left to slow start. Raises LinkError."""
    fillers = [_Filler(connection) for connection in connections]
    before = [filler.connection.info() for filler in fillers]
    began_s = time.perf_counter()
    warm_s, end_s = began_s + seconds * K_WARM_SHARE, began_s + seconds
    warm_bytes: int | None = None
    counted_s = began_s
    with selectors.DefaultSelector() as selector:
        for filler in fillers:
            selector.register(filler.connection.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, filler)
        while (now := time.perf_counter()) < end_s:
            if warm_bytes is None and now >= warm_s:
                warm_bytes, counted_s = sum(filler.answered_bytes for filler in fillers), now
            for key, mask in selector.select(min(0.05, end_s - now)):
                _turn(key.data, mask)
    answered = sum(filler.answered_bytes for filler in fillers) - (warm_bytes or 0)
    elapsed_s = time.perf_counter() - counted_s
    after = [filler.connection.info() for filler in fillers]
    sent = resent = 0
    for first, last in zip(before, after, strict=True):
        if first is not None and last is not None:
            sent += last.sent_bytes - first.sent_bytes
            resent += last.retransmitted_bytes - first.retransmitted_bytes
    return Rate(
        streams=len(fillers),
        congestion_control=fillers[0].connection.congestion_control(),
        goodput_bps=answered * 8 / elapsed_s,
        loss=resent / sent if sent else 0.0,
    )


def _turn(filler: _Filler, mask: int) -> None:
    try:
        if mask & selectors.EVENT_READ:
            filler.on_readable()
        if mask & selectors.EVENT_WRITE:
            filler.on_writable()
    except (OSError, RemoteProtocolError) as error:
        raise LinkError(f"{filler.connection.address}: lost while measured: {error}") from None


def spread(seconds: Iterable[float]) -> tuple[float, float, float]:
    """Least, median and greatest."""
    found = sorted(seconds)
    return found[0], statistics.median(found), found[-1]


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
