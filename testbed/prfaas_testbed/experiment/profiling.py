"""A profile measured from a real SGLang server: prefill time over prompt length, decode step over batch
size.

A prompt alone has its first token after T = latency + occupation: reading the request and handing the token
out keep nobody else waiting, computing does. So each length is asked for alone and several at once: what each
of several adds is its occupation, what a prompt alone takes beyond that is latency.

The machine's own speed drifts, so a look at every length and batch is repeated, with a round of requests of
mixed length between each two (likeness.py), and the profile is the medians over all looks.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import numpy as np

from prfaas.model.errors import PrfaasError
from prfaas_testbed.client import Answer, Shot, Target
from prfaas_testbed.client.load import Load
from prfaas_testbed.experiment.fleet import K_MODELS_DIR
from prfaas_testbed.experiment.likeness import (
    K_APART_S,
    K_MIX_TOKENS,
    K_NEW_TOKENS,
    K_ROUNDS,
    Likeness,
    rounds_of,
)
from prfaas_testbed.experiment.served import K_STREAM_NEW_TOKENS, Asked, Kind, Served, stream_of
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.instances.models import K_FIRST_PLAIN_TOKEN, K_PLAIN_TOKENS, TinyModel
from prfaas_testbed.instances.sglang_server import K_SAME_CHUNKS, ServerSpec, SglangServer

K_LENGTHS = (16, 128, 512, 1024, 2048, 3072, 4096, 6144, 8192)
K_BATCHES = (1, 2, 4, 8)
K_STEPS = 24  # output tokens of a decode measurement
K_AT_ONCE_TOKENS = 8192  # in all, of prompts that are asked for at once; two at least, four at most
K_FEWEST_AT_ONCE, K_MOST_AT_ONCE = 2, 4
K_LEAST_OCCUPIED_S = 1e-4
K_CONTEXT_TOKENS = 2048  # what a decode step reads of each request grows with it
K_LOOKS = 3  # where nothing is compared
K_NICE = -15
K_TIMEOUT_S = 120.0
K_CHUNK_TOKENS = 4096
K_HOST = "127.0.0.1"


class Prober:
    """Asks one server; every prompt is new, so that no cache shortens it."""

    def __init__(self, url: str, seed: int) -> None:
        self._url, self._rng, self._count = url, Random(seed), 0

    def ask(self, lengths: Sequence[int], new_tokens: int, apart_s: float = 0.0) -> list[Answer]:
        """So many requests at once, or one after another's start. Raises PrfaasError for the first that
        fails."""
        return self.play([Asked(place * apart_s, length, new_tokens) for place, length in enumerate(lengths)])

    def play(self, asked: Sequence[Asked]) -> list[Answer]:
        """Requests at their times. Raises PrfaasError for the first that fails."""
        shots = []
        for one in asked:
            self._count += 1
            tokens = [
                self._rng.randrange(K_PLAIN_TOKENS) + K_FIRST_PLAIN_TOKEN for _ in range(one.prompt_tokens)
            ]
            sampling = {"temperature": 0, "max_new_tokens": one.new_tokens, "ignore_eos": True}
            body = {"input_ids": tokens, "sampling_params": sampling, "stream": True}
            target = Target(f"{self._url}/generate", answers=True)
            shots.append(Shot(str(self._count), one.at_s, body, (target,), K_TIMEOUT_S))
        answers: list[Answer] = []
        asyncio.run(Load(shots, answers.append).run(time.monotonic()))
        for answer in answers:
            if answer.error is not None:
                raise PrfaasError(f"the server under measurement failed: {answer.error}")
        return answers

    def alone_s(self, length: int) -> float:
        """Time to the first token of one prompt."""
        return self.ask([length], 1)[0].ttft_s or 0.0

    def occupied_s(self, length: int) -> float:
        """What each of several prompts at once adds to the time of those behind it."""
        n = min(K_MOST_AT_ONCE, max(K_FEWEST_AT_ONCE, K_AT_ONCE_TOKENS // length))
        ends_s = sorted(answer.sent_s + (answer.ttft_s or 0.0) for answer in self.ask([length] * n, 1))
        return (ends_s[-1] - ends_s[0]) / (n - 1)

    def step_s(self, batch: int) -> float:
        """Time of a decode step with `batch` requests."""
        answers = self.ask([K_CONTEXT_TOKENS] * batch, K_STEPS)
        # The steps of the last to start, which had the whole batch beside it.
        last = max(answers, key=lambda answer: answer.sent_s + (answer.ttft_s or 0.0))
        return ((last.e2e_s or 0.0) - (last.ttft_s or 0.0)) / (K_STEPS - 1)

    def look(self, lengths: Sequence[int], batches: Sequence[int] = K_BATCHES) -> Look:
        """Every length alone and at once, and every batch."""
        return Look(
            [self.alone_s(length) for length in lengths],
            [self.occupied_s(length) for length in lengths],
            [self.step_s(batch) for batch in batches],
        )


@dataclass(frozen=True)
class Look:
    """A server at one moment: a time for each length, and for each batch size."""

    alone_s: list[float]
    occupied_s: list[float]
    step_s: list[float]

    @property
    def total_s(self) -> float:
        """How slow the machine was."""
        return sum(self.alone_s) + sum(self.occupied_s)


def settled(looks: Sequence[Look]) -> Look:
    """The median of each time."""

    def medians(name: str) -> list[float]:
        return [
            statistics.median(values) for values in zip(*(getattr(look, name) for look in looks), strict=True)
        ]

    return Look(medians("alone_s"), medians("occupied_s"), medians("step_s"))


def slowness(looks: Sequence[Look]) -> list[float]:
    """Of the round between each two looks: how much slower the machine was than at the median look."""
    usual = statistics.median(look.total_s for look in looks)
    return [(a.total_s + b.total_s) / 2 / usual for a, b in itertools.pairwise(looks)]


def split_of(look: Look) -> tuple[list[float], float]:
    """(occupation of each length, latency) that explain it: the latency is the same for every length, and
    the median of what they say."""
    occupied = rising([max(K_LEAST_OCCUPIED_S, value) for value in look.occupied_s])
    spare = [alone - behind for alone, behind in zip(look.alone_s, occupied, strict=True)]
    return occupied, max(0.0, statistics.median(spare))


def rising(values: Sequence[float]) -> list[float]:
    """Noise must not make a longer prompt cheaper: each value at least the one before."""
    found: list[float] = []
    for value in values:
        found.append(max(value, found[-1] if found else 0.0))
    return found


def with_steps(lengths: Sequence[int], chunk_tokens: int = K_CHUNK_TOKENS) -> list[int]:
    """And each full prefill step, alone and with one token more: what a step costs beside its own tokens (on
    a CPU, attention over all that came before) is a jump there, which a line from one length to the next
    smooths away: 268 tokens beyond a first step of 4,096 take 0.4 s, and by that line took 0.1."""
    steps = range(chunk_tokens, max(lengths), chunk_tokens)
    return sorted({*lengths, *steps, *(tokens + 1 for tokens in steps)})


@dataclass(frozen=True)
class Measured:
    """What a real server was found to do."""

    profile: dict[str, Any]
    """A profile file's content."""
    looks: list[Look]
    likeness: Likeness | None
    """How like it a profiled instance was, while the server was still there to compare."""
    served: list[Served]
    """The rounds that it answered between the looks, and what it made of them."""


