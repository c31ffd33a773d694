"""What a real server did with rounds of requests, and what the simulator's instance does with the same.

A round is a handful of prompts of mixed length at once, or a stream of them at random times, so that some
are prefilled while others are decoded. Both are played by the simulator as `prfaas simulate` plays a file of
one collocated instance, by the profile that was measured from that server: from prompts of one length at a
time, so that how lengths mix, queue and share a batch isn't fitted and can be wrong. A round's times are
those of a machine that was as slow as the looks around it say; the simulator's machine is as slow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np

from prfaas.config.experiment import Experiment
from prfaas.config.loading import check
from prfaas.simulator.build import simulation_of
from prfaas.workload.requests import TimedRequest
from prfaas_testbed.client import Answer
from prfaas_testbed.experiment.likeness import K_MIX_TOKENS, K_QUANTILES
from prfaas_testbed.experiment.machine import K_TOPOLOGIES

K_SLOWNESS = (0.2, 10.0)  # between which a round's own is looked for
K_HALVINGS = 16
K_STREAM_REQUESTS = 16
K_STREAM_NEW_TOKENS = (8, 16, 32)
K_STREAM_LOAD = 1.2  # of what the server does: four and more are under way at once

Kind = Literal["at once", "stream"]


@dataclass(frozen=True)
class Asked:
    """One request of a round."""

    at_s: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Served:
    """A round and what became of it: a value a request, in order of sending."""

    kind: Kind
    slowness: float
    """Of the machine; 1 is the median look's."""
    at_s: list[float]
    prompt_tokens: list[int]
    new_tokens: list[int]
    ttft_s: list[float]
    e2e_s: list[float]

    @classmethod
    def of(cls, kind: Kind, slowness: float, asked: Sequence[Asked], answers: Sequence[Answer]) -> Served:
        ordered = sorted(answers, key=lambda answer: int(answer.id))
        return cls(
            kind,
            round(slowness, 4),
            [round(answer.sent_s, 5) for answer in ordered],
            [one.prompt_tokens for one in asked],
            [one.new_tokens for one in asked],
            [round(answer.ttft_s or 0.0, 5) for answer in ordered],
            [round(answer.e2e_s or 0.0, 5) for answer in ordered],
        )

    def tpot_s(self) -> np.ndarray:
        """Time of each token beyond the first."""
        spent_s = np.array(self.e2e_s) - np.array(self.ttft_s)
        found: np.ndarray = spent_s / np.maximum(1, np.array(self.new_tokens) - 1)
        return found

    def under_way(self) -> tuple[float, int]:
        """Requests at once: the mean while any is, and the most."""
        changes = sorted(
            [(at_s, 1) for at_s in self.at_s]
            + [(at_s + e2e_s, -1) for at_s, e2e_s in zip(self.at_s, self.e2e_s, strict=True)]
        )
        now, most, area, busy_s = 0, 0, 0.0, 0.0
        for (at_s, change), (next_s, _) in zip(changes, [*changes[1:], changes[-1]], strict=True):
            now += change
            most = max(most, now)
            area += now * (next_s - at_s)
            busy_s += (next_s - at_s) if now else 0.0
        return area / busy_s, most


