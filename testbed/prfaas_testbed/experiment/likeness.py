"""How like a profiled instance is to the real server it was profiled from: the same requests to both.

A round is a handful of requests of mixed length at once; real and profiled answer the rounds in turns, so
that whatever else this machine does meets both. What is compared are quantiles over all rounds, as ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from prfaas_testbed.client import Answer

K_MIX_TOKENS = (512, 1024, 2048, 3072, 4096, 6144)
K_APART_S = 0.01  # at once, but in a known order
K_ROUNDS = 6
K_NEW_TOKENS = 16
K_QUANTILES = (0.5, 0.9)

Ask = Callable[[Sequence[int], int], list[Answer]]
"""Sends prompts of these lengths K_APART_S from one another, each wanting so many tokens."""


@dataclass
class Likeness:
    """Raw values of both sides, a list a round."""

    lengths: list[list[int]] = field(default_factory=list)
    real_ttft_s: list[list[float]] = field(default_factory=list)
    profiled_ttft_s: list[list[float]] = field(default_factory=list)
    real_e2e_s: list[list[float]] = field(default_factory=list)
    profiled_e2e_s: list[list[float]] = field(default_factory=list)

    def ratios(self) -> dict[str, float]:
        """Profiled over real, by quantile of the time to first token and to the last."""
        found = {}
        for name, real, profiled in (
            ("ttft", self.real_ttft_s, self.profiled_ttft_s),
            ("e2e", self.real_e2e_s, self.profiled_e2e_s),
        ):
            flat = [np.array([value for one in side for value in one]) for side in (real, profiled)]
            for q in K_QUANTILES:
                a, b = (float(np.quantile(side, q)) for side in flat)
                found[f"{name}_p{q * 100:.0f}"] = round(b / a, 4)
        return found


def compare(real: Ask, profiled: Ask, longest_tokens: int, seed: int = 1, rounds: int = K_ROUNDS) -> Likeness:
    """Both sides answer the same lengths in the same order; who goes first changes from round to round."""
    rng, found = Random(seed), Likeness()
    usable = [tokens for tokens in K_MIX_TOKENS if tokens <= longest_tokens]
    for i in range(rounds):
        lengths = list(usable)
        rng.shuffle(lengths)
        found.lengths.append(lengths)
        sides = (
            (real, found.real_ttft_s, found.real_e2e_s),
            (profiled, found.profiled_ttft_s, found.profiled_e2e_s),
        )
        for ask, ttfts, e2es in sides if i % 2 == 0 else sides[::-1]:
            answers = sorted(ask(lengths, K_NEW_TOKENS), key=lambda answer: int(answer.id))
            ttfts.append([round(answer.ttft_s or 0.0, 5) for answer in answers])
            e2es.append([round(answer.e2e_s or 0.0, 5) for answer in answers])
    return found
