"""How slow a real prefill server was where it served, by its own log, beside the profile of it alone.

Where prefill, decode, pumps and the emulator share two cores, a server computes slower than alone. At the end
of each prefill step SGLang logs its tokens and their rate since the step before. While requests wait, steps
follow on one another, and tokens over rate is the time that a step took.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prfaas.model.errors import PrfaasError
from prfaas.model.profiles import Profile

_STEP = re.compile(
    r"Prefill batch.*#new-token: (\d+),.*#pending-token: (\d+),.*input throughput \(token/s\): ([\d.]+)"
)


@dataclass(frozen=True)
class Stretch:
    """Steps that followed on one another, from an idle server to an idle server."""

    first_tokens: int
    """Of the first step, whose time isn't known: its rate counts the idle time before it."""
    tokens: int
    rest_s: float
    """From the first step's end to the last one's."""


def stretches(log: str) -> list[Stretch]:
    found: list[Stretch] = []
    going = False
    for tokens_text, pending_text, rate_text in _STEP.findall(log):
        tokens, rate = int(tokens_text), float(rate_text)
        if going and rate > 0:
            last = found[-1]
            found[-1] = Stretch(last.first_tokens, last.tokens + tokens, last.rest_s + tokens / rate)
        else:
            found.append(Stretch(tokens, tokens, 0.0))
        going = int(pending_text) > 0
    return found


def slowness(log: str, prompts: Sequence[int], profile: Profile) -> float:
    """What the server took for these prompts, asked for at once, over what the profile says: the median of
    all times that they were. Raises PrfaasError where the log has no such time."""
    there = [one for one in stretches(log) if one.tokens == sum(prompts) and one.rest_s > 0]
    if not there:
        raise PrfaasError(
            f"the prefill server's log has no {len(prompts)} prompts that followed on one another"
        )
    whole_s = sum(profile.occupied_s(tokens) for tokens in prompts)
    return statistics.median(one.rest_s / (whole_s - profile.occupied_s(one.first_tokens)) for one in there)


def as_slow(profile: dict[str, Any], factor: float) -> dict[str, Any]:
    """A profile file's content for a server whose prefill steps take so many times as long."""
    latency_s = profile["latency_s"]
    return profile | {
        "prefill_s": [round(latency_s + (value - latency_s) * factor, 5) for value in profile["prefill_s"]]
    }
