"""A prefix that only east holds is brought to west's prefill cache before its prompt is sent there.

Two sites of profiled instances, a pump each, and the router in front.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from prfaas.config.loading import check
from prfaas.config.pump import PumpConfig
from prfaas.config.router import RouterConfig
from prfaas.model.decisions import Decision
from prfaas.model.observations import RequestView, Snapshot
from prfaas.model.profiles import Curve, DecodeProfile, Profile
from prfaas.pump_client import LocalPumpClient
from prfaas.router import moves
from prfaas.router.outcome import Outcome
from prfaas.router.service import Router
from prfaas.routing import block_hashes
from prfaas_testbed.instances.profiled.events import EventPublisher
from prfaas_testbed.instances.profiled.face import application
from prfaas_testbed.instances.profiled.instance import Instance
from prfaas_testbed.instances.profiled.peers import HttpPeers
from prfaas_testbed.instances.profiled.pumped import Pumped
from prfaas_testbed.instances.profiled.settings import Settings

K_BLOCK = 16
K_PREFIX = [1 + place % 900 for place in range(40 * K_BLOCK)]
K_REST = list(range(1000, 1050))
K_STATE_BYTES = 5000
K_FRAMES_BYTES = 3000
"""Room for what frames, grants and answers add to one transfer."""


def profile(state_bytes: int) -> Profile:
    return Profile(
        name="t",
        prefill=Curve.of([100, 1000], [0.01, 0.1]),
        kv=Curve.of([1, 1000], [state_bytes + 100, state_bytes + 100_000]),
        state_bytes=state_bytes,
        decode=DecodeProfile.constant(0.001, 8),
        block_tokens=K_BLOCK,
        chunk_tokens=256,
        pool_tokens=20_000,
    )


class ByMove:
    """The policy, but a way by which a prefix is moved is taken whenever there is one."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def decide(self, request: RequestView, snapshot: Snapshot, now: float) -> Decision:
        decision: Decision = self._inner.decide(request, snapshot, now)
        ways = [way for way in (decision.chosen, *decision.alternatives) if way is not None]
        moving = next((way for way in ways if way.cache_move is not None and way.feasible), None)
        if moving is None:
            return decision
        return replace(decision, chosen=moving, prefill_instance=None, decode_instance=None)


