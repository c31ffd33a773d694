"""TLS 1.3 by the OpenSSL that the package cryptography brings, for the bulk of what a pump moves.

Python's ssl takes and gives one record of 16 KiB a call, by the OpenSSL that it was built with. Debian 12's
(3.0) enciphers AES-GCM at 4 GB/s where newer ones use a processor's widest instructions (7.5). Both ends
together took 1.1 s of one core a GB with ssl, and 0.5 with this: eight records a call, sent without a copy
and read 128 KiB at a time. (With both in memory, as ends were until they were made for one way each, a whole
transfer over loopback took 15% more processor time and as much longer.)

A buffer of cffi over a memoryview, in a cycle of objects that nobody has any more, ends a process of Python
3.11: its collector clears the view, and the buffer then gives back what isn't there (SIGSEGV). So none here
outlives its call, in a traceback neither; what lasts is over arrays, which the collector doesn't go through.

The names are those of OpenSSL, which cryptography offers to pyOpenSSL. Without one of them `is_usable` is
False, and tls.py does the same by ssl.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.backends.openssl import backend

try:
    from cryptography.hazmat.bindings.openssl.binding import Binding

    _binding = Binding()
    _lib: Any = _binding.lib
    _ffi: Any = _binding.ffi
except (ImportError, AttributeError):  # pragma: no cover - a cryptography without it
    _lib = _ffi = None

K_CHUNK_BYTES = 128 * 1024
"""Enciphered or taken off the socket at a time: small enough to stay in a core's cache on its way."""
K_RECORD_BYTES = 16 * 1024
"""Most in a record, as it is read (RFC 8446, 5.1)."""
K_RECORD_OVERHEAD_BYTES = 5 + 1 + 16
"""Of a record: its header, its type and its tag, which are of one length in all of K_SUITES."""
K_CORKED_BYTES = 16 * 1024
"""More than a record holds: there is something to put together."""
K_ENDED = "UNEXPECTED_EOF_WHILE_READING"
K_SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
K_NEEDED = (
    "BIO_free", "BIO_get_mem_data", "BIO_new", "BIO_new_mem_buf", "BIO_read", "BIO_s_mem",
    "BIO_set_mem_eof_return",
    "ERR_clear_error", "ERR_get_error", "ERR_reason_error_string", "SSL_CTX_check_private_key",
    "SSL_CTX_free", "SSL_CTX_load_verify_locations", "SSL_CTX_new", "SSL_CTX_set_ciphersuites",
    "SSL_CTX_set_min_proto_version", "SSL_CTX_set_options", "SSL_CTX_set_session_cache_mode",
    "SSL_CTX_set_verify", "SSL_CTX_use_PrivateKey_file", "SSL_CTX_use_certificate_chain_file",
    "SSL_do_handshake", "SSL_free", "SSL_get_error", "SSL_get_peer_certificate",
    "SSL_get_verify_result", "SSL_new", "SSL_pending", "SSL_read", "SSL_set_accept_state",
    "SSL_set_bio", "SSL_set_connect_state", "SSL_set_fd", "SSL_set_mode", "SSL_write", "TLS_method",
    "X509_free", "X509_verify_cert_error_string", "i2d_X509_bio",
)  # fmt: skip


def is_usable() -> bool:
    """Whether this machine's cryptography has all that is called here."""
    return _lib is not None and all(hasattr(_lib, name) for name in K_NEEDED)


def version() -> str:
    """Of the library that serves here."""
    return backend.openssl_version_text() if is_usable() else ssl.OPENSSL_VERSION


class Context:
    """What the connections of one end share: mutual TLS 1.3 that shows `site_file`, trusts `authorities` and
    resumes no session. Raises ssl.SSLError for files that don't serve.
    """

    def __init__(self, site_file: Path, authorities: Iterable[Path]) -> None:
        _lib.ERR_clear_error()
        self.handle = context = _ffi.gc(_lib.SSL_CTX_new(_lib.TLS_method()), _lib.SSL_CTX_free)
        name, pem = os.fsencode(site_file), _lib.SSL_FILETYPE_PEM
        _require(_lib.SSL_CTX_set_min_proto_version(context, _lib.TLS1_3_VERSION))
        _require(_lib.SSL_CTX_set_ciphersuites(context, K_SUITES))
        _require(_lib.SSL_CTX_use_certificate_chain_file(context, name))
        _require(_lib.SSL_CTX_use_PrivateKey_file(context, name, pem))
        _require(_lib.SSL_CTX_check_private_key(context))
        for authority in authorities:
            _require(_lib.SSL_CTX_load_verify_locations(context, os.fsencode(authority), _ffi.NULL))
        both = _lib.SSL_VERIFY_PEER | _lib.SSL_VERIFY_FAIL_IF_NO_PEER_CERT
        _lib.SSL_CTX_set_verify(context, both, _ffi.NULL)
        _lib.SSL_CTX_set_session_cache_mode(context, _lib.SSL_SESS_CACHE_OFF)
        _lib.SSL_CTX_set_options(context, _lib.SSL_OP_NO_TICKET)


