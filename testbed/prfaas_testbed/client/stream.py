"""Server-sent events and what SGLang's two faces put into them; no I/O.

`/generate` sends the whole output so far in each event (the last one counts); the OpenAI endpoints send
pieces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

K_MAX_PENDING_BYTES = 16 << 20  # a server that never ends an event is at fault


class StreamError(Exception):
    """The server's answer breaks the form, or carries an error."""


class EventParser:
    """Bytes in, the data of whole events out, in whatever pieces they come."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Raises StreamError when an event grows without end."""
        self._pending += data
        *whole, self._pending = self._pending.split(b"\n\n")
        if len(self._pending) > K_MAX_PENDING_BYTES:
            raise StreamError("an event without an end")
        found = []
        for block in whole:
            lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
        return found


@dataclass
class Collected:
    """An answer as it grows."""

    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    """The server said why it stopped."""
    tokens_seen: bool = False

    def add(self, data: bytes) -> None:
        """One event's data (or a whole non-streamed answer). Raises StreamError."""
        if data == b"[DONE]":
            return
        try:
            message = json.loads(data)
        except ValueError:
            raise StreamError(f"not JSON: {data[:80]!r}") from None
        if not isinstance(message, dict):
            raise StreamError(f"not an object: {data[:80]!r}")
        if message.get("error"):
            error = message["error"]
            raise StreamError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
        if "choices" in message:
            self._add_openai(message)
        else:
            self._add_generate(message)

    def _add_generate(self, message: dict[str, Any]) -> None:
        meta = dict(message.get("meta_info") or {})
        logprobs = meta.pop("output_token_logprobs", None)
        for key in ("input_token_logprobs", "output_top_logprobs", "input_top_logprobs"):
            meta.pop(key, None)
        self.output_ids = list(message.get("output_ids") or [])
        self.text = message.get("text") or ""
        if logprobs:
            self.logprobs = [float(row[0]) for row in logprobs if row[0] is not None]
        self.meta = meta
        self.tokens_seen = self.tokens_seen or bool(self.output_ids or self.text)
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            raise StreamError(f"aborted: {reason.get('message', 'no reason given')}")
        self.finished = self.finished or reason is not None

    def _add_openai(self, message: dict[str, Any]) -> None:
        if message.get("usage"):
            self.usage = message["usage"]
        for choice in message["choices"]:
            piece = choice.get("delta") or choice.get("message") or {}
            text = piece.get("content") or choice.get("text") or ""
            self.text += text
            self.tokens_seen = self.tokens_seen or bool(text)
            self.finished = self.finished or choice.get("finish_reason") is not None

    def cached_tokens(self) -> int | None:
        if "cached_tokens" in self.meta:
            return int(self.meta["cached_tokens"])
        details = self.usage.get("prompt_tokens_details") or {}
        return int(details["cached_tokens"]) if "cached_tokens" in details else None
