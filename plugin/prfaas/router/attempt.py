"""One try of one request by one path: a POST to the prefill server and one to the decode server, at once.

Decode's answer is the answer. Prefill's answer only says that it ended, well or not; it is awaited so that
a prefill that fails ends the attempt at once (a decode server would wait for it), and cancelled when decode
fails (a prefill server would wait for ever). Whatever ends an attempt early closes both connections and tells
both servers to abort the request by its id.

    open()  -> Opened            the first token is here (streaming), or the whole answer
            -> AttemptFailed     nothing has reached the client: another path may be tried
            -> BadRequest        a server says that the client is at fault
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum

import aiohttp
import msgspec

from prfaas.router.body import Asked, refuse_samples, with_fields
from prfaas.router.errors import BadRequest
from prfaas.router.fleet import ServerHandle
from prfaas.router.prefill_answer import PrefillAnswer, read_prefill_answer
from prfaas.router.sse import EventCutter, Failure, body_failure, first_event_failure
from prfaas.router.upstream import Connection, NotConnected, NotHttp, UpstreamError

K_REFUSED = "prfaas_refused"
K_CLIENT_FAULTS = frozenset({400, 413, 415, 422})
K_CAUSE_S = 0.1
"""How long a failed decode's attempt waits for prefill's own reason, which is usually the cause."""
K_ABORT_S = 5.0
K_LINGER_S = 5.0
K_MAX_RETRY_AFTER_S = 3600.0
"""A server that asks for more isn't believed."""
_RETRY_AFTER = re.compile(r"retry[-_ ]?after[-_ ]?s?\W{1,3}([0-9]{1,9}(?:\.[0-9]{1,9})?)\b", re.IGNORECASE)
_SECONDS = re.compile(r"[0-9]{1,9}")


class FailureKind(StrEnum):
    """Why an attempt ended without a token. The names are those of the metrics' labels."""

    REFUSED = "refused"  # admission or a full queue: the server is well
    CONNECT = "connect"  # nobody there
    LOST = "lost"  # the connection ended in mid-request
    SERVER = "server"  # an error answer
    GARBAGE = "garbage"  # an answer that is none
    TIMEOUT = "timeout"  # no first token in time


