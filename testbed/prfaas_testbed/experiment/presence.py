"""What the plugin costs a server that doesn't use it: stock single-site SGLang with it and without.

Two plain servers of one model, alike but that one loads no plugin of ours (SGLANG_PLUGINS names the testbed's
own for CPU servers alone). Each block starts one, then the other, and times it; then asks both in turns:
single requests by length, then bursts. The next block has them the other way round. As a control neither has
the plugin: what two starts of one server differ by, which no number of requests to them averages out.
"""

from __future__ import annotations

import concurrent.futures
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from prfaas.model.errors import PrfaasError
from prfaas_testbed.client.asker import Asker
from prfaas_testbed.experiment.fleet import K_MODELS_DIR
from prfaas_testbed.experiment.profiling import K_HOST, free_ports, undisturbed
from prfaas_testbed.instances.models import TinyModel
from prfaas_testbed.instances.sglang_client import generate, prompt_of
from prfaas_testbed.instances.sglang_server import K_SAME_CHUNKS, ServerSpec, SglangServer

K_ARMS = ("without", "with")
K_CPU_PLUGIN = "prfaas_cpu"
K_ROUNDS = {16: 200, 512: 100, 2048: 12}
"""Of single requests a block, to each server, by the prompt's length. First tokens of short prompts come
after 10 and 26 ms, and two that came one after the other differ by a fifth and an eighth: of so many pairs
the median is sure to a hundredth, of eight to four.
"""
K_LENGTHS = tuple(K_ROUNDS)
K_OUTPUT_TOKENS = 16
K_BURSTS = 3
K_BURST_REQUESTS, K_BURST_TOKENS = 8, 256
K_EQUAL_LENGTHS = (20, 300, 1500)
K_MOST_RATIO = 1.03
"""Of medians, with over without: what noise leaves on two cores of its own."""
K_MEDIAN_ERROR = 1.2533 / 1.349
"""Of a median, by the distance between quartiles and the root of how many, where they are spread normally."""

Progress = Callable[[str], None]


@dataclass
class Found:
    """Raw values."""

    starts: list[dict[str, Any]] = field(default_factory=list)
    """`block`, `arm`, `seconds`, and `cpu_s` of all its processes."""
    processor: list[dict[str, Any]] = field(default_factory=list)
    """`block`, `arm`, `cpu_s` over all that it was asked: what a busy machine disturbs least."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """`block`, `round`, `arm`, `tokens`, `ttft_s`, `e2e_s`, and `cpu_s` of the server meanwhile."""
    bursts: list[dict[str, Any]] = field(default_factory=list)
    """`block`, `round`, `arm`, `seconds`, `tokens_per_s` (in and out)."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """`block`, `tokens`, and whether token ids and log probabilities are `equal`, bit by bit."""


def measure(model: TinyModel, folder: Path, tell: Progress, blocks: int, control: bool = False) -> Found:
    """`control`: the arm "with" is without, too. Raises PrfaasError where a server dies or doesn't answer."""
    found = Found()
    with undisturbed(tell):
        for block in range(blocks):
            arms = K_ARMS if block % 2 == 0 else K_ARMS[::-1]
            ports = dict(zip(arms, free_ports(2), strict=True))
            servers = {arm: _server(model, arm, ports[arm], folder, block, control) for arm in arms}
            try:
                for arm in arms:
                    servers[arm].start()
                    servers[arm].wait_ready()
                    seconds = round(servers[arm].start_seconds or 0.0, 3)
                    row = {"block": block, "arm": arm, "seconds": seconds}
                    found.starts.append({**row, "cpu_s": cpu_s(servers[arm])})
                    tell(f"block {block + 1} of {blocks}: {arm} the plugin, started in {seconds:.1f} s")
                before = {arm: cpu_s(servers[arm]) for arm in arms}
                _ask(servers, arms, block, found)
                for arm in arms:
                    spent_s = round(cpu_s(servers[arm]) - before[arm], 2)
                    found.processor.append({"block": block, "arm": arm, "cpu_s": spent_s})
            finally:
                for server in servers.values():
                    server.stop()
            tell(f"block {block + 1} of {blocks}: asked")
    return found


def cpu_s(server: SglangServer) -> float:
    """Processor time of a server's processes so far."""
    first = psutil.Process(server.pid)
    times = [process.cpu_times() for process in (first, *first.children(recursive=True))]
    return round(sum(one.user + one.system for one in times), 2)


def ran_s(server: SglangServer) -> float:
    """The same by the scheduler's own clock, in nanoseconds: what one request takes is a tick or two of the
    other."""
    first = psutil.Process(server.pid)
    total_ns = 0
    for process in (first, *first.children(recursive=True)):
        for thread in process.threads():
            try:
                said = Path(f"/proc/{process.pid}/task/{thread.id}/schedstat").read_text(encoding="ascii")
            except OSError:
                continue  # It has ended, as threads of a pool do.
            total_ns += int(said.split()[0])
    return total_ns / 1e9


def _server(model: TinyModel, arm: str, port: int, folder: Path, block: int, control: bool) -> SglangServer:
    loads = arm == "with" and not control
    spec = ServerSpec(
        role="plain", model=model, model_dir=K_MODELS_DIR / model.name, host=K_HOST, port=port,
        extra_args=K_SAME_CHUNKS, extra_env={} if loads else {"SGLANG_PLUGINS": K_CPU_PLUGIN},
        spawn=True,
    )  # fmt: skip
    return SglangServer(spec, folder / f"{block}-{arm}.log")


