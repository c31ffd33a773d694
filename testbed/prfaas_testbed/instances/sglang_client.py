"""Requests to real servers, as the tests and checks make them: token ids in, token ids and logprobs out.

The open-loop load of experiments is prfaas_testbed.client's; this asks one thing and waits.
"""

from __future__ import annotations

import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prfaas_testbed.instances.models import K_FIRST_PLAIN_TOKEN, K_PLAIN_TOKENS

K_ROOM_BITS = 62


@dataclass(frozen=True)
class Answer:
    """What a server said. `error` holds the status and text of a refusal, or what happened to the
    connection.
    """

    tokens: list[int]
    logprobs: list[float]
    cached_tokens: int
    finish: Mapping[str, Any] = field(default_factory=dict)
    status: int = 200
    error: str | None = None


def prompt_of(length_tokens: int, seed: int) -> list[int]:
    """Random ordinary tokens; prompts of two seeds share no prefix worth the name."""
    drawn = random.Random(f"{seed}/{length_tokens}")
    return [K_FIRST_PLAIN_TOKEN + drawn.randrange(K_PLAIN_TOKENS) for _ in range(length_tokens)]


def new_room() -> int:
    return random.getrandbits(K_ROOM_BITS)


def generate(
    url: str, prompt: Sequence[int], output_tokens: int, timeout_s: float = 120.0, **more: Any
) -> Answer:
    """One request to one server, at temperature 0."""
    body = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True},
        "return_logprob": True,
        **more,
    }
    status, data = post(f"{url}/generate", body, timeout_s)
    if status != 200:
        return Answer([], [], 0, status=status, error=f"{status} {data}")
    meta = data["meta_info"]
    finish = meta.get("finish_reason") or {}
    error = str(finish.get("message")) if finish.get("type") == "abort" else None
    return Answer(
        tokens=data["output_ids"],
        logprobs=[item[0] for item in meta.get("output_token_logprobs") or []],
        cached_tokens=int(meta.get("cached_tokens") or 0),
        finish=finish,
        error=error,
    )


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode server."""

    prefill_url: str
    decode_url: str
    bootstrap_host: str
    bootstrap_port: int

    def generate(
        self, prompt: Sequence[int], output_tokens: int, room: int | None = None, **more: Any
    ) -> tuple[Answer, Answer]:
        """One request to both at once: (prefill's answer, decode's answer), the second being the answer."""
        fields = {
            "bootstrap_host": self.bootstrap_host,
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": new_room() if room is None else room,
            **more,
        }
        answers: dict[str, Answer] = {}

        def ask(side: str, url: str) -> None:
            answers[side] = generate(url, prompt, output_tokens, **fields)

        sides = (("prefill", self.prefill_url), ("decode", self.decode_url))
        threads = [threading.Thread(target=ask, args=side) for side in sides]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers["prefill"], answers["decode"]


def post(url: str, body: Mapping[str, Any], timeout_s: float = 30.0) -> tuple[int, Any]:
    """Status and JSON (or text). 0 when there was no answer; the text says why."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return _read(request, timeout_s)


def get(url: str, timeout_s: float = 30.0) -> tuple[int, Any]:
    return _read(urllib.request.Request(url), timeout_s)


def _read(request: urllib.request.Request, timeout_s: float) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            status, text = error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def loads(url: str) -> Mapping[str, Any]:
    """The server's own word on its queues and pool (of its first rank)."""
    status, data = get(f"{url}/v1/loads?include=core,disagg,queues")
    if status != 200:
        raise ConnectionError(f"{url}/v1/loads: {status} {data}")
    ranks = data["loads"] if isinstance(data, dict) else data
    return dict(ranks[0])
