"""Prompts tokenised as the model's server does, once a request, long ones off the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from prfaas.config.router import Model
from prfaas.model.errors import ConfigError
from prfaas.router.body import Asked, Endpoint
from prfaas.router.byte_bpe import Encode, quick_encoder
from prfaas.router.template import ChatTemplate, TemplateError, load_template

K_CHARS_PER_TOKEN = 4
"""Where a prompt can't be tokenised here (embeddings, a template that refuses): about this many."""

K_NAMESPACES = ("cache_salt", "extra_key", "lora_path")
K_WINDOW_CHARACTERS = 100_000
"""Longer texts are counted by windows of this size first, until they have too many tokens: the library keeps
some 200 bytes for each."""
K_WINDOW_SLACK = 1.05
"""Cutting a text into windows adds no more than this to its tokens."""
K_UNREADABLE = (TemplateError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""What comes of fields that aren't shaped as an endpoint wants them, or nested without end."""

T = TypeVar("T")
Hasher = Callable[[Sequence[int]], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What routing knows of a prompt."""

    tokens: int
    """Of all prompts of a batch together."""
    prompts: int = 1
    ids: Sequence[int] = ()
    """Of a single prompt; empty for a batch or an estimate."""
    block_hashes: tuple[int, ...] = ()
    exact: bool = True
    """False: estimated from its size."""


class TooManyTokens(Exception):
    """A text has more than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__(f"more than {most} tokens")
        self.most = most


class PromptReader:
    """One model's tokenizer and template. Raises ConfigError when its folder can't be read."""

    def __init__(self, model: Model, hasher: Hasher | None = None) -> None:
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._quick: Encode | None = None
        self._kwargs = model.chat_template_kwargs
        self.hasher = hasher
        """What hashes a prompt's blocks; None: nobody tells what it has."""
        if model.tokenizer is None:
            return
        folder = Path(model.tokenizer)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                str(path), "tokenizer", model.tokenizer, "expected a folder with tokenizer.json"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(str(path), "the file", str(error)[:200], "expected a tokenizer") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = load_template(folder, model.chat_template)
        self._quick = quick_encoder(path, self._tokenizer)
        self._before, self._after = _around(self._tokenizer)

    def encode(self, text: str, *, special: bool, most: int | None = None) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a bare prompt (BOS).

        Raises ValueError, and TooManyTokens where they are more than `most`, which isn't told of every text.
        """
        if self._tokenizer is None:
            raise ValueError("this model has no tokenizer here")
        if most is not None and len(text) > max(most, K_WINDOW_CHARACTERS):
            counted = 0
            for start in range(0, len(text), K_WINDOW_CHARACTERS):
                window = text[start : start + K_WINDOW_CHARACTERS]
                counted += len(self.encode(window, special=False))
                if counted > most * K_WINDOW_SLACK:
                    raise TooManyTokens(most)
        if self._quick is not None:
            found = self._quick(text)
            return [*self._before, *found, *self._after] if special else found
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    def read(self, asked: Asked, most: int | None = None) -> Prompt:
        """The request's prompt. Never raises: what it can't read it estimates; servers have the last word.

        A prompt of far more than `most` tokens isn't read to its end.
        """
        try:
            return self._read(asked, most)
        except TooManyTokens as error:
            return Prompt(tokens=error.most + 1, exact=False)
        except K_UNREADABLE:
            return Prompt(tokens=max(1, len(asked.body) // K_CHARS_PER_TOKEN), exact=False)

    def _read(self, asked: Asked, most: int | None) -> Prompt:
        fields = asked.fields
        if asked.endpoint is Endpoint.CHAT:
            given = fields.get("input_ids")
            return self._one(given if given else self._chat(fields, most), fields)
        value = fields.get("prompt") if asked.endpoint is Endpoint.COMPLETIONS else fields.get("text")
        if value is None:
            value = fields.get("input_ids")
        if value is None:
            return Prompt(tokens=max(1, len(fields["input_embeds"])), exact=False)
        if isinstance(value, str):
            return self._one(self.encode(value, special=True, most=most), fields)
        if isinstance(value[0], int):
            return self._one(value, fields)
        sizes = [
            len(self.encode(one, special=True, most=most) if isinstance(one, str) else one) for one in value
        ]
        return Prompt(tokens=sum(sizes), prompts=len(sizes))

    def _one(self, ids: Sequence[int], fields: dict[str, Any]) -> Prompt:
        # What a server keeps under a salt or for an adapter matches no plain prompt.
        apart = any(fields.get(name) is not None for name in K_NAMESPACES)
        hashes = self.hasher(ids) if self.hasher and not apart else ()
        return Prompt(tokens=len(ids), ids=ids, block_hashes=hashes)

    def _chat(self, fields: dict[str, Any], most: int | None) -> list[int]:
        if self._template is None:
            raise TemplateError("the model has no chat template")
        messages = [_as_rendered(one, self._template.wants_parts) for one in fields["messages"]]
        prefix: str | None = None
        last = messages[-1]
        if last["role"] == "assistant" and isinstance(last.get("content"), str):
            # As SGLang: continued where the client says so, else asked as if the user had said it.
            if fields.get("continue_final_message"):
                prefix = messages.pop()["content"]
            else:
                messages[-1] = {"role": "user", "content": last["content"]}
        variables: dict[str, Any] = dict(self._kwargs)
        if fields.get("reasoning_effort") is not None:
            variables["reasoning_effort"] = fields["reasoning_effort"]
        variables.update(fields.get("chat_template_kwargs") or {})
        tools = _tools(fields)
        try:
            text = self._template.render(messages, tools=tools, add_generation_prompt=True, **variables)
        except TemplateError:
            if not tools:
                raise
            # Some templates want the bare functions.
            flat = [one["function"] for one in tools]
            text = self._template.render(messages, tools=flat, add_generation_prompt=True, **variables)
        ids = self.encode(text, special=False, most=most)
        if prefix:
            ids += self.encode(prefix, special=False, most=most)
        return ids


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Special tokens before and after a bare prompt."""
    bare: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    whole: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
    extra = len(whole) - len(bare)
    at = next((at for at in range(extra + 1) if whole[at : at + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def _as_rendered(message: dict[str, Any], parts: bool) -> dict[str, Any]:
    """A message as SGLang hands it to the template."""
    out = {name: value for name, value in message.items() if value is not None}
    content = out.get("content", "")
    if isinstance(content, list):
        if parts and out["role"] != "tool":
            content = [_part(one) for one in content]
        else:
            content = " ".join(one["text"] for one in content if one.get("type") in ("text", "input_text"))
    out["content"] = content
    if isinstance(out.get("tool_calls"), list):
        out["tool_calls"] = [_tool_call(one) for one in out["tool_calls"]]
    return out


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("text", "input_text"):
        return {"type": "text", "text": part["text"]}
    if kind in ("image_url", "input_image"):
        return {"type": "image"}
    if kind in ("video_url", "audio_url"):
        return {"type": kind.removesuffix("_url")}
    return part


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json.loads(function["arguments"] or "{}")
    return {**call, "function": function}


def _tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools the template sees, with the fields that SGLang fills in."""
    tools, choice = fields.get("tools"), fields.get("tool_choice", "auto")
    if not tools or choice == "none":
        return None
    out = []
    for tool in tools:
        function = tool["function"]
        if isinstance(choice, dict) and choice["function"]["name"] != function["name"]:
            continue
        known = {name: function.get(name) for name in ("description", "name", "parameters", "strict")}
        known["defer_loading"] = function.get("defer_loading")
        out.append({"type": tool.get("type", "function"), "function": known, "defer_loading": None})
    return out or None


class OffLoop:
    """Runs what a body's size makes long on a few threads, the rest where it is."""

    def __init__(self, *, inline_bytes: int, threads: int) -> None:
        self.inline_bytes = inline_bytes
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenise")

    async def run(self, size_bytes: int | None, work: Callable[[], T]) -> T:
        """None: a size that isn't known before."""
        if size_bytes is not None and size_bytes <= self.inline_bytes:
            # A hand-over costs more than these few tokens, and would wait behind long prompts.
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