def _ask(servers: dict[str, SglangServer], arms: Sequence[str], block: int, found: Found) -> None:
    asker = Asker()

    def one(arm: str, tokens: int, seed: int) -> dict[str, Any]:
        order = {
            "tokens": tokens, "seed": seed, "output_tokens": K_OUTPUT_TOKENS, "fields": {},
            "targets": [servers[arm].url],
        }  # fmt: skip
        answer = asker.ask(order)
        if answer["error"]:
            raise PrfaasError(f"{servers[arm].name}: {answer['error']}")
        return answer

    for tokens in K_LENGTHS:
        for arm in arms:
            one(arm, tokens, 1)
    for place, (tokens, rounds) in enumerate(K_ROUNDS.items(), start=1):
        for number in range(rounds):
            for arm in arms if number % 2 == 0 else arms[::-1]:
                before_s = ran_s(servers[arm])
                answer = one(arm, tokens, 100_000 * block + 10_000 * place + number)
                cpu = round(ran_s(servers[arm]) - before_s, 6)
                row = {"block": block, "round": number, "arm": arm, "tokens": tokens, "cpu_s": cpu}
                found.requests.append({**row, "ttft_s": answer["ttft_s"], "e2e_s": answer["e2e_s"]})
    for number in range(K_BURSTS):
        for arm in arms if number % 2 == 0 else arms[::-1]:
            seconds = _burst(servers[arm], 1000 * block + 10 * number)
            tokens_all = K_BURST_REQUESTS * (K_BURST_TOKENS + K_OUTPUT_TOKENS)
            row = {"block": block, "round": number, "arm": arm, "seconds": round(seconds, 4)}
            found.bursts.append({**row, "tokens_per_s": round(tokens_all / seconds, 1)})
    for tokens in K_EQUAL_LENGTHS:
        first, second = (
            generate(servers[arm].url, prompt_of(tokens, block), K_OUTPUT_TOKENS) for arm in K_ARMS
        )
        equal = first.error is None and (first.tokens, first.logprobs) == (second.tokens, second.logprobs)
        found.answers.append({"block": block, "tokens": tokens, "equal": equal})
    asker.close()


def _burst(server: SglangServer, seed: int) -> float:
    prompts = [prompt_of(K_BURST_TOKENS, seed + i) for i in range(K_BURST_REQUESTS)]
    began_s = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(K_BURST_REQUESTS) as pool:
        answers = list(pool.map(lambda prompt: generate(server.url, prompt, K_OUTPUT_TOKENS), prompts))
    failed = next((answer.error for answer in answers if answer.error), None)
    if failed:
        raise PrfaasError(f"{server.name}: {failed}")
    return time.monotonic() - began_s


@dataclass(frozen=True)
class Ratio:
    """With over without; above 1 the plugin costs something."""

    value: float
    error: float | None = None
    """How far off it may well be, of these two starts: the standard error of a median of pairs. None: there
    were no pairs."""
    by_block: tuple[float, ...] = ()
    """Of each block's pairs alone: another start of both may differ by as much."""


def ratios(found: Found) -> dict[str, Ratio]:
    """Of medians: a start and its processor time, the processor time of all requests. Of the median of pairs
    asked one after the other: a request's times and processor time, a burst's time."""
    result = {
        "start": _medians(found.starts, "seconds"),
        "start_cpu": _medians(found.starts, "cpu_s"),
        "requests_cpu": _medians(found.processor, "cpu_s"),
    }
    for tokens in K_LENGTHS:
        rows = [row for row in found.requests if row["tokens"] == tokens]
        for what in ("ttft_s", "e2e_s", "cpu_s"):
            result[f"{what.removesuffix('_s')}/{tokens}"] = _paired(rows, what)
    result["burst"] = _paired(found.bursts, "seconds")
    return result


def _medians(rows: Sequence[dict[str, Any]], what: str) -> Ratio:
    one, other = (statistics.median(row[what] for row in rows if row["arm"] == arm) for arm in K_ARMS)
    return Ratio(round(other / one, 4))


def _paired(rows: Sequence[dict[str, Any]], what: str) -> Ratio:
    """The median over pairs that ran one after the other."""
    pairs: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        pairs.setdefault((row["block"], row["round"]), {})[row["arm"]] = row[what]
    found = [pair["with"] / pair["without"] for pair in pairs.values()]
    quarters = statistics.quantiles(found, n=4)
    error = K_MEDIAN_ERROR * (quarters[2] - quarters[0]) / math.sqrt(len(found))
    blocks: dict[int, list[float]] = {}
    for (block, _), ratio in zip(pairs, found, strict=True):
        blocks.setdefault(block, []).append(ratio)
    by_block = tuple(round(statistics.median(some), 4) for some in blocks.values())
    return Ratio(round(statistics.median(found), 4), round(error, 4), by_block)


def checks(found: Found) -> list[dict[str, Any]]:
    rows = [
        {
            "name": f"ratio/{name}", "outcome": "passed" if ratio.value <= K_MOST_RATIO else "failed",
            "value": ratio.value, "wanted": K_MOST_RATIO, "error": ratio.error,
            "by_block": list(ratio.by_block),
        }
        for name, ratio in ratios(found).items()
    ]  # fmt: skip
    equal = sum(row["equal"] for row in found.answers) / len(found.answers)
    outcome = "passed" if equal == 1 else "failed"
    return [*rows, {"name": "answers_equal_share", "outcome": outcome, "value": equal, "wanted": 1}]