class End:
    """What both ends of a connection do alike. Those of one context belong to one thread."""

    def __init__(self, sock: socket.socket, context: Context) -> None:
        self.sock = sock
        self._ssl = _ffi.gc(_lib.SSL_new(context.handle), _lib.SSL_free)
        self._context = context

    def getpeercert(self) -> Mapping[str, object]:
        """The DNS names of the peer's certificate, as ssl tells them."""
        certificate = _lib.SSL_get_peer_certificate(self._ssl)
        if certificate == _ffi.NULL:
            return {}
        memory = _lib.BIO_new(_lib.BIO_s_mem())
        try:
            _require(_lib.i2d_X509_bio(memory, certificate))
            data = _ffi.new("char **")
            size = _lib.BIO_get_mem_data(memory, data)
            found = x509.load_der_x509_certificate(_ffi.buffer(data[0], size)[:])
            names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            return {
                "subjectAltName": tuple(("DNS", name) for name in names.get_values_for_type(x509.DNSName))
            }
        except (ValueError, x509.ExtensionNotFound):
            return {}
        finally:
            _lib.BIO_free(memory)
            _lib.X509_free(certificate)

    def _error(self) -> ssl.SSLError:
        """What ended the connection, as ssl raises it. No frame that raises it has it in a variable: the two
        would be a cycle, with all that the traceback's frames know.
        """
        reason = _reason()
        verified = _lib.SSL_get_verify_result(self._ssl)
        if verified == _lib.X509_V_OK:
            return _failure(reason)
        error = ssl.SSLCertVerificationError(1, reason)
        error.reason = reason
        error.verify_code = verified
        error.verify_message = _text(_lib.X509_verify_cert_error_string(verified))
        return error


class DiallingEnd(End):
    """A TlsEnd (tls.py) made for sending: records go from OpenSSL's own buffer to the socket, without a copy
    on their way, and corked, so that the kernel makes whole segments of them.
    """

    def __init__(self, sock: socket.socket, context: Context) -> None:
        super().__init__(sock, context)
        _require(_lib.SSL_set_fd(self._ssl, sock.fileno()))
        # What didn't fit is offered again, and need not lie where it lay.
        _lib.SSL_set_mode(self._ssl, _lib.SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER)
        _lib.SSL_set_connect_state(self._ssl)
        self._corked = False

    def do_handshake(self) -> None:
        self._check_open()
        result = _lib.SSL_do_handshake(self._ssl)
        if result != 1:
            raise self._ending(result)

    def recv_into(self, buffer: memoryview) -> int:
        self._check_open()
        size, got = len(buffer), 0
        with _ffi.from_buffer(buffer) as target:
            while got < size:
                n = _lib.SSL_read(self._ssl, target + got, size - got)
                if n <= 0:
                    try:
                        raise self._ending(n)
                    except ssl.SSLWantReadError:
                        if not got:
                            raise
                    except ssl.SSLEOFError:
                        pass
                    break
                got += n
        return got

    def send(self, data: memoryview) -> int:
        self._check_open()
        if not self._corked and len(data) > K_CORKED_BYTES:
            self._cork(True)
        n = _lib.SSL_write(self._ssl, _ffi.from_buffer(data), min(len(data), K_CHUNK_BYTES))
        if n <= 0:
            raise self._ending(n)
        return int(n)

    def flush(self) -> bool:
        if self._corked:
            self._cork(False)
        return True

    def pending(self) -> bool:
        return bool(_lib.SSL_pending(self._ssl))

    def bytes_before(self, plain_bytes: int) -> int:
        return 1

    def _check_open(self) -> None:
        """OpenSSL knows the descriptor by its number, which may be another file's once this is closed."""
        if self.sock.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _cork(self, corked: bool) -> None:
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, corked)
        self._corked = corked

    def _ending(self, result: int) -> OSError:
        """What a call's result means, as ssl raises it."""
        number = _ffi.errno  # before any other call
        code = _lib.SSL_get_error(self._ssl, result)
        if code == _lib.SSL_ERROR_WANT_READ:
            return ssl.SSLWantReadError()
        if code == _lib.SSL_ERROR_WANT_WRITE:
            return ssl.SSLWantWriteError()
        if code == _lib.SSL_ERROR_SYSCALL and number:
            _lib.ERR_clear_error()
            return OSError(number, os.strerror(number))
        error = self._error()
        if code in (_lib.SSL_ERROR_ZERO_RETURN, _lib.SSL_ERROR_SYSCALL) or error.reason == K_ENDED:
            return _ended()
        return error


