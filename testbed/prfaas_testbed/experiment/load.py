"""A workload as shots for the client, and the client's answers as rows of the record."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from prfaas.config.experiment import Experiment
from prfaas.config.run import RequestRow
from prfaas.config.workload import trace_lines
from prfaas.model.errors import PrfaasError
from prfaas.model.profiles import Profile
from prfaas.workload import prompt_token_ids, timed_requests
from prfaas.workload.requests import TimedRequest
from prfaas_testbed.client import Answer, Shot, Target, read_answers, write_shots
from prfaas_testbed.experiment.fleet import Fleet
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.servers import Server
from prfaas_testbed.experiment.transfers import Moved
from prfaas_testbed.instances.models import K_FIRST_PLAIN_TOKEN, K_PLAIN_TOKENS, TinyModel

if TYPE_CHECKING:
    from prfaas_testbed.network import Site


K_LEAD_S = 1.0  # between the client's start and the load's zero: its imports
K_READ_BPS = 80e6  # and its reading of all prompts, on a busy machine
K_AFTER_S = 15.0  # how much longer than its last deadline a client may take
K_PROFILED_VOCABULARY = 32000


@dataclass(frozen=True)
class Planned:
    """One request of the workload with its prompt."""

    id: str
    at_s: float
    tokens: list[int]
    output_tokens: int


def plan(experiment: Experiment, real: bool, seed: int) -> list[Planned]:
    """The workload's requests; the same seed gives the same prompts at the same times."""
    lines = trace_lines(experiment.workload, K_TOPOLOGIES)
    requests = timed_requests(experiment.workload, Random(seed), lines)
    return [
        Planned(
            f"r{request.index}",
            request.arrival_s,
            _tokens(experiment, request, real, seed),
            request.output_tokens,
        )
        for request in requests
    ]


def _tokens(experiment: Experiment, request: TimedRequest, real: bool, seed: int) -> list[int]:
    if experiment.prompts == "independent":
        request = replace(request, block_ids=())
    low, high = (
        (K_FIRST_PLAIN_TOKEN, K_FIRST_PLAIN_TOKEN + K_PLAIN_TOKENS) if real else (0, K_PROFILED_VOCABULARY)
    )
    return prompt_token_ids(request, high, seed, low)


def body_of(planned: Planned, real: bool) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": planned.output_tokens, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": planned.tokens, "sampling_params": sampling, "stream": True}
    if real:
        body["return_logprob"] = True
    return body


def direct_shots(
    requests: Sequence[Planned],
    fleet: Fleet,
    real: bool,
    rooms: Random,
    timeout_s: float,
    offset_s: float = 0.0,
) -> tuple[list[Shot], dict[str, tuple[int, Server]]]:
    """Each request to a prefill and a decode server in turn; with its room and prefill server."""
    prefills, decodes = fleet.by_role("prefill"), fleet.by_role("decode")
    shots, where = [], {}
    for i, planned in enumerate(requests):
        body = body_of(planned, real)
        if not prefills:
            server = fleet.by_role("collocated")[i % len(fleet.by_role("collocated"))]
            targets: tuple[Target, ...] = (Target(f"{fleet.url(server)}/generate", answers=True),)
            where[planned.id] = (0, server)
        else:
            server, decode = prefills[i % len(prefills)], decodes[i % len(decodes)]
            room = rooms.getrandbits(62)
            body |= {
                "bootstrap_host": server.host,
                "bootstrap_port": server.bootstrap_port,
                "bootstrap_room": room,
            }
            urls = [f"{fleet.url(one)}/generate" for one in (server, decode)]
            targets = (Target(urls[0], False), Target(urls[1], True))
            where[planned.id] = (room, server)
        shots.append(Shot(planned.id, offset_s + planned.at_s, body, targets, timeout_s))
    return shots, where


def one_server_shots(requests: Sequence[Planned], url: str, real: bool, timeout_s: float) -> list[Shot]:
    """Every request to one address: the plain server, or a router."""
    return [
        Shot(p.id, p.at_s, body_of(p, real), (Target(f"{url}/generate", answers=True),), timeout_s)
        for p in requests
    ]