class Side(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class AttemptFailed(Exception):
    """Nothing of an answer has reached the client."""

    def __init__(
        self, side: Side, kind: FailureKind, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(f"{side}: {kind}: {message}")
        self.side, self.kind, self.message, self.retry_after_s = side, kind, message, retry_after_s


@dataclass(frozen=True, slots=True)
class Route:
    """Where one attempt goes. Without `prefill` the decode server does both (a plain server)."""

    decode: ServerHandle
    prefill: ServerHandle | None
    prefill_tokens: int = 0
    """Uncached tokens that prefill will have to compute, by prediction."""
    priority: int | None = None
    """For servers that are `ordered`: the greater goes first."""
    prefill_s: float = 0.0
    """Seconds that prefill will take, by prediction."""
    giver: ServerHandle | None = None
    """Has a prefix that is to be brought to `prefill` first, as the decision's cache_move says."""


@dataclass(slots=True)
class Opened:
    """An answer that has begun."""

    content_type: str
    first: bytes
    """The first whole events, or the whole answer."""
    connection: Connection | None = None
    """The rest of a stream."""
    cutter: EventCutter = field(default_factory=EventCutter)


class Attempt:
    """Use once: `open`, then `close` in every case."""

    def __init__(
        self,
        asked: Asked,
        route: Route,
        *,
        rid: str,
        room: int,
        aborts: set[asyncio.Task[None]],
        on_prefill_ended: Callable[[Attempt], None] = lambda attempt: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_prefill_ended` is called once after `open`, when the server that prefills has let the request
        go: with a prefill_answer or, where it failed or decodes as well, without. Raises BadRequest for what
        no such route serves.
        """
        if route.prefill is not None:
            refuse_samples(asked)
        self.route = route
        self.rid = rid
        self.prefill_answer: PrefillAnswer | None = None
        self.prefill_body: bytes | None = None
        self.prefill_ended_s: float | None = None
        """When prefill's answer came; None: not yet, or not well."""
        self._asked = asked
        self._aborts = aborts
        self._clock = clock
        self._on_prefill_ended = on_prefill_ended
        self._path = str(asked.endpoint)
        extra: dict[str, object] = {"rid": rid}
        if route.prefill is not None:
            host, port = route.prefill.config.bootstrap
            extra |= {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": room}
        self._decode_body = with_fields(asked.body, extra | self._order_fields(route.decode))
        self._prefill_body = b""
        if route.prefill is not None:
            fields = self._prefill_fields(extra) | self._order_fields(route.prefill)
            self._prefill_body = with_fields(asked.body, fields)
        self._prefill_task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._answered = False
        self._booked_tokens = 0
        self._booked = 0

    def _prefill_fields(self, extra: dict[str, object]) -> dict[str, object]:
        # Prefill's answer isn't shown to anybody: one small object tells its end and its figures best.
        if not self._asked.stream:
            return extra
        quiet: dict[str, object] = {"stream": False}
        if "stream_options" in self._asked.fields:
            quiet["stream_options"] = None
        return extra | quiet

    def _order_fields(self, server: ServerHandle) -> dict[str, object]:
        ordered = server.config.ordered and self.route.priority is not None
        return {"priority": self.route.priority} if ordered else {}

    async def open(self, timeout_s: float, answer_s: float) -> Opened:
        """The first token within timeout_s. Raises AttemptFailed or BadRequest.

        Without streaming: prefill's end within timeout_s, then the whole answer within answer_s.
        """
        self._book()
        decode = asyncio.ensure_future(self._decode())
        waiting: set[asyncio.Future[object]] = {decode}  # type: ignore[arg-type]
        if self.route.prefill is not None:
            self._prefill_task = asyncio.ensure_future(self._prefill(self.route.prefill))
            self._prefill_task.add_done_callback(self._unbook_prefill)
            waiting.add(self._prefill_task)  # type: ignore[arg-type]
        if self.route.prefill is None and not self._asked.stream:
            timeout_s = answer_s
        end_s = self._clock() + timeout_s
        try:
            while not decode.done():
                left_s = end_s - self._clock()
                if left_s <= 0:
                    # With prefill ended its bytes are across: who is awaited then is decode.
                    side = Side.DECODE if self.prefill_ended_s is not None else Side.PREFILL
                    raise AttemptFailed(side, FailureKind.TIMEOUT, f"no first token within {timeout_s:.1f} s")
                done, _ = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if self._prefill_task in done and not decode.done():
                    waiting.discard(self._prefill_task)
                    self._prefill_task.result()
                    if not self._asked.stream:
                        end_s = self._clock() + answer_s
            try:
                return decode.result()
            except AttemptFailed as failed:
                raise await self._cause(failed) from None
        finally:
            if not decode.done():
                decode.cancel()
                await asyncio.wait({decode})
            if not decode.cancelled():
                decode.exception()  # seen, whether or not it was raised above

    async def _cause(self, failed: AttemptFailed) -> Exception:
        """Prefill's reason, where decode only says that prefill failed it."""
        task = self._prefill_task
        if task is None or failed.kind in (FailureKind.CONNECT, FailureKind.REFUSED):
            return failed
        await asyncio.wait({task}, timeout=K_CAUSE_S)
        if task.done() and not task.cancelled():
            found = task.exception()
            if isinstance(found, AttemptFailed | BadRequest):
                return found
        return failed

    def _book(self) -> None:
        self.route.decode.in_flight += 1
        if self.route.prefill is not None:
            self.route.prefill.in_flight += 1
            self.route.prefill.pending_tokens += self.route.prefill_tokens
            self._booked_tokens = self.route.prefill_tokens
            self._booked = self.route.prefill.prefilling.add(self.route.prefill_s, self._clock())

    def _unbook_prefill(self, _task: asyncio.Task[None]) -> None:
        assert self.route.prefill is not None
        self.route.prefill.in_flight -= 1
        self.unbook_tokens()
        self._on_prefill_ended(self)

    def unbook_tokens(self) -> None:
        """Its prefill has ended (decode has its first token, or prefill has answered)."""
        if self.route.prefill is not None:
            self.route.prefill.pending_tokens -= self._booked_tokens
            self._booked_tokens = 0
            self.route.prefill.prefilling.remove(self._booked, self._clock())

    async def _prefill(self, server: ServerHandle) -> None:
        connection = None
        try:
            connection = await server.upstream.post(self._path, self._prefill_body)
            data = await connection.whole()
        except UpstreamError as error:
            raise _transport_failure(Side.PREFILL, error) from None
        finally:
            if connection is not None:
                server.upstream.release(connection)
        _raise_for(Side.PREFILL, connection, data)
        self.prefill_ended_s = self._clock()
        self.prefill_answer = read_prefill_answer(data)
        self.prefill_body = data

    async def _decode(self) -> Opened:
        try:
            connection = await self.route.decode.upstream.post(self._path, self._decode_body)
            self._connection = connection
            status = await connection.head()
            if status != 200 or not self._asked.stream:
                data = await connection.whole()
                _raise_for(Side.DECODE, connection, data)
                self._answered = True
                return Opened(connection.content_type, data)
            cutter = EventCutter()
            first = b""
            while not first:
                chunk = await connection.part()
                if not chunk:
                    raise AttemptFailed(
                        Side.DECODE, FailureKind.LOST, "the stream ended before its first token"
                    )
                first = cutter.feed(chunk)
        except UpstreamError as error:
            raise _transport_failure(Side.DECODE, error) from None
        except ValueError as error:
            raise AttemptFailed(Side.DECODE, FailureKind.GARBAGE, str(error)) from None
        failure = first_event_failure(first)
        if failure is not None:
            _raise_failure(Side.DECODE, failure)
        return Opened(connection.content_type, first, connection, cutter)

    def finished(self) -> None:
        """Decode's answer has been read to its end: there is nothing to abort there."""
        self._answered = True

    async def close(self) -> asyncio.Task[None] | None:
        """Let both sides go; what hasn't ended is aborted. Never raises.

        A prefill whose answer is still on its way, decode having answered, is given K_LINGER_S: the task that
        waits for it is returned. Small answers overtake it often.
        """
        self.route.decode.in_flight -= 1
        if self._connection is not None:
            self.route.decode.upstream.release(self._connection)
        if not self._answered:
            self._abort(self.route.decode)
        task = self._prefill_task
        if task is None:
            self._on_prefill_ended(self)
            return None
        if self._answered and not task.done():
            # Its answer is on its way: the bytes have arrived, or decode couldn't have answered.
            return self._in_background(self._end_prefill(task, K_LINGER_S))
        await self._end_prefill(task, 0.0)
        return None

    async def _end_prefill(self, task: asyncio.Task[None], patience_s: float) -> None:
        if patience_s:
            await asyncio.wait({task}, timeout=patience_s)
        if not task.done():
            task.cancel()
            self._abort(self.route.prefill)
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()

    def _in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)
        return task

    def _abort(self, server: ServerHandle | None) -> None:
        if server is None:
            return
        self._in_background(abort(server, self.rid))


async def abort(server: ServerHandle, rid: str) -> None:
    """Tell a server to drop a request. A server that can't be told has dropped it or will by itself."""
    try:
        async with asyncio.timeout(K_ABORT_S):
            async with server.session.post(
                server.url + "/abort_request",
                data=msgspec.json.encode({"rid": rid}),
                headers=server.headers,
            ) as response:
                await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass


def _transport_failure(side: Side, error: UpstreamError) -> AttemptFailed:
    if isinstance(error, NotConnected):
        return AttemptFailed(side, FailureKind.CONNECT, str(error))
    kind = FailureKind.GARBAGE if isinstance(error, NotHttp) else FailureKind.LOST
    return AttemptFailed(side, kind, str(error))


def _raise_for(side: Side, answer: Connection, data: bytes) -> None:
    """Raise for an answer that is none: by its status, or by an error inside a 200."""
    status = answer.status
    if status == 200:
        if not data.startswith((b"{", b"[")):
            raise AttemptFailed(side, FailureKind.GARBAGE, "the answer is not a JSON object")
        if b'"error"' not in data and b'"abort"' not in data:
            return
    try:
        failure = body_failure(msgspec.json.decode(data))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        failure = None
        if status == 200:
            raise AttemptFailed(side, FailureKind.GARBAGE, "the answer is not JSON") from None
    if failure is None:
        if status == 200:
            return
        failure = Failure(status, data[:300].decode("utf-8", "replace") or f"HTTP {status}")
    retry_after = answer.headers.get("retry-after", "").strip()
    _raise_failure(
        side,
        Failure(
            failure.status if status == 200 else status,
            failure.message,
            failure.code,
            float(retry_after) if _SECONDS.fullmatch(retry_after) else None,
        ),
    )


def _raise_failure(side: Side, failure: Failure) -> None:
    text = failure.message
    if failure.status in K_CLIENT_FAULTS:
        raise BadRequest(text, status=failure.status, code=failure.code or None)
    by_link = K_REFUSED in failure.code or K_REFUSED in text
    if by_link:
        # Both sides tell it: it is about the way between them, and another prefill site may have room.
        side = Side.PREFILL
    refused = failure.status in (429, 503) or by_link
    retry_after_s = failure.retry_after_s
    if refused and retry_after_s is None:
        found = _RETRY_AFTER.search(text)
        retry_after_s = float(found.group(1)) if found else None
    if retry_after_s is not None:
        retry_after_s = min(retry_after_s, K_MAX_RETRY_AFTER_S)
    kind = FailureKind.REFUSED if refused else FailureKind.SERVER
    raise AttemptFailed(side, kind, f"{failure.status} {text}"[:500], retry_after_s)
