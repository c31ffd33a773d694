"""Server-sent events without parsing them: where an event ends, whether the stream said [DONE].

The relay hands on whole events only, so that an upstream that dies in mid-event leaves the client with
valid events and room for a clear error. In the common case (a chunk ends where an event ends) a chunk
costs two comparisons of a few bytes.
"""

from __future__ import annotations

import msgspec

K_END = b"\n\n"
K_DONE = b"data: [DONE]\n\n"
K_MAX_EVENT_BYTES = 64 << 20
"""An event that doesn't end within this is not a stream of events."""


class EventCutter:
    """Chunks in, whole events out; `done` once the last whole event was [DONE]."""

    __slots__ = ("_held", "done")

    def __init__(self) -> None:
        self._held = b""
        self.done = False

    @property
    def held_bytes(self) -> int:
        """Bytes of an event that has begun and not ended."""
        return len(self._held)

    def feed(self, chunk: bytes) -> bytes:
        """What may be handed on now (perhaps nothing). Raises ValueError for an event without end."""
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if not chunk.endswith(K_END):
            cut = chunk.rfind(K_END)
            keep = chunk[cut + 2 :] if cut >= 0 else chunk
            if len(keep) > K_MAX_EVENT_BYTES:
                raise ValueError("an event without end")
            self._held = keep
            chunk = chunk[: cut + 2] if cut >= 0 else b""
        if chunk:
            self.done = chunk.endswith(K_DONE)
        return chunk

    def passes(self, data: bytes, start: int, end: int) -> bool:
        """Whether data, whose last chunk is [start:end], ends where an event does; then `feed` isn't needed.
        A chunk too short for the last event of all may be a part of it."""
        if self._held or end - start < len(K_DONE) or not data.endswith(K_END, start, end):
            return False
        self.done = data.endswith(K_DONE, start, end)
        return True


class Failure(msgspec.Struct, frozen=True):
    """An error that a server told in its answer."""

    status: int
    message: str
    code: str = ""
    retry_after_s: float | None = None


def first_event_failure(events: bytes) -> Failure | None:
    """The error in a stream's first event, if it is one: an error object, or /generate's aborted output.

    Later events aren't looked at: after the first token the stream is the client's as it is.
    """
    if not events.startswith(b"data: "):
        return Failure(502, "the server's stream does not begin with an event")
    data = events[6 : events.find(K_END)]
    if data.strip() == b"[DONE]":
        return Failure(502, "the server's stream ended before its first token")
    if b'"error"' not in data and b'"abort"' not in data:
        return None
    try:
        parsed = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return Failure(502, "the server's first event is not JSON")
    return body_failure(parsed)


def body_failure(parsed: object) -> Failure | None:
    """The error that an answer tells, or None: OpenAI's and SGLang's forms, and an abort with a status."""
    if not isinstance(parsed, dict):
        return None
    error = parsed.get("error")
    if error is None and parsed.get("object") == "error":
        error = parsed
    if isinstance(error, str):
        return Failure(500, error)
    if isinstance(error, dict):
        code = error.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        return Failure(status, str(error.get("message", ""))[:2000], str(error.get("type") or code or ""))
    detail = parsed.get("detail")
    if isinstance(detail, str):
        return Failure(500, detail[:2000])
    meta = parsed.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort":
        found = reason.get("status_code")
        if isinstance(found, int) and 400 <= found < 600:
            return Failure(found, str(reason.get("message", ""))[:2000], str(reason.get("err_type") or ""))
    return None
