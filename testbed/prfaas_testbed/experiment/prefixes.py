"""What the router's prefix index promises, beside what a real prefill server then reuses, while its cache
overflows.

A prefill server with a small pool, which tells what it caches; a decode server; the router before them, as a
process of its own. Conversations of many turns, each turn bringing all before it, a few under way at a time
in an order of chance. Predictions and what came of them are the router's own record; that blocks were evicted
meanwhile is heard from the server itself.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import aiohttp
import zmq

from prfaas.model.errors import PrfaasError
from prfaas.routing.kv_events import BlockRemoved, decode_batch
from prfaas_testbed.experiment.fleet import K_MODELS_DIR
from prfaas_testbed.experiment.profiling import K_HOST, free_ports
from prfaas_testbed.experiment.servers import Program
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.instances.models import TinyModel
from prfaas_testbed.instances.sglang_client import prompt_of
from prfaas_testbed.instances.sglang_server import K_SAME_CHUNKS, ServerSpec, SglangServer

K_POOL_TOKENS = 16_000
K_STATES = 64
"""Slots for states of a hybrid model. What all conversations come to is three times what either holds."""
K_CONVERSATIONS = 30
K_TURNS = 14
K_TALKING = 2
"""Conversations that have a request under way at once. What is evicted between a prediction and its prefill
can't be known: the more of a cache is under way, the more predictions fail (3 at once: one in 100)."""
K_SYSTEM_TOKENS, K_TURN_TOKENS, K_OUTPUT_TOKENS = 90, 100, 8
K_AGREE = 0.99
K_REUSED = 1 / 3
K_TIMEOUT_S = 300.0
K_LOGGED_S = 1.0
"""In which the router writes its last lines."""
K_EVENTS = "kv-events"

Progress = Callable[[str], None]


@dataclass
class Found:
    """Raw values of one model."""

    model: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """A request in the order of their ends: `conversation`, `turn`, `prompt_tokens`, `predicted` and `actual`
    cached tokens, `e2e_s`, and `evicted_blocks` so far (a token each)."""


class Evictions:
    """Counts the blocks that a server says it has dropped. Its thread ends with `close`."""

    def __init__(self, endpoint: str) -> None:
        self.blocks = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, K_EVENTS.encode())
        self._socket.connect(endpoint)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                for event in decode_batch(self._socket.recv_multipart()[2]):
                    if isinstance(event, BlockRemoved):
                        self.blocks += len(event.block_hashes)
        except zmq.ContextTerminated:
            self._socket.close(linger=0)

    def close(self) -> None:
        self._context.term()
        self._thread.join()


def measure(model: TinyModel, folder: Path, tell: Progress) -> Found:
    """Raises PrfaasError where a server dies or a request fails."""
    folder.mkdir(parents=True, exist_ok=True)
    events, replay, door, *ports, pump = free_ports(7)
    here = {"site": "west", "listen": f"{K_HOST}:{pump}", "control_socket": str(folder / "pump.sock")}
    prefill, decode = servers_of(
        model, folder, ports, (events, replay), write_json(folder / "prfaas.yaml", {"pump": here})
    )
    config = write_json(
        folder / "router.yaml",
        router_config(model, prefill.spec, decode.spec, (events, replay), door, folder),
    )
    try:
        for server in (prefill, decode):
            server.start()
        for server in (prefill, decode):
            server.wait_ready(progress=tell)
        evictions = Evictions(f"tcp://{K_HOST}:{events}")
        try:
            with router(config, folder, tell):
                rows = asyncio.run(
                    converse(f"http://{K_HOST}:{door}/generate", lambda: evictions.blocks, tell)
                )
                time.sleep(K_LOGGED_S)
        finally:
            evictions.close()
    finally:
        for server in (prefill, decode):
            server.stop()
    return Found(model.name, joined(rows, (folder / "router-events.jsonl").read_text().splitlines()))


def servers_of(
    model: TinyModel, folder: Path, ports: Sequence[int], told: tuple[int, int], backend: Path
) -> tuple[SglangServer, SglangServer]:
    """Prefill and decode, not started. `told`: prefill's ports for its events and their replay."""
    events = {
        "publisher": "zmq", "endpoint": f"tcp://*:{told[0]}", "replay_endpoint": f"tcp://*:{told[1]}",
        "topic": K_EVENTS,
    }  # fmt: skip
    states = ("--max-mamba-cache-size", str(K_STATES)) if model.state_bytes else ()
    spec = ServerSpec(
        role="prefill", model=model, model_dir=K_MODELS_DIR / model.name, host=K_HOST, port=ports[0],
        bootstrap_port=ports[2], config_path=backend, pool_tokens=K_POOL_TOKENS,
        extra_args=(*K_SAME_CHUNKS, "--kv-events-config", json.dumps(events), *states),
    )  # fmt: skip
    beside = replace(spec, role="decode", port=ports[1], extra_args=K_SAME_CHUNKS)
    return SglangServer(spec, folder / "prefill.log"), SglangServer(beside, folder / "decode.log")


