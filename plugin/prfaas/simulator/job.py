"""One request at one engine, and where the engine has got with it."""

from __future__ import annotations

from collections.abc import Callable


class Job:
    """The calls come at the engine's own times; none comes once it is void."""

    __slots__ = (
        "block_ids",
        "block_tokens",
        "cached",
        "done",
        "key",
        "on_chunk",
        "on_done",
        "on_join",
        "output_tokens",
        "payload",
        "prompt_tokens",
        "reserved",
        "taken_s",
        "void",
        "whole_s",
    )  # fmt: skip

    def __init__(
        self,
        payload: object,
        prompt_tokens: int,
        output_tokens: int,
        block_ids: tuple[int, ...] = (),
        key: float = 0.0,
        on_chunk: Callable[[Job, float, bool], None] | None = None,
        on_join: Callable[[Job, float], None] | None = None,
        on_done: Callable[[Job, float], None] | None = None,
        block_tokens: int | None = None,
    ) -> None:
        self.payload = payload
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.block_ids, self.block_tokens = block_ids, block_tokens
        self.key = key
        """Order of service: smaller first, then arrival."""
        self.cached = 0
        """Tokens found in the engine's cache when prefill begins."""
        self.done = 0
        """Tokens of the prompt that are there."""
        self.whole_s = self.taken_s = 0.0
        """Seconds that all of its prefill takes here, and that what is done of it took."""
        self.reserved = 0
        self.void = False
        """Given up: no longer counts, and none of its calls come."""
        self.on_chunk, self.on_join, self.on_done = on_chunk, on_join, on_done
