"""Errors a client can meet, in OpenAI's form: {"error": {"message", "type", "param", "code"}}.

* DoorError
  * BadRequest            400 invalid_request_error (and 401, 404, 408, 413 by its status)
  * Overloaded            429 rate_limit_error, with Retry-After
  * NoPath                503 server_error, with Retry-After
"""

from __future__ import annotations

import math

import msgspec


def error_body(message: str, kind: str, code: str | int | None, param: str | None = None) -> bytes:
    """The body of an error answer, and the data of an error event."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return msgspec.json.encode({"error": error})


def error_event(message: str, kind: str, code: str | int | None) -> bytes:
    """The end of a stream that broke: an error event, then [DONE], as SGLang ends its own."""
    return b"data: " + error_body(message, kind, code) + b"\n\ndata: [DONE]\n\n"


class DoorError(Exception):
    """An answer that isn't the model's."""

    status = 500
    kind = "server_error"
    code: str | int | None = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        kind: str | None = None,
        code: str | int | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.kind = kind or self.kind
        self.code = code or self.code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> bytes:
        return error_body(self.message, self.kind, self.code, self.param)

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        # Retry-After has whole seconds; rounding down would invite clients back too soon.
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class BadRequest(DoorError):
    """The client's fault: asking again unchanged won't help."""

    status = 400
    kind = "invalid_request_error"
    code = "bad_request"


class Overloaded(DoorError):
    """More than can be served now."""

    status = 429
    kind = "rate_limit_error"
    code = "overloaded"


class NoPath(DoorError):
    """Nothing alive could serve it."""

    status = 503
    kind = "server_error"
    code = "no_path"