def router_config(
    model: TinyModel, prefill: ServerSpec, decode: ServerSpec, told: tuple[int, int], port: int, folder: Path
) -> dict[str, Any]:
    hybrid = model.state_bytes > 0
    first = {
        "name": "west-p", "role": "prefill", "url": prefill.url, "bootstrap_port": prefill.bootstrap_port,
        "kv_events": {
            "endpoint": f"tcp://{K_HOST}:{told[0]}", "replay_endpoint": f"tcp://{K_HOST}:{told[1]}",
            "topic": K_EVENTS,
        },
        "states_limit": K_STATES if hybrid else None,
    }  # fmt: skip
    second = {"name": "west-d", "role": "decode", "url": decode.url}
    return {
        "listen": {"host": K_HOST, "port": port},
        "models": [
            {
                "name": model.name,
                "tokenizer": str(prefill.model_dir),
                "layers": "hybrid" if hybrid else "dense",
            }
        ],
        "sites": [{"name": "west", "servers": [first, second]}],
        "retry": {"first_token_min_s": 60, "total_s": 240},
        "loads": {"timeout_s": 10.0},
        "logs": {"events": str(folder / "router-events.jsonl")},
    }


@contextmanager
def router(config: Path, folder: Path, tell: Progress) -> Iterator[None]:
    """`prfaas router` while inside."""

    def popen(words: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(list(words), stdin=subprocess.DEVNULL, start_new_session=True, **options)

    here: Any = SimpleNamespace(popen=popen)
    process = Program(
        "router", here, "prfaas.cli.main", config, folder / "router.log", "listening on", ["router"]
    )
    try:
        process.start()
        process.wait_ready(tell)
        yield
        process.check_alive()
    finally:
        process.stop()


async def converse(url: str, evicted_blocks: Callable[[], int], tell: Progress) -> list[dict[str, Any]]:
    """All turns; a row each, with the id that the router gave it."""
    rng = Random(7)
    system = prompt_of(K_SYSTEM_TOKENS, 1)
    said = [list(system) for _ in range(K_CONVERSATIONS)]
    turns = [place for place in range(K_CONVERSATIONS) for _ in range(K_TURNS)]
    rng.shuffle(turns)
    total, busy, had = 1 + len(turns), set[int](), [0] * K_CONVERSATIONS
    rows: list[dict[str, Any]] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=K_TIMEOUT_S)) as session:

        async def ask(conversation: int | None, prompt: list[int]) -> list[int]:
            sampling = {"temperature": 0, "max_new_tokens": K_OUTPUT_TOKENS, "ignore_eos": True}
            body, began_s = {"input_ids": prompt, "sampling_params": sampling}, time.monotonic()
            async with session.post(url, json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    raise PrfaasError(f"a request failed: {response.status} {str(answer)[:300]}")
                rows.append(
                    {
                        "request": response.headers["x-prfaas-request-id"],
                        "conversation": conversation,
                        "turn": 0 if conversation is None else had[conversation],
                        "prompt_tokens": len(prompt),
                        "e2e_s": round(time.monotonic() - began_s, 3),
                        "evicted_blocks": evicted_blocks(),
                    }
                )
            if len(rows) % 100 == 0:
                tell(f"{len(rows)} of {total} requests, {rows[-1]['evicted_blocks']} blocks evicted")
            found: list[int] = answer["output_ids"]
            return found

        async def talk() -> None:
            while (place := next((one for one in turns if one not in busy), None)) is not None:
                turns.remove(place)
                busy.add(place)
                had[place] += 1
                said[place] += prompt_of(rng.randrange(2, 2 * K_TURN_TOKENS), rng.getrandbits(30))
                said[place] += await ask(place, said[place])
                busy.discard(place)

        # Nobody can know what a prompt under way will have left, so the system's own comes alone.
        await ask(None, system)
        await asyncio.gather(*(talk() for _ in range(K_TALKING)))
    return rows


def joined(rows: Sequence[dict[str, Any]], log: Sequence[str]) -> list[dict[str, Any]]:
    """Each row with what the router predicted for it, and what its prefill server then said."""
    outcomes = {row["request"]: row for row in map(json.loads, log) if row.get("event") == "outcome"}
    found = []
    for row in rows:
        outcome = outcomes.get(row["request"], {})
        told = {
            "predicted": outcome.get("predicted_cached_tokens"),
            "actual": outcome.get("cached_tokens"),
            "attempts": outcome.get("attempts"),
        }
        found.append({name: value for name, value in row.items() if name != "request"} | told)
    return found


def checks(founds: Sequence[Found]) -> list[dict[str, Any]]:
    """Rows of name, outcome, value, wanted."""
    judged: list[dict[str, Any]] = []

    def judge(name: str, passed: bool, value: float, wanted: float) -> None:
        outcome = "passed" if passed else "failed"
        judged.append(
            {"name": name, "outcome": outcome, "value": round(value, 4), "wanted": round(wanted, 4)}
        )

    for found in founds:
        wanted = 1 + K_CONVERSATIONS * K_TURNS
        told = [row for row in found.rows if row["predicted"] is not None and row["actual"] is not None]
        judge(f"{found.model}/told", len(told) == wanted, len(told), wanted)
        agree = sum(row["predicted"] == row["actual"] for row in told) / wanted
        judge(f"{found.model}/agree_share", agree >= K_AGREE, agree, K_AGREE)
        # Without these two the agreement would be worth nothing.
        reused = sum(row["actual"] > 0 for row in told) / wanted
        judge(f"{found.model}/reused_share", reused >= K_REUSED, reused, K_REUSED)
        evicted = max((row["evicted_blocks"] for row in found.rows), default=0)
        judge(f"{found.model}/evicted_blocks", evicted >= K_POOL_TOKENS, evicted, K_POOL_TOKENS)
    return judged