def measure(
    model: TinyModel,
    name: str,
    log: Path,
    progress: Callable[[str], None],
    rounds: int = K_ROUNDS,
    lengths: Sequence[int] = K_LENGTHS,
    batches: Sequence[int] = K_BATCHES,
) -> Measured:
    """Start a plain server of the model, measure it, and hold a profiled instance against it (`rounds` 0:
    don't)."""
    ports = free_ports(2)
    spec = ServerSpec(
        role="plain", model=model, model_dir=K_MODELS_DIR / model.name, host=K_HOST, port=ports[0],
        extra_args=K_SAME_CHUNKS,
    )  # fmt: skip
    lengths = with_steps([length for length in lengths if length <= model.longest_prompt_tokens])
    bursts = rounds_of(model.longest_prompt_tokens, rounds)
    looks: list[Look] = []
    real: list[list[Answer]] = []
    streams: list[tuple[list[Asked], list[Answer]]] = []
    with undisturbed(progress), SglangServer(spec, log) as server:
        server.wait_ready(progress=progress)
        prober = Prober(server.url, seed=1)
        prober.ask([64, 512, 2048], 4)
        for i in range(rounds + 1 if rounds else K_LOOKS):
            looks.append(prober.look(lengths, batches))
            progress(f"look {i + 1}: all lengths alone and at once took {looks[-1].total_s:.2f} s")
            if i < rounds:
                real.append(prober.ask(bursts[i], K_NEW_TOKENS, K_APART_S))
                asked = stream_of(
                    model.longest_prompt_tokens, a_request_s(looks[0], lengths, batches), seed=i
                )
                streams.append((asked, prober.play(asked)))
    profile = _profile(model, name, lengths, batches, settled(looks), spec.pool_tokens)
    for length, whole_s in zip(lengths, profile["prefill_s"], strict=True):
        progress(
            f"first token of {length} tokens: {whole_s:.4f} s, {profile['latency_s']:.4f} s of it latency"
        )
    if not rounds:
        return Measured(profile, looks, None, [])
    with undisturbed(progress), profiled_instance(profile, model.name, log.parent, ports[1]) as url:
        beside = Prober(url, seed=2)
        beside.ask([64], 4)
        profiled = [beside.ask(burst, K_NEW_TOKENS, K_APART_S) for burst in bursts]
    slow = slowness(looks)
    likeness = Likeness.of(bursts, real, profiled, slow)
    for what, ratio in likeness.ratios().items():
        progress(f"profiled over real, {what}: {ratio:.3f}")
    served = []
    for factor, burst, answers, (asked, streamed) in zip(slow, bursts, real, streams, strict=True):
        once: Kind = "at once"
        served.append(Served.of(once, factor, _at_once(burst), answers))
        served.append(Served.of("stream", factor, asked, streamed))
    return Measured(profile, looks, likeness, served)


