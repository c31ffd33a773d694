"""What is read of a prefill server's answer, which nobody is shown: its figures."""

from __future__ import annotations

import msgspec


class _Meta(msgspec.Struct):
    cached_tokens: int | None = None
    prompt_tokens: int | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class PrefillAnswer(msgspec.Struct):
    """What is read of prefill's answer."""

    meta_info: _Meta | None = None
    usage: _Usage | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prefix that prefill reused, where it says so."""
        if self.meta_info is not None:
            return self.meta_info.cached_tokens
        details = self.usage.prompt_tokens_details if self.usage else None
        return details.cached_tokens if details else None

    @property
    def prompt_tokens(self) -> int | None:
        found = self.meta_info or self.usage
        return found.prompt_tokens if found else None


_DECODER = msgspec.json.Decoder(PrefillAnswer)


def read_prefill_answer(data: bytes) -> PrefillAnswer | None:
    """None for a batch's list, or figures this version doesn't know."""
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
