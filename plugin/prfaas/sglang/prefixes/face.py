"""A rank's answers by HTTP, and its questions to others.

Plain HTTP: bind it to a private address, as SGLang's own bootstrap port, or to loopback with `control:`, by
which it is reached through the pumps alone.
"""

from __future__ import annotations

import http.client
import logging
import sys
import threading
from collections.abc import Callable, Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from prfaas.config.pump import split_address
from prfaas.model.errors import MachineError, PrfaasError
from prfaas.sglang.passage import Passage
from prfaas.sglang.prefixes.exchange import K_CODECS, K_GIVE, K_TAKE, Give, Refused, Take

logger = logging.getLogger(__name__)

K_MOST_BYTES = 64 << 20
"""Of a question: a million tokens are seven, of keys a page of one token each 68."""
K_CONNECTIONS = 128
"""Questions at once; each is open until its prefix is there."""
K_POLL_S = 0.1
"""How long its end may take to be seen."""
K_SILENT_S = 30.0
"""How long a connection may say nothing."""
Asker = Callable[[str, str, bytes, float], bytes]
Answers = dict[str, tuple[type[msgspec.Struct], Callable[[Any], msgspec.Struct]]]


class Face:
    """Serves until it is closed, from a thread of its own."""

    def __init__(
        self, listen: str, take: Callable[[Take], msgspec.Struct], give: Callable[[Give], msgspec.Struct]
    ) -> None:
        """Raises MachineError where it can't listen there."""
        answers: Answers = {K_TAKE: (Take, take), K_GIVE: (Give, give)}
        try:
            self._server = _Server(split_address(listen), _handler(answers))
        except OSError as error:
            raise MachineError(f"prefixes.listen {listen}: {error.strerror or error}") from None
        serve, poll_s = self._server.serve_forever, (K_POLL_S,)
        self._thread = threading.Thread(target=serve, args=poll_s, daemon=True, name="prfaas-prefixes")
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = K_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._free = threading.BoundedSemaphore(K_CONNECTIONS)
        self._cut_off = 0
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, of which there are so many at most: one more is cut off. Told, but not each
        time.
        """
        if not self._free.acquire(blocking=False):
            self._cut_off += 1
            if self._cut_off.bit_count() == 1:
                words = "prfaas: %s is cut off, %d questions being open; times that this was so: %d"
                logger.warning(words, client_address, K_CONNECTIONS, self._cut_off)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be had: the place is free again
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The base class writes a traceback. Who asked may be gone, its time being over: that is no error."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            logger.debug("prfaas: %s went without its answer: %s", client_address, error)
        else:
            logger.exception("prfaas: a question of %s", client_address)


def _handler(answers: Answers) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = K_SILENT_S

        def do_POST(self) -> None:
            status, body = self._answer()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _answer(self) -> tuple[int, bytes]:
            known = answers.get(self.path)
            if known is None:
                return _error(404, f"{self.path}: ask {' or '.join(answers)}")
            (kind, answer), codec = known, K_CODECS[self.path]
            try:
                size = int(self.headers.get("Content-Length", ""))
            except ValueError:
                return _error(411, "Content-Length is missing")
            if not 0 <= size <= K_MOST_BYTES:
                return _error(413, f"a question has at most {K_MOST_BYTES} bytes")
            try:
                return 200, codec.encode(answer(codec.decode(self.rfile.read(size), type=kind)))
            except msgspec.MsgspecError as error:
                return _error(400, str(error))
            except Refused as refused:
                return _error(refused.status, str(refused))
            except PrfaasError as error:
                return _error(503, str(error))
            except Exception as error:
                logger.exception("prfaas: %s", self.path)
                return _error(500, f"internal error: {type(error).__name__}")

        def log_message(self, format: str, *args: Any) -> None:
            return None

    return Handler


def _error(status: int, reason: str) -> tuple[int, bytes]:
    return status, msgspec.json.encode({"error": reason})


def asker(passage: Passage | None, own: Collection[str]) -> Asker:
    """How a server asks: those that `passage` (of `control:`) has a pump for by the pumps, its `own` ranks
    and all others as they are.
    """

    def asked(address: str, path: str, body: bytes, timeout_s: float) -> bytes:
        there = address if passage is None or address in own else passage.address(address)
        return ask(address, path, body, timeout_s, there)

    return asked


def ask(address: str, path: str, body: bytes, timeout_s: float, there: str = "") -> bytes:
    """A peer's answer; `there`: where to dial instead. Raises Refused: its own refusal, or that it isn't
    there.
    """
    try:
        host, port = split_address(there or address)
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        try:
            connection.request("POST", path, body)
            answer = connection.getresponse()
            said = answer.read()
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Refused(502, f"{address}: {error!r}") from None
    if answer.status != 200:
        raise Refused(answer.status, f"{address}: {_reason(said)}")
    return said


def _reason(said: bytes) -> str:
    try:
        return str(msgspec.json.decode(said, type=dict[str, str])["error"])
    except (msgspec.MsgspecError, KeyError):
        return repr(said[:200])