def _at_once(lengths: Sequence[int]) -> list[Asked]:
    return [Asked(place * K_APART_S, length, K_NEW_TOKENS) for place, length in enumerate(lengths)]


def a_request_s(look: Look, lengths: Sequence[int], batches: Sequence[int]) -> float:
    """What the server takes for one request of a stream, with some others in its batch; about."""
    mix = [tokens for tokens in K_MIX_TOKENS if tokens <= lengths[-1]]
    prefill_s = statistics.mean(float(np.interp(tokens, lengths, look.occupied_s)) for tokens in mix)
    batch, step_s = batches[len(batches) // 2], look.step_s[len(batches) // 2]
    return prefill_s + statistics.mean(K_STREAM_NEW_TOKENS) * step_s / batch


@contextmanager
def undisturbed(progress: Callable[[str], None]) -> Iterator[None]:
    """Go before whatever else this machine does, with all that is started meanwhile: a profile is of a server
    that has its core. Without the right to, it is said."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, K_NICE)
    except PermissionError:
        progress("without root the measurement shares the processors with whatever else runs")
        yield
        return
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


@contextmanager
def profiled_instance(profile: dict[str, Any], model: str, folder: Path, port: int) -> Iterator[str]:
    """A collocated profiled instance of the profile on this machine, as a process of its own; its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    file = write_json(folder / f"{profile['name']}.yaml", profile)
    settings = {
        "name": "profiled", "role": "collocated", "host": K_HOST, "port": port, "model": model,
        "profile": str(file), "limits": {"prefill_requests": 1},
    }  # fmt: skip
    config = write_json(folder / "profiled-instance.yaml", settings)
    words = [sys.executable, "-m", "prfaas_testbed.instances.profiled", "--config", str(config)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            if "ready" not in said:
                raise PrfaasError(f"the profiled instance didn't start: {said.strip()}")
            yield f"http://{K_HOST}:{port}"
        finally:
            process.terminate()


def _profile(
    model: TinyModel,
    name: str,
    lengths: Sequence[int],
    batches: Sequence[int],
    look: Look,
    pool_tokens: int,
) -> dict[str, Any]:
    occupied, latency_s = split_of(look)
    sizes = [
        length * model.kv_bytes_per_token
        + model.state_bytes
        + min(length, model.window_tokens) * model.window_bytes_per_token
        for length in lengths
    ]
    return {
        "name": name,
        "description": f"The tiny {model.name} model on SGLang's CPU server: {model.kind}. "
        f"Decode steps at {K_CONTEXT_TOKENS} tokens a request.",
        "source": "measured",
        "gpus": 0,
        "tokens": list(lengths),
        "prefill_s": [round(latency_s + value, 5) for value in occupied],
        "latency_s": round(latency_s, 5),
        "kv_bytes": sizes,
        "state_bytes": model.state_bytes,
        "decode": {
            "batch": list(batches),
            "step_s": [round(value, 5) for value in rising(look.step_s)],
            "max_batch": max(*batches, *K_BATCHES),
        },
        "block_tokens": 1,
        "chunk_tokens": K_CHUNK_TOKENS,
        "pool_tokens": pool_tokens,
    }


def free_ports(n: int) -> list[int]:
    """Below the range that outgoing connections are given, for a server takes a minute to bind."""
    found: list[int] = []
    while len(found) < n:
        port = SystemRandom().randrange(20_000, 28_000)
        with suppress(OSError), socket.create_server((K_HOST, port)):
            if port not in found:
                found.append(port)
    return found
