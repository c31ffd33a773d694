"""What the prefix index promises, beside what prefill servers then reuse, while their caches overflow."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from prfaas.config.loading import check
from prfaas.config.router import RouterConfig
from prfaas.router.outcome import Outcome
from prfaas.router.service import Router
from prfaas_testbed.instances.sglang_client import prompt_of
from prfaas_testbed.instances.sglang_server import SglangServer

K_HOST = "127.0.0.1"
K_POOL_TOKENS = 16_000
K_CONVERSATIONS = 30
K_TURNS = 14
K_STATES = 64
"""Slots for states of a hybrid model. What all conversations come to is three times what either holds."""
K_TALKING = 2
"""Conversations that have a request under way at once. What is evicted between a prediction and its prefill
can't be known: the more of a cache is under way, the more predictions fail (3 at once: one in 100)."""
K_SYSTEM_TOKENS, K_TURN_TOKENS, K_OUTPUT = 90, 100, 8
K_AGREE = 0.99


@dataclass
class Site:
    config: dict[str, Any]


def published(events: int, replay: int) -> tuple[str, ...]:
    said = {
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events}",
        "replay_endpoint": f"tcp://*:{replay}",
        "topic": "kv-events",
    }
    return ("--kv-events-config", json.dumps(said))


@pytest.fixture(params=["dense", "hybrid"])
def site(request: pytest.FixtureRequest, start_own: Any, tmp_path: Path) -> Iterator[Site]:
    """Prefill with a small pool that tells what it caches, and decode."""
    events, replay, port = start_own.ports(3)
    base = start_own.spec(request.param, tmp_path / "servers", pool_tokens=K_POOL_TOKENS)
    more = published(events, replay)
    if request.param == "hybrid":
        more += ("--max-mamba-cache-size", str(K_STATES))
    prefill = SglangServer(replace(base, extra_args=(*base.extra_args, *more)), tmp_path / "prefill.log")
    decode = SglangServer(replace(base, role="decode", port=port), tmp_path / "decode.log")
    kv_events = {
        "endpoint": f"tcp://{K_HOST}:{events}",
        "replay_endpoint": f"tcp://{K_HOST}:{replay}",
        "topic": "kv-events",
    }
    west: dict[str, Any] = {
        "name": "p",
        "role": "prefill",
        "url": prefill.url,
        "bootstrap_port": base.bootstrap_port,
        "kv_events": kv_events,
        "states_limit": K_STATES if request.param == "hybrid" else None,
    }
    config = {
        "listen": {"port": 0},
        "models": [{"name": "tiny", "tokenizer": str(base.model_dir), "layers": request.param}],
        "sites": [
            {"name": "west", "servers": [west, {"name": "d", "role": "decode", "url": decode.url}]},
        ],
        "retry": {"first_token_min_s": 60, "total_s": 240},
        "loads": {"timeout_s": 10.0},
    }
    try:
        for server in (prefill, decode):
            server.start()
        for server in (prefill, decode):
            server.wait_ready()
        yield Site(config)
    finally:
        for server in (prefill, decode):
            server.stop()


@pytest.mark.timeout(900)
@pytest.mark.skipif(not os.environ.get("PRFAAS_LONG_TESTS"), reason="minutes: set PRFAAS_LONG_TESTS=1")
def test_predictions_hold_over_conversations_that_overflow_the_cache(site: Site) -> None:
    outcomes = asyncio.run(conversations(site.config))
    told = [(one.predicted_cached_tokens, one.cached_tokens) for one in outcomes if one.status == 200]
    assert len(told) == 1 + K_CONVERSATIONS * K_TURNS
    wrong = [pair for pair in told if pair[0] != pair[1]]
    share = 1 - len(wrong) / len(told)
    assert share >= K_AGREE, wrong
    logging.getLogger(__name__).info("%d of %d predictions held", len(told) - len(wrong), len(told))
    assert sum(1 for _, actual in told if actual) > len(told) / 3, "the cache was hardly used"


async def conversations(config: dict[str, Any]) -> list[Outcome]:
    """Each turn brings all before it; a few talk at once, in an order of chance."""
    router = Router(check(config, RouterConfig, "test"))
    outcomes: list[Outcome] = []
    host, port = await router.start()
    router.door._on_outcome = outcomes.append
    rng = random.Random(7)
    system = prompt_of(K_SYSTEM_TOKENS, 1)
    said = [list(system) for _ in range(K_CONVERSATIONS)]
    turns = [place for place in range(K_CONVERSATIONS) for _ in range(K_TURNS)]
    rng.shuffle(turns)
    busy: set[int] = set()
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:

            async def ask(prompt: list[int]) -> list[int]:
                sampling = {"temperature": 0, "max_new_tokens": K_OUTPUT, "ignore_eos": True}
                body = {"input_ids": prompt, "sampling_params": sampling}
                async with session.post(f"http://{host}:{port}/generate", json=body) as response:
                    answer = await response.json()
                    assert response.status == 200, answer
                    found: list[int] = answer["output_ids"]
                    return found

            async def talk() -> None:
                while turns:
                    place = next((one for one in turns if one not in busy), None)
                    if place is None:
                        return
                    turns.remove(place)
                    busy.add(place)
                    said[place] += prompt_of(rng.randrange(2, 2 * K_TURN_TOKENS), rng.getrandbits(30))
                    said[place] += await ask(said[place])
                    busy.discard(place)

            # Nobody can know what a prompt under way will have left, so the system's own comes alone.
            await ask(system)
            await asyncio.gather(*(talk() for _ in range(K_TALKING)))
    finally:
        await router.stop()
    return outcomes