class Client:
    """The load generator inside a site. `start`, then `finish`; `stop` in every case."""

    def __init__(self, site: Site, folder: Path, name: str) -> None:
        self._site, self._folder, self._name = site, folder, name
        self._out = folder / f"{name}.answers.jsonl"
        self._process: subprocess.Popen[Any] | None = None
        self._limit_s = 0.0
        self.start_s = 0.0
        """The load's zero on CLOCK_MONOTONIC."""
        self.cpu_share: float | None = None

    def start(self, shots: Sequence[Shot]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._name}.shots.jsonl"
        write_shots(path, shots)
        self._out.unlink(missing_ok=True)
        lead_s = K_LEAD_S + path.stat().st_size * 8 / K_READ_BPS
        self.start_s = time.monotonic() + lead_s
        self._limit_s = max((shot.at_s + shot.timeout_s for shot in shots), default=0.0) + lead_s + K_AFTER_S
        words = ["--shots", str(path), "--out", str(self._out), "--start", str(self.start_s)]
        with (self._folder / f"{self._name}.log").open("ab") as log:
            self._process = self._site.popen(
                [sys.executable, "-m", "prfaas_testbed.client", *words], stdout=log, stderr=subprocess.STDOUT
            )

    def finish(self, poll: Callable[[int], None], every_s: float = 2.0) -> list[Answer]:
        """All answers; `poll` is called with how many there are. Raises PrfaasError when the client fails."""
        assert self._process is not None
        end_s = time.monotonic() + self._limit_s
        while True:
            try:
                status = self._process.wait(timeout=every_s)
                break
            except subprocess.TimeoutExpired:
                poll(sum(1 for _ in read_answers(self._out)))
                if time.monotonic() > end_s:
                    self.stop()
                    raise PrfaasError(f"the load generator didn't end within {self._limit_s:.0f} s") from None
        if status:
            raise PrfaasError(f"the load generator ended with {status}; log: {self._folder / self._name}.log")
        cpu = self._out.with_suffix(".cpu")
        if cpu.exists():
            self.cpu_share = float(cpu.read_text()) / max(1e-3, time.monotonic() - self.start_s)
        return list(read_answers(self._out))

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def wanted_bytes(tokens: int, profile: Profile | None, model: TinyModel | None) -> int | None:
    """What a request without any cached prefix must move, auxiliary data left out."""
    if model is not None:
        window = min(tokens, model.window_tokens) * model.window_bytes_per_token
        return tokens * model.kv_bytes_per_token + model.state_bytes + window
    return profile.kv_bytes(tokens) if profile is not None else None


def rows_of(
    answers: Sequence[Answer],
    requests: Sequence[Planned],
    model: str,
    start_s: float,
    where: Mapping[str, tuple[int, Server]],
    moved: Mapping[int, Moved],
    wanted: Callable[[int], int | None],
    home: str,
) -> list[RequestRow]:
    """One row a planned request (`home`: where they are decoded); one that the client never reported is an
    error too."""
    by_id = {answer.id: answer for answer in answers}
    rows = []
    for planned in requests:
        answer = by_id.get(planned.id) or Answer(
            planned.id, planned.at_s, error="the load generator told nothing"
        )
        row: dict[str, Any] = {
            "id": planned.id, "model": model, "prompt_tokens": len(planned.tokens),
            "cached_tokens": answer.cached_tokens, "sent_s": round(answer.sent_s, 4),
            "lateness_s": round(answer.sent_s - planned.at_s, 4), "ttft_s": _rounded(answer.ttft_s),
            "e2e_s": _rounded(answer.e2e_s), "output_tokens": planned.output_tokens,
            "output_ids": answer.output_ids, "logprobs": answer.logprobs, "error": answer.error,
        }  # fmt: skip
        if planned.id in where:
            room, server = where[planned.id]
            found = moved.get(room, Moved())
            brought = int(answer.headers.get("x-prfaas-moved-tokens", 0))
            row |= {
                "site": server.site, "reason": answer.headers.get("x-prfaas-reason", "the only path"),
                "moved_tokens": brought, "wanted_moved_bytes": wanted(brought) if brought else 0,
                "room": room, "transfer": "wan" if server.site != home else "local",
                "kv_bytes": found.payload_bytes,
                "wanted_kv_bytes": wanted(len(planned.tokens)) if room else None,
                "source_digest": found.source_digest, "landed_digest": found.landed_digest,
                "transfer_start_s": _rounded(found.start_s and found.start_s - start_s),
                "transfer_end_s": _rounded(found.end_s and found.end_s - start_s),
            }  # fmt: skip
        rows.append(RequestRow.model_validate(row))
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
