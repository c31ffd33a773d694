"""A profile's figures, each worked out once: the same lengths are asked for again and again, step by step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from prfaas.model.profiles import Profile

K_KEPT = 8192  # lengths; a chunk's ends come again with every prompt, a prompt's own within moments


class Works:
    """What `profile` says, to the last bit."""

    def __init__(self, profile: Profile) -> None:
        self._latency_s = profile.latency_s
        self.prefill_s: Callable[[int, int], float] = lru_cache(K_KEPT)(profile.prefill_s)
        self.kv_bytes: Callable[[int], int] = lru_cache(K_KEPT)(profile.kv_bytes)
        decode = profile.decode
        self._rates: list[float] = [0.0]
        """Decode steps a second, by batch size."""
        self._step_s = None if decode is None else decode.step_s

    def occupied_s(self, tokens: int, cached_tokens: int) -> float:
        occupied_s = self.prefill_s(tokens, cached_tokens) - self._latency_s
        return occupied_s if occupied_s > 0.0 else 0.0

    def steps_per_s(self, batch: int) -> float:
        """Decode steps a second with so many requests; 0 with none. The profile must have decode figures."""
        rates = self._rates
        while batch >= len(rates):
            assert self._step_s is not None  # an engine that decodes refuses such a profile
            rates.append(1.0 / self._step_s(len(rates)))
        return rates[batch]


@lru_cache(64)
def works_of(profile: Profile) -> Works:
    """One for all instances of a profile."""
    return Works(profile)