@dataclass
class Stage:
    router: Router
    url: str
    session: aiohttp.ClientSession
    instances: dict[str, Instance]
    outcomes: list[Outcome]
    folder: Path
    clients: dict[str, LocalPumpClient]

    async def crossed_bytes(self) -> int:
        """What the kernel says was acknowledged of all that east's pump sent: the WAN's own account."""
        stats: Any = await asyncio.to_thread(self.clients["east-p"].stats)
        return sum(stream["acked_bytes"] for peer in stats["peers"] for stream in peer["streams"])

    async def ask(self, url: str, tokens: list[int], **more: Any) -> dict[str, Any]:
        body = {"input_ids": tokens, "sampling_params": {"max_new_tokens": 5}, **more}
        async with self.session.post(url + "/generate", json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    def moved(self) -> list[dict[str, Any]]:
        """What the pumps brought into west's prefill cache."""
        path = self.folder / "west-p.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["side"] == "prefix"]

    def counted(self, outcome: str) -> float:
        labels = {"source": "east", "target": "west", "outcome": outcome}
        return self.router.metrics.registry.get_sample_value("prfaas_router_cache_moves_total", labels) or 0.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@asynccontextmanager
async def stage(folder: Path, layers: str) -> AsyncIterator[Stage]:
    shape = profile(K_STATE_BYTES if layers == "hybrid" else 0)
    servers: dict[str, list[dict[str, Any]]] = {"west": [], "east": []}
    instances: dict[str, Instance] = {}
    clients: dict[str, LocalPumpClient] = {}
    async with contextlib.AsyncExitStack() as stay:
        session = await stay.enter_async_context(aiohttp.ClientSession())
        for name, site, role in (
            ("west-p", "west", "prefill"),
            ("west-d", "west", "decode"),
            ("east-p", "east", "prefill"),
            ("plain", "", "collocated"),
        ):
            mover = None
            if site:
                config = PumpConfig.model_validate(
                    {"site": site, "control_socket": folder / f"{site}.sock", "idle_exit_s": 2}
                )
                client = await asyncio.to_thread(LocalPumpClient.open, config, name=name)
                stay.callback(client.close)
                mover = Pumped(client)
                clients[name] = client
            settings = Settings.model_validate(
                {"name": name, "role": role, "host": "127.0.0.1", "port": 1, "model": "m", "profile": "t",
                 "transfers_log": folder / f"{name}.jsonl", "transfer_timeout_s": 20}
            )  # fmt: skip
            publisher, row = None, {"name": name, "role": role}
            if role == "prefill":
                ports = free_port(), free_port()
                publisher = EventPublisher("127.0.0.1", *ports)
                stay.callback(publisher.close)
                replays = asyncio.create_task(publisher.serve_replays())
                stay.push_async_callback(_end, replays)
                told = {"endpoint": f"tcp://127.0.0.1:{ports[0]}", "topic": "kv-events"}
                row["kv_events"] = {**told, "replay_endpoint": f"tcp://127.0.0.1:{ports[1]}"}
            instance = Instance(settings, shape, HttpPeers(session), mover, mover, publisher)
            runner = web.AppRunner(application(instance), handler_cancellation=True, access_log=None)
            await runner.setup()
            stay.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port = runner.addresses[0][1]
            instance.settings = settings.model_copy(update={"port": port})
            stay.push_async_callback(_end, asyncio.create_task(instance.run()))
            instances[name] = instance
            row["url"] = f"http://127.0.0.1:{port}"
            if role == "prefill":
                row["bootstrap_port"] = port
            if site:
                servers[site].append(row)
        config = {
            "listen": {"port": 0},
            "models": [{"name": "m", "page_tokens": K_BLOCK, "layers": layers}],
            "sites": [{"name": site, "servers": rows} for site, rows in servers.items()],
            "links": [{"source": "east", "target": "west", "rate_mbps": 10000, "rtt_ms": 1}],
            "policy": {"name": "prices"},
            "movable": True,
        }
        router = Router(check(config, RouterConfig, "test"))
        host, port = await router.start()
        stay.push_async_callback(router.stop)
        router.scheduler.policy = ByMove(router.scheduler.policy)
        outcomes: list[Outcome] = []
        router.door._on_outcome = outcomes.append
        yield Stage(router, f"http://{host}:{port}", session, instances, outcomes, folder, clients)


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def fill_east(s: Stage, prefix: list[int]) -> None:
    """As after an earlier request: east's prefill cache has the prefix, and the router has heard."""
    west_d, east = s.instances["west-d"], s.instances["east-p"]
    statistics = s.router.prefixes.index.statistics
    before = statistics().holders
    room = 7 + before["east-p"]
    peer = {"bootstrap_host": "127.0.0.1", "bootstrap_port": east.settings.port, "bootstrap_room": room}
    urls = [f"http://127.0.0.1:{one.settings.port}" for one in (west_d, east)]
    asked = (s.ask(url, prefix, rid=f"fill-{room}-{place}", **peer) for place, url in enumerate(urls))
    await asyncio.gather(*asked)
    await until(lambda: statistics().holders["east-p"] == before["east-p"] + len(prefix) // K_BLOCK)
    s.router.prefixes.index.on_state("east-p", block_hashes(prefix, K_BLOCK)[-1])
    assert statistics().holders["west-p"] == before["west-p"]


@pytest.mark.parametrize("layers", ["dense", "hybrid"])
def test_wests_prefill_reuses_exactly_what_was_brought_from_east(tmp_path: Path, layers: str) -> None:
    async def main() -> None:
        async with stage(tmp_path, layers) as s:
            await fill_east(s, K_PREFIX)
            plain = f"http://127.0.0.1:{s.instances['plain'].settings.port}"
            prompt = K_PREFIX + K_REST
            wanted = (await s.ask(plain, prompt))["output_ids"]
            before = await s.crossed_bytes()
            assert (await s.ask(s.url, prompt))["output_ids"] == wanted
            crossed = await s.crossed_bytes() - before
            await until(lambda: s.outcomes)
            (outcome,) = s.outcomes
            assert outcome.site == "west"
            assert outcome.cached_tokens == outcome.predicted_cached_tokens == len(K_PREFIX)
            shape = s.instances["west-p"].profile
            kv_and_state = shape.kv_bytes(len(K_PREFIX))
            assert [row["bytes"] for row in s.moved()] == [kv_and_state]
            assert kv_and_state <= crossed <= kv_and_state * 1.02 + K_FRAMES_BYTES
            assert s.counted("done") == 1
            # And it is there to stay: the next prompt finds it without a move.
            other = [*K_PREFIX, *range(2000, 2040)]
            wanted = (await s.ask(plain, other))["output_ids"]
            assert (await s.ask(s.url, other))["output_ids"] == wanted
            await until(lambda: len(s.outcomes) == 2)
            assert s.outcomes[1].cached_tokens == len(K_PREFIX)
            assert len(s.moved()) == 1

    asyncio.run(main())


def test_a_move_that_fails_costs_the_request_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with stage(tmp_path, "dense") as s:
            east, west = s.instances["east-p"], s.instances["west-p"]
            plain = f"http://127.0.0.1:{s.instances['plain'].settings.port}"

            async def zeroed() -> None:
                east.settings = east.settings.model_copy(update={"fault": "zero_kv"})

            async def no_room() -> None:
                east.settings = east.settings.model_copy(update={"fault": None})
                monkeypatch.setattr(west.scheduler, "take_in", lambda tokens: False)

            async def not_known() -> None:
                monkeypatch.setattr(moves, "K_TAKE", "/nowhere")

            for place, fault in enumerate((zeroed, no_room, not_known)):
                prefix = [5000 + 1000 * place + token for token in K_PREFIX]
                await fill_east(s, prefix)
                await fault()
                wanted = (await s.ask(plain, prefix + K_REST))["output_ids"]
                assert (await s.ask(s.url, prefix + K_REST))["output_ids"] == wanted
                await until(lambda place=place: len(s.outcomes) == place + 1)
                outcome = s.outcomes[place]
                assert outcome.site == "west"
                assert outcome.cached_tokens == outcome.predicted_cached_tokens == 0
                assert s.counted("failed") == place + 1

    asyncio.run(main())
