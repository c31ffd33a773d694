"""How a refusal reaches a request's client: 503, code `prfaas_refused`, Retry-After, before any stream's
header.

SGLang answers a request whose transfer failed with 500, and a stream with 200 and an error inside. Two hooks
on its own functions and a middleware of its HTTP application change that for refusals alone:

* `abort_refused`, in the scheduler: the request's finish reason gets the status and `err_type`, and travels
  as any other;
* `note_refused`, in the HTTP process: notes the refusal for the request whose answer is being made;
* `RefusalAnswers`: holds an answer's head until its first body part, and replaces both if by then a refusal
  was noted. So it is one path for all endpoints, streaming or not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from prfaas.sglang import compat, touch_points
from prfaas.sglang.refusal import K_CODE, K_STATUS, Refusal

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Callable[[], Awaitable[Message]], Send], Awaitable[None]]

_noted: ContextVar[list[Refusal] | None] = ContextVar("prfaas_refused", default=None)
"""Refusals of the HTTP request that this task works for; tasks that it starts share the list."""


def register_in_scheduler() -> None:
    compat.HookRegistry.register(touch_points.K_PREPARE_ABORT, abort_refused, compat.HookType.AROUND)


def register_in_http_process() -> None:
    compat.HookRegistry.register(touch_points.K_HANDLE_ABORT, note_refused, compat.HookType.BEFORE)
    compat.HookRegistry.register(touch_points.K_SERVE_HTTP, add_middleware, compat.HookType.BEFORE)


def abort_refused(original: Any, req: Any, error_message: str, status_code: Any = None) -> None:
    """SGLang's prepare_abort, with a refusal's own status."""
    refusal = Refusal.found_in(error_message)
    if refusal is None:
        original(req, error_message, status_code)
        return
    original(req, refusal.text, K_STATUS)
    req.finished_reason.err_type = K_CODE


def note_refused(tokenizer_manager: Any, out: dict[str, Any], *more: Any, **arguments: Any) -> None:
    """Before SGLang handles an aborted request's end."""
    finish = out["meta_info"]["finish_reason"]
    noted = _noted.get()
    if noted is not None and finish.get("err_type") == K_CODE:
        refusal = Refusal.found_in(str(finish.get("message")))
        if refusal is not None:
            noted.append(refusal)


def add_middleware(*arguments: Any, **more: Any) -> None:
    """Before SGLang serves its HTTP application."""
    compat.app.add_middleware(RefusalAnswers)


class RefusalAnswers:
    """ASGI middleware. See the module."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Callable[[], Awaitable[Message]], send: Send
    ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        noted: list[Refusal] = []
        head: Message | None = None
        replaced = False

        async def send_or_replace(message: Message) -> None:
            nonlocal head, replaced
            if replaced:
                return
            if message["type"] == "http.response.start":
                head = message
                return
            if head is not None:
                if noted:
                    replaced = True
                    refusal = noted[0]
                    await send(
                        {"type": "http.response.start", "status": K_STATUS, "headers": refusal.headers}
                    )
                    await send({"type": "http.response.body", "body": refusal.body})
                    return
                first, head = head, None
                await send(first)
            await send(message)

        token = _noted.set(noted)
        try:
            await self._app(scope, receive, send_or_replace)
        finally:
            _noted.reset(token)
