"""TLS over a socket that doesn't block: by cryptography's OpenSSL (openssl.py) where it can be had, else by
Python's ssl, one class for each end of a stream.

Blocks go one way, from the end that dialled. ssl.SSLSocket makes two system calls for every record of 16 KiB
that it reads, which costs more than the cipher does: so the end that listens takes K_CHUNK_BYTES off the
socket at a time, and reads the records in memory (ssl.MemoryBIO). For writing that would be two copies more,
which cost more than the calls they save (0.62 against 0.52 s a GB): the end that dials uses an SSLSocket.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from prfaas.model.errors import UsageError
from prfaas.pump import keys, openssl

K_CHUNK_BYTES = 256 * 1024
"""Small enough to stay in a core's cache between the cipher and the socket."""
K_RECORD_BYTES = 16 * 1024


class TlsEnd(Protocol):
    """One end of a connection. Calls raise as those of an ssl.SSLSocket that doesn't block do; its owner
    closes `sock`.
    """

    @property
    def sock(self) -> socket.socket:
        """For options and figures."""

    def do_handshake(self) -> None:
        """Raises SSLWantReadError or SSLWantWriteError until it is done, SSLError when it fails."""

    def getpeercert(self) -> Mapping[str, object]:
        """Empty without one."""

    def recv_into(self, buffer: memoryview) -> int:
        """As many bytes as have come, up to the buffer's; 0: the peer has ended. Raises SSLWantReadError."""

    def send(self, data: memoryview) -> int:
        """How many bytes were taken; they may wait here for `flush`. Raises SSLWantWriteError."""

    def flush(self) -> bool:
        """Give the socket what waits; whether it took all of it."""

    def pending(self) -> bool:
        """Whether bytes have been taken off the socket that nobody has read yet."""

    def bytes_before(self, plain_bytes: int) -> int:
        """No more than must come to the socket before so many more bytes can be read, after SSLWantReadError;
        1 where that isn't known.
        """


class TlsContext:
    """What the connections that this side dialled, or those that came to it (`server`), share. Raises
    UsageError for files that can't be used.
    """

    def __init__(self, *, server: bool, site_file: Path, authorities: Sequence[Path]) -> None:
        # The one who checks files, whichever serves: its errors say what is wrong with which.
        self._plain = keys.tls_context(server=server, site_file=site_file, authorities=authorities)
        # The site is compared by who trusts (trust.py), for diallers that expect no certain one as well.
        self._plain.check_hostname = False
        self._native: openssl.Context | None = None
        if openssl.is_usable():
            try:
                self._native = openssl.Context(site_file, authorities)
            except ssl.SSLError as error:
                raise UsageError(f"{site_file}: {error.reason}") from None

    def end(self, sock: socket.socket, *, dialled: bool) -> TlsEnd:
        """Takes the socket over, which doesn't block and is connected."""
        if self._native is not None:
            return (openssl.DiallingEnd if dialled else openssl.ListeningEnd)(sock, self._native)
        return DiallingEnd(sock, self._plain) if dialled else ListeningEnd(sock, self._plain)


class DiallingEnd:
    """Made for sending."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = context.wrap_socket(sock, do_handshake_on_connect=False)
        self.do_handshake = self.sock.do_handshake
        self.send = self.sock.send

    def getpeercert(self) -> Mapping[str, object]:
        return self.sock.getpeercert() or {}

    def recv_into(self, buffer: memoryview) -> int:
        got = 0
        while got < len(buffer):
            try:
                n = self.sock.recv_into(buffer[got:])
            except ssl.SSLWantReadError:
                if not got:
                    raise
                break
            if not n:
                break
            got += n
        return got

    def flush(self) -> bool:
        return True

    def pending(self) -> bool:
        return bool(self.sock.pending())

    def bytes_before(self, plain_bytes: int) -> int:
        return 1


class ListeningEnd:
    """Made for receiving."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self._came, self._to_go = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._came, self._to_go, server_side=True)
        self._going = memoryview(b"")
        self._raw = memoryview(bytearray(K_CHUNK_BYTES))

    def do_handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self.flush():
                    raise ssl.SSLWantWriteError from None
                if not self._fill():
                    raise
            except ssl.SSLError:
                # Why we refuse must reach the peer.
                with contextlib.suppress(OSError):
                    self.flush()
                raise
            else:
                self.flush()
                return

    def getpeercert(self) -> Mapping[str, object]:
        return self._tls.getpeercert() or {}

    def recv_into(self, buffer: memoryview) -> int:
        got = 0
        while got < len(buffer):
            try:
                n = self._tls.read(len(buffer) - got, buffer[got:])
            except ssl.SSLWantReadError:
                if self._fill():
                    continue
                if not got:
                    raise
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            if not n:
                break
            got += int(n)
        return got

    def send(self, data: memoryview) -> int:
        if not self.flush():
            raise ssl.SSLWantWriteError
        most, sent = min(len(data), K_CHUNK_BYTES), 0
        while sent < most:
            sent += self._tls.write(data[sent : min(most, sent + K_RECORD_BYTES)])
        self.flush()
        return sent

    def flush(self) -> bool:
        while True:
            if not self._going:
                if not self._to_go.pending:
                    return True
                self._going = memoryview(self._to_go.read())
            try:
                n = self.sock.send(self._going)
            except BlockingIOError:
                return False
            self._going = self._going[n:]

    def pending(self) -> bool:
        return bool(self._tls.pending() or self._came.pending)

    def bytes_before(self, plain_bytes: int) -> int:
        return 1

    def _fill(self) -> bool:
        """Take what has come, or its end; False: nothing."""
        try:
            n = self.sock.recv_into(self._raw)
        except BlockingIOError:
            return False
        if n:
            self._came.write(self._raw[:n])
        else:
            self._came.write_eof()
        return True


def reason_of(error: Exception) -> str:
    """Why a stream ended, for logs and for who waits on it."""
    if isinstance(error, ssl.SSLError):
        # Those that are made in Python have no reason until they are given one.
        return f"TLS: {getattr(error, 'verify_message', '') or getattr(error, 'reason', '') or error}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return str(error)
