"""How like a profiled instance is to the real server it was profiled from: the same requests to both.

A round is a handful of requests of mixed length at once. The real server answers a round between each two
looks that its profile is made of, so that the profile and what it is held against are of the same minutes;
how much slower than usual the machine was in a round is known from the looks around it. What is compared are
quantiles over all rounds, as ratios: as they were measured, and with the machine's speed taken out of the
real side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from prfaas_testbed.client import Answer

K_MIX_TOKENS = (600, 900, 1900, 2800, 4400, 5600)
"""None of them a length that profiles are measured at: what lies between those is held as well."""
K_APART_S = 0.01  # at once, but in a known order
K_ROUNDS = 6
K_NEW_TOKENS = 16
K_QUANTILES = (0.5, 0.9)


def rounds_of(longest_tokens: int, rounds: int, seed: int = 1) -> list[list[int]]:
    """The lengths of each round: the same, in an order of its own."""
    rng, found = Random(seed), []
    usable = [tokens for tokens in K_MIX_TOKENS if tokens <= longest_tokens]
    for _ in range(rounds):
        lengths = list(usable)
        rng.shuffle(lengths)
        found.append(lengths)
    return found


@dataclass
class Likeness:
    """Raw values of both sides, a list a round."""

    lengths: list[list[int]]
    real_sent_s: list[list[float]]
    profiled_sent_s: list[list[float]]
    real_ttft_s: list[list[float]]
    profiled_ttft_s: list[list[float]]
    real_e2e_s: list[list[float]]
    profiled_e2e_s: list[list[float]]
    slowness: list[float]
    """Of the machine in the real side's rounds; 1 is the median look's."""

    @classmethod
    def of(
        cls,
        lengths: list[list[int]],
        real: Sequence[Sequence[Answer]],
        profiled: Sequence[Sequence[Answer]],
        slowness: list[float],
    ) -> Likeness:
        return cls(
            lengths,
            [_times(one, "sent_s") for one in real],
            [_times(one, "sent_s") for one in profiled],
            [_times(one, "ttft_s") for one in real],
            [_times(one, "ttft_s") for one in profiled],
            [_times(one, "e2e_s") for one in real],
            [_times(one, "e2e_s") for one in profiled],
            [round(value, 4) for value in slowness],
        )

    def rows(self) -> list[dict[str, Any]]:
        """A row a request of either side: what was asked when, and when its first and last token came; times
        since the round's start."""
        return [
            {
                "side": side, "round": i, "sent_s": sent_s, "prompt_tokens": tokens,
                "output_tokens": K_NEW_TOKENS, "ttft_s": ttft_s, "e2e_s": e2e_s,
            }
            for side, columns in (
                ("real", (self.real_sent_s, self.real_ttft_s, self.real_e2e_s)),
                ("profiled", (self.profiled_sent_s, self.profiled_ttft_s, self.profiled_e2e_s)),
            )
            for i, one in enumerate(zip(self.lengths, *columns, strict=True))
            for tokens, sent_s, ttft_s, e2e_s in zip(*one, strict=True)
        ]  # fmt: skip

    def ratios(self, at_its_speed: bool = True) -> dict[str, float]:
        """Profiled over real, by quantile of the time to first token and to the last; with `at_its_speed`
        the real side's times are those of a machine as fast as at the median look."""
        found = {}
        for name, real, profiled in (
            ("ttft", self.real_ttft_s, self.profiled_ttft_s),
            ("e2e", self.real_e2e_s, self.profiled_e2e_s),
        ):
            factors = self.slowness if at_its_speed else [1.0] * len(real)
            a = np.concatenate([np.array(one) / slow for one, slow in zip(real, factors, strict=True)])
            b = np.concatenate([np.array(one) for one in profiled])
            for q in K_QUANTILES:
                found[f"{name}_p{q * 100:.0f}"] = round(float(np.quantile(b, q) / np.quantile(a, q)), 4)
        return found


def _times(answers: Sequence[Answer], name: str) -> list[float]:
    """In the order of their sending."""
    ordered = sorted(answers, key=lambda answer: int(answer.id))
    return [round(getattr(answer, name) or 0.0, 5) for answer in ordered]