class ListeningEnd(End):
    """A TlsEnd made for receiving: records are read where the socket's bytes were put, K_CHUNK_BYTES of them
    at a time; of OpenSSL reading from the socket itself each would take two calls of the system.
    """

    def __init__(self, sock: socket.socket, context: Context) -> None:
        super().__init__(sock, context)
        self._source, self._to_go = _lib.BIO_new(_lib.BIO_s_mem()), _lib.BIO_new(_lib.BIO_s_mem())
        _lib.SSL_set_bio(self._ssl, self._source, self._to_go)  # which owns them from here on
        _lib.SSL_set_accept_state(self._ssl)
        # Not zeroed: of what is hardly used only the first page is ever touched.
        came, out = (np.empty(K_CHUNK_BYTES, np.uint8) for _ in range(2))
        self._came, self._out = came.data, out.data
        self._came_c, self._out_c = _ffi.from_buffer(came), _ffi.from_buffer(out)
        self._going = self._out[:0]
        self._held_bytes = 0
        """Taken off the socket and not read: once nothing more can be read, of a record that isn't whole."""

    def do_handshake(self) -> None:
        while True:
            result = _lib.SSL_do_handshake(self._ssl)
            code = _lib.SSL_get_error(self._ssl, result)
            if result == 1:
                self._held_bytes = _lib.BIO_get_mem_data(self._source, _ffi.new("char **"))
                self.flush()
                return
            if code != _lib.SSL_ERROR_WANT_READ:
                raise self._refusal()
            if not self.flush():
                raise ssl.SSLWantWriteError
            came = self._fill()
            if came == 0:
                raise _ended()
            if came is None:
                raise ssl.SSLWantReadError

    def _refusal(self) -> ssl.SSLError:
        """Why the peer isn't taken, which it is told."""
        error = self._error()
        with contextlib.suppress(OSError):
            self.flush()
        return error

    def recv_into(self, buffer: memoryview) -> int:
        size, got = len(buffer), 0
        with _ffi.from_buffer(buffer) as target:
            while got < size:
                n = _lib.SSL_read(self._ssl, target + got, size - got)
                if n > 0:
                    got += n
                    self._held_bytes -= n
                    # No call reads of two records: one that gives a record's most has read all of it.
                    if n == K_RECORD_BYTES or not _lib.SSL_pending(self._ssl):
                        self._held_bytes -= K_RECORD_OVERHEAD_BYTES
                    continue
                code = _lib.SSL_get_error(self._ssl, n)
                if code == _lib.SSL_ERROR_ZERO_RETURN:
                    break
                if code != _lib.SSL_ERROR_WANT_READ:
                    raise self._error()
                came = self._fill()
                if came is None and not got:
                    raise ssl.SSLWantReadError
                if not came:
                    break
        return got

    def send(self, data: memoryview) -> int:
        if not self.flush():
            raise ssl.SSLWantWriteError
        n = _lib.SSL_write(self._ssl, _ffi.from_buffer(data), min(len(data), K_CHUNK_BYTES))
        if n <= 0:
            raise self._error()
        self.flush()
        return int(n)

    def flush(self) -> bool:
        while True:
            if not self._going:
                n = _lib.BIO_read(self._to_go, self._out_c, len(self._out))
                if n <= 0:
                    return True
                self._going = self._out[:n]
            try:
                n = self.sock.send(self._going)
            except BlockingIOError:
                return False
            self._going = self._going[n:]

    def pending(self) -> bool:
        return bool(_lib.SSL_pending(self._ssl) or _lib.BIO_get_mem_data(self._source, _ffi.new("char **")))

    def bytes_before(self, plain_bytes: int) -> int:
        # What isn't counted here (a message of TLS itself) makes it wake earlier, never too late.
        return max(1, plain_bytes - max(0, self._held_bytes))

    def _fill(self) -> int | None:
        """Take what has come, all before it being read: how many bytes; 0: it has ended; None: nothing."""
        try:
            n = self.sock.recv_into(self._came)
        except BlockingIOError:
            return None
        if n:
            self._held_bytes += n
            self._source = _lib.BIO_new_mem_buf(self._came_c, n)
            _lib.BIO_set_mem_eof_return(self._source, -1)  # its end is not the connection's
            _lib.SSL_set_bio(self._ssl, self._source, self._to_go)  # which frees the one before
        return n


def _require(result: int) -> None:
    if result != 1:
        raise _failure(_reason())


def _failure(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason  # ssl's own have it, those that are made in Python don't
    return error


def _ended() -> ssl.SSLEOFError:
    error = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the peer ended the connection")
    error.reason = K_ENDED
    return error


def _reason() -> str:
    """Of the first error in OpenSSL's queue, which is emptied."""
    text = _lib.ERR_reason_error_string(_lib.ERR_get_error())
    _lib.ERR_clear_error()
    return _text(text).upper().replace(" ", "_") or "UNKNOWN"


def _text(words: Any) -> str:
    return _ffi.string(words).decode(errors="replace") if words != _ffi.NULL else ""