def stream_of(longest_tokens: int, a_request_s: float, seed: int) -> list[Asked]:
    """Mixed lengths at random times, at K_STREAM_LOAD of a server that takes a_request_s for each."""
    rng, at_s, found = Random(seed), 0.0, []
    usable = [tokens for tokens in K_MIX_TOKENS if tokens <= longest_tokens]
    lengths = (usable * (K_STREAM_REQUESTS // len(usable) + 1))[:K_STREAM_REQUESTS]
    rng.shuffle(lengths)
    for tokens in lengths:
        found.append(Asked(round(at_s, 4), tokens, rng.choice(K_STREAM_NEW_TOKENS)))
        at_s += rng.expovariate(K_STREAM_LOAD / a_request_s)
    return found


def alone(profile: Path, model: str) -> Experiment:
    """An experiment file's content: one collocated instance of the profile, one prompt a prefill step as the
    real server is told to."""
    content: dict[str, Any] = {
        "name": "instance", "description": "One instance, as likeness has measured it.", "wall_time_s": 600,
        "network": "hello",
        "models": [{"name": model, "profile": str(profile)}],
        "instances": [
            {"name": "plain", "site": "west", "role": "collocated", "limits": {"prefill_requests": 1}}
        ],
        "router": {"site": "west", "policy": {"name": "collocated"}},
        "workload": {
            "kind": "synthetic", "arrivals": {"process": "at_once"}, "requests": 1, "output_tokens": 1,
            "input_tokens": {"distribution": "constant", "tokens": 1},
        },
        "request_timeout_s": 600,
    }  # fmt: skip
    return check(content, Experiment, "the experiment of one instance")


def simulated(profile: Path, model: str, round_: Served) -> Served:
    """The same requests at the same times in the simulator, its machine as slow as the real one was."""
    slow = round_.slowness
    asked = zip(round_.at_s, round_.prompt_tokens, round_.new_tokens, strict=True)
    requests = [
        TimedRequest(i, at_s / slow, prompt, new) for i, (at_s, prompt, new) in enumerate(asked)
    ]  # fmt: skip
    record = simulation_of(alone(profile, model), K_TOPOLOGIES, requests=requests, sample=False).run()
    place = np.argsort(np.asarray(record.index))
    return replace(
        round_,
        ttft_s=[round(record.ttft_s[i] * slow, 5) for i in place],
        e2e_s=[round(record.e2e_s[i] * slow, 5) for i in place],
    )


def at_own_speed(profile: Path, model: str, round_: Served) -> Served:
    """As simulated, on a machine as slow as makes the median request last as long as it did: where the
    machine's speed changes between a look and a round, the looks around it say too little of it.
    """
    least, most = K_SLOWNESS
    for _ in range(K_HALVINGS):
        slow = math.sqrt(least * most)
        played = simulated(profile, model, replace(round_, slowness=slow))
        longer = np.median(np.array(played.e2e_s) / np.array(round_.e2e_s))
        least, most = (least, slow) if longer > 1 else (slow, most)
    return replace(played, slowness=round(slow, 4))


def against_simulator(profile: Path, model: str, rounds: Sequence[Served]) -> dict[str, Any]:
    """For a record: both sides' raw values, and simulated over real by kind of round and quantile; once more
    with each round's speed fitted to it, which leaves how requests share the instance to be compared.
    """
    played = [simulated(profile, model, one) for one in rounds]
    fitted = [at_own_speed(profile, model, one) for one in rounds]
    return {
        "rounds": [asdict(one) for one in rounds],
        "simulated": [{"ttft_s": one.ttft_s, "e2e_s": one.e2e_s} for one in played],
        "under_way": {
            kind: [round(mean, 1), most] for kind, (mean, most) in _under_way(rounds).items()
        },
        "ratios": ratios(rounds, played),
        "own_speed": {"slowness": [one.slowness for one in fitted], "ratios": ratios(rounds, fitted)},
    }  # fmt: skip


def rounds_of_record(rows: Sequence[dict[str, Any]]) -> list[Served]:
    """What against_simulator put under `rounds`."""
    return [Served(**row) for row in rows]


def ratios(real: Sequence[Served], played: Sequence[Served]) -> dict[str, dict[str, float]]:
    """Simulated over real, by kind of round: quantiles over all rounds of the times to the first token and to
    the last, and of a token."""
    found: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(one.kind for one in real):
        sides = [[one for one in side if one.kind == kind] for side in (real, played)]
        found[kind] = {}
        for name in ("ttft", "e2e", "tpot"):
            a, b = (np.concatenate([_values(one, name) for one in side]) for side in sides)
            for q in K_QUANTILES:
                found[kind][f"{name}_p{q * 100:.0f}"] = round(float(np.quantile(b, q) / np.quantile(a, q)), 4)
    return found


def _values(one: Served, name: str) -> np.ndarray:
    return one.tpot_s() if name == "tpot" else np.array(getattr(one, f"{name}_s"))


def _under_way(rounds: Sequence[Served]) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = {}
    for kind in dict.fromkeys(one.kind for one in rounds):
        each = [one.under_way() for one in rounds if one.kind == kind]
        found[kind] = (sum(mean for mean, _ in each) / len(each), max(most for _, most in each))
    return found
