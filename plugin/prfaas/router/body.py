"""A client's request: its JSON read once, and the bodies that servers get, spliced rather than written anew.

All that a client sent reaches the servers as its own bytes; ours are appended before the last brace, where
they win over earlier fields of the same name (Python's JSON readers keep the last). Fields that steer a
server's disaggregation are taken out first when a client sent any.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec
from aiohttp import web

from prfaas.router.errors import BadRequest

K_CODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Of bodies, with what zlib calls them."""
K_MOST_PARTS = 64
"""Compressed apart and put one behind the other, as may be: each costs a copy of all that follows it."""
K_OURS = frozenset({"bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "rid"})
"""Fields that only the router may set."""


class Endpoint(StrEnum):
    """What the client asked, by the path it asked at."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    GENERATE = "/generate"


@dataclass(slots=True)
class Asked:
    """One request as read from its body."""

    endpoint: Endpoint
    fields: dict[str, Any]
    body: bytes
    """The client's bytes, a JSON object, without the fields that only the router may set."""
    stream: bool
    model: str | None

    @property
    def output_tokens(self) -> int | None:
        """Most tokens it may generate, where it says so."""
        if self.endpoint is Endpoint.GENERATE:
            sampling = self.fields.get("sampling_params")
            found = sampling.get("max_new_tokens") if isinstance(sampling, dict) else None
        else:
            found = self.fields.get("max_completion_tokens") or self.fields.get("max_tokens")
        return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None

    @property
    def samples(self) -> int:
        """Answers asked for to each prompt."""
        given: object = self.fields
        if self.endpoint is Endpoint.GENERATE:
            given = self.fields.get("sampling_params")
        found = [
            one.get("n") for one in (given if isinstance(given, list) else [given]) if isinstance(one, dict)
        ]
        return max([n for n in found if isinstance(n, int)], default=1)


def refuse_samples(asked: Asked) -> None:
    """For prefill and decode apart. SGLang gives all samples of a prompt one bootstrap room, so that such a
    pair fails them, which would count against its link. Raises BadRequest.
    """
    if asked.samples > 1:
        raise BadRequest(
            f"n: found {asked.samples}; with prefill and decode apart 1 is served. Ask for them one by one.",
            param="n",
            code="several_samples",
        )


async def body_of(request: web.Request, most_bytes: int) -> bytes:
    """A body that comes bit by bit. Raises BadRequest where it is larger; aiohttp's errors."""
    parts: list[bytes] = []
    left = most_bytes
    if (request.content_length or 0) > most_bytes:
        raise too_large(most_bytes)
    while part := await request.content.readany():
        parts.append(part)
        left -= len(part)
        if left < 0:
            raise too_large(most_bytes)
    return b"".join(parts)


def unpacked(raw: bytes, coding: str | None, most_bytes: int) -> bytes:
    """A body as its Content-Encoding says. Never makes more of it than most_bytes. Raises BadRequest."""
    coding = (coding or "identity").strip().lower()
    if coding == "identity":
        return raw
    if coding not in K_CODINGS:
        raise BadRequest(
            f"Content-Encoding {coding[:64]!r} is not known here; known: gzip, deflate, identity.",
            status=415,
            code="unknown_encoding",
        )
    out, left, parts = b"", raw, 0
    try:
        while left:
            parts += 1
            if parts > K_MOST_PARTS:
                raise BadRequest(
                    f"The body is compressed in more than {K_MOST_PARTS} parts.", code="bad_body"
                )
            unpacking = zlib.decompressobj(K_CODINGS[coding])
            out += unpacking.decompress(left, most_bytes + 1 - len(out))
            if len(out) > most_bytes:
                raise too_large(most_bytes)
            if not unpacking.eof:
                raise BadRequest("The body ends before its compression does.", code="bad_body")
            left = unpacking.unused_data
    except zlib.error as error:
        raise BadRequest(f"The body isn't {coding}: {error}", code="bad_body") from None
    return out


def too_large(most_bytes: int) -> BadRequest:
    return BadRequest(f"The body is larger than {most_bytes} bytes.", status=413, code="body_too_large")


def read_body(endpoint: Endpoint, raw: bytes) -> Asked:
    """Raises BadRequest: not JSON, not an object, or without the prompt its endpoint needs."""
    try:
        fields = msgspec.json.decode(raw)
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8.", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("The body is nested too deeply.", code="invalid_json") from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    if not K_OURS.isdisjoint(fields):
        fields = {name: value for name, value in fields.items() if name not in K_OURS}
        raw = msgspec.json.encode(fields)
    _check_prompt(endpoint, fields)
    stream = fields.get("stream", False)
    if stream is not None and not isinstance(stream, bool):
        raise BadRequest("stream must be true or false.", param="stream")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequest("model must be a string.", param="model")
    return Asked(endpoint, fields, raw, bool(stream), model)


def _check_prompt(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    if endpoint is Endpoint.CHAT:
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list with at least one message.", param="messages")
        if not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
            raise BadRequest("Each message must be an object with a role.", param="messages")
    elif endpoint is Endpoint.COMPLETIONS:
        if not _is_prompt(fields.get("prompt")):
            raise BadRequest("prompt must be text, token ids, or a list of either.", param="prompt")
    else:
        given = [name for name in ("text", "input_ids", "input_embeds") if fields.get(name) is not None]
        if len(given) != 1:
            raise BadRequest("Give exactly one of text, input_ids and input_embeds.", param="text")
        if given[0] != "input_embeds" and not _is_prompt(fields[given[0]]):
            raise BadRequest(f"{given[0]} must be a prompt or a list of prompts.", param=given[0])


def _is_prompt(value: object) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], list):
        return all(_is_ids(one) for one in value)
    return _is_ids(value) or all(isinstance(one, str) for one in value)


def _is_ids(value: object) -> bool:
    # Both run in C: a prompt of 10^5 ids takes a millisecond or two, not ten.
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int} and min(value) >= 0


def with_fields(body: bytes, extra: dict[str, object]) -> bytes:
    """The object `body` with `extra` as its last fields."""
    head = body.rstrip()[:-1].rstrip()
    tail = msgspec.json.encode(extra)[1:]
    return head + (tail if head.endswith(b"{") else b"," + tail)


def merge_prompt_logprobs(asked: Asked, answer: bytes, prefill: bytes | None) -> bytes:
    """/generate's logprobs of the prompt exist at the prefill server alone: put them into decode's answer."""
    if asked.endpoint is not Endpoint.GENERATE or not asked.fields.get("return_logprob") or prefill is None:
        return answer
    try:
        ours: Any = msgspec.json.decode(answer)
        theirs: Any = msgspec.json.decode(prefill)
        for one, other in zip(_as_list(ours), _as_list(theirs), strict=True):
            meta = one["meta_info"]
            meta["input_token_logprobs"] = other["meta_info"]["input_token_logprobs"] + (
                meta.get("input_token_logprobs") or []
            )
    except (msgspec.DecodeError, ValueError, KeyError, TypeError):
        return answer
    return msgspec.json.encode(ours)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
