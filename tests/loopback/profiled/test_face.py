"""Profiled prefill and decode over real HTTP, with the bytes moved inside the process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from prfaas.model.profiles import Curve, DecodeProfile, Profile, RoleSwitch
from prfaas_testbed.client.load import Load
from prfaas_testbed.client.messages import Answer, Shot, Target
from prfaas_testbed.instances.profiled.face import application
from prfaas_testbed.instances.profiled.instance import Instance
from prfaas_testbed.instances.profiled.mover import Moved, MoveFailed
from prfaas_testbed.instances.profiled.peers import HttpPeers
from prfaas_testbed.instances.profiled.settings import Settings

PROFILE = Profile(
    name="t",
    prefill=Curve.of([100, 1000], [0.01, 0.1]),
    kv=Curve.of([1, 1000], [5000 + 100, 5000 + 100_000]),
    state_bytes=5000,
    decode=DecodeProfile.constant(0.001, 8),
    block_tokens=16,
    chunk_tokens=256,
    pool_tokens=20_000,
    role_switch=RoleSwitch(to_prefill_s=30.0, to_decode_s=0.2),
)


class Within:
    """Both ends of a transfer in one process."""

    def __init__(self) -> None:
        self.leases: dict[str, bytearray] = {}
        self.sources: dict[int, bytearray] = {}
        self.done: dict[int, bool] = {}
        self.broken = False

    async def memory(self, room: int, size_bytes: int) -> memoryview:
        self.sources[room] = bytearray(size_bytes)
        return memoryview(self.sources[room])

    async def send(
        self,
        room: int,
        grant: str,
        offset: int,
        skip_bytes: int,
        size_bytes: int,
        last: bool,
        timeout_s: float,
    ) -> Moved:
        if self.broken:
            raise MoveFailed("the link is down")
        data = self.sources[room][offset : offset + size_bytes]
        await asyncio.sleep(0.005)
        self.leases[grant][offset - skip_bytes : offset - skip_bytes + size_bytes] = data
        if last:
            self.done[int(grant)] = True
        return Moved(size_bytes)

    async def landed(self, room: int, timeout_s: float) -> None:
        for _ in range(200):
            if self.done.get(room):
                return
            await asyncio.sleep(0.005)
        raise MoveFailed("nothing came")

    async def forget(self, room: int) -> None:
        self.sources.pop(room, None)

    async def lease(self, room: int, size_bytes: int, timeout_s: float) -> tuple[str, memoryview]:
        self.leases[str(room)] = bytearray(b"\xa5" * size_bytes)
        return str(room), memoryview(self.leases[str(room)])

    async def release(self, room: int) -> None:
        self.leases.pop(str(room), None)


class Cluster:
    """A prefill, a decode and a plain instance on free ports."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.extra, self.mover = folder, settings, Within()
        self.ports: dict[str, int] = {}
        self.instances: dict[str, Instance] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Cluster:
        self.session = await self._stack.enter_async_context(aiohttp.ClientSession())
        for role in ("prefill", "decode", "collocated"):
            log = self.folder / f"{role}.jsonl"
            settings = Settings.model_validate(
                {"name": role, "role": role, "host": "127.0.0.1", "port": 1, "model": "m", "profile": "t",
                 "transfers_log": log, "transfer_timeout_s": 5, **self.extra}
            )  # fmt: skip
            instance = Instance(settings, PROFILE, HttpPeers(self.session), self.mover, self.mover)
            runner = web.AppRunner(application(instance), handler_cancellation=True, access_log=None)
            await runner.setup()
            self._stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            instance.settings = settings.model_copy(update={"port": port})
            task = asyncio.create_task(instance.run())
            self._stack.push_async_callback(_end, task)
            self.instances[role], self.ports[role] = instance, port
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def url(self, role: str, path: str = "/generate") -> str:
        return f"http://127.0.0.1:{self.ports[role]}{path}"

    def shot(self, room: int, tokens: list[int], **body: Any) -> Shot:
        whole = {
            "input_ids": tokens, "sampling_params": {"max_new_tokens": 5}, "stream": True, "rid": f"r{room}",
            "bootstrap_host": "127.0.0.1", "bootstrap_port": self.ports["prefill"], "bootstrap_room": room,
            **body,
        }  # fmt: skip
        targets = (Target(self.url("prefill"), answers=False), Target(self.url("decode"), answers=True))
        return Shot(str(room), 0.0, whole, targets, timeout_s=5)

    async def send(self, shots: list[Shot]) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        await Load(shots, lambda answer: answers.__setitem__(answer.id, answer)).run(time.monotonic())
        return answers

    async def plain(self, tokens: list[int]) -> list[int]:
        body = {"input_ids": tokens, "sampling_params": {"max_new_tokens": 5}}
        async with self.session.post(self.url("collocated"), json=body) as response:
            ids: list[int] = (await response.json())["output_ids"]
            return ids

    def log(self, role: str) -> dict[int, dict[str, Any]]:
        lines = (self.folder / f"{role}.jsonl").read_text().splitlines()
        return {row["room"]: row for row in map(json.loads, lines)}


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def play(folder: Path, scene: Callable[[Cluster], Awaitable[None]], **settings: Any) -> None:
    async def whole() -> None:
        async with Cluster(folder, **settings) as cluster:
            await scene(cluster)
            for instance in cluster.instances.values():
                assert instance.scheduler.idle
                assert instance.scheduler.reserved_tokens == 0

    asyncio.run(whole())


def test_eight_at_once_answer_as_the_plain_instance_and_their_bytes_agree(tmp_path: Path) -> None:
    async def scene(cluster: Cluster) -> None:
        prompts = {room: [room] * (50 + 90 * room) for room in range(1, 9)}
        answers = await cluster.send([cluster.shot(room, tokens) for room, tokens in prompts.items()])
        source, landed = cluster.log("prefill"), cluster.log("decode")
        for room, tokens in prompts.items():
            answer = answers[str(room)]
            assert answer.error is None
            assert answer.output_ids == await cluster.plain(tokens)
            assert source[room]["digest"] == landed[room]["digest"]
            assert source[room]["bytes"] == PROFILE.kv_bytes(len(tokens))
            assert answer.ttft_s is not None

    play(tmp_path, scene)


def test_zeroed_bytes_change_digest_and_tokens_from_the_second_on(tmp_path: Path) -> None:
    async def scene(cluster: Cluster) -> None:
        tokens = list(range(300))
        answer = (await cluster.send([cluster.shot(1, tokens)]))["1"]
        right = await cluster.plain(tokens)
        assert answer.output_ids[0] == right[0]
        assert answer.output_ids[1:] != right[1:]
        assert cluster.log("prefill")[1]["digest"] != cluster.log("decode")[1]["digest"]

    play(tmp_path, scene, fault="zero_kv")
    play(tmp_path, scene, fault="drop_page")


def test_a_dead_link_is_an_error_for_both_and_frees_both(tmp_path: Path) -> None:
    async def scene(cluster: Cluster) -> None:
        cluster.mover.broken = True
        answer = (await cluster.send([cluster.shot(1, [1] * 100)]))["1"]
        assert answer.error is not None
        assert "the link is down" in answer.error
        assert not cluster.mover.leases
        assert not cluster.mover.sources
        cluster.mover.broken = False
        assert (await cluster.send([cluster.shot(2, [1] * 100)]))["2"].error is None

    play(tmp_path, scene)


def test_a_client_that_leaves_frees_everything(tmp_path: Path) -> None:
    async def scene(cluster: Cluster) -> None:
        shot = cluster.shot(1, [1] * 1000)
        body = {**shot.body, "sampling_params": {"max_new_tokens": 5000}}
        posts = [asyncio.create_task(cluster.session.post(target.url, json=body)) for target in shot.targets]
        response = await posts[1]
        await response.content.readany()
        response.close()
        (await posts[0]).close()
        for _ in range(500):
            if cluster.instances["decode"].scheduler.idle:
                break
            await asyncio.sleep(0.01)

    play(tmp_path, scene)


def test_an_abort_ends_the_request_with_an_error(tmp_path: Path) -> None:
    async def scene(cluster: Cluster) -> None:
        body = {"input_ids": [1] * 10, "sampling_params": {"max_new_tokens": 10000}, "rid": "long"}
        post = asyncio.create_task(cluster.session.post(cluster.url("collocated"), json=body))
        for _ in range(500):
            if not cluster.instances["collocated"].scheduler.idle:
                break
            await asyncio.sleep(0.01)
        async with cluster.session.post(
            cluster.url("collocated", "/abort_request"), json={"rid": "long"}
        ) as reply:
            assert (await reply.json())["aborted"] == 1
        async with await post as response:
            assert response.status == 500
            assert "aborted" in await response.text()

    play(tmp_path, scene)


def test_the_cache_is_flushed_when_no_request_is_under_way_and_not_before(tmp_path: Path) -> None:
    async def scene(cluster: Cluster) -> None:
        async def flushed() -> int:
            async with cluster.session.post(cluster.url("collocated", "/flush_cache")) as reply:
                return reply.status

        scheduler = cluster.instances["collocated"].scheduler
        body = {"input_ids": [1] * 64, "sampling_params": {"max_new_tokens": 300}}
        post = asyncio.create_task(cluster.session.post(cluster.url("collocated"), json=body))
        await until(lambda: not scheduler.idle)
        assert await flushed() == 400
        async with await post as response:
            assert response.status == 200
        assert scheduler.cache.used_tokens > 0
        assert await flushed() == 200
        assert scheduler.cache.used_tokens == 0

    play(tmp_path, scene)


def test_openai_endpoints_stream_pieces_and_usage(tmp_path: Path) -> None:
    async def scene(cluster: Cluster) -> None:
        for path, prompt in (
            ("/v1/completions", {"prompt": "hello there"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ):
            body = {
                "model": "m",
                "max_tokens": 4,
                "stream": True,
                "stream_options": {"include_usage": True},
                **prompt,
            }
            shot = Shot("a", 0, body, (Target(cluster.url("collocated", path), answers=True),), 5)
            answer = (await cluster.send([shot]))["a"]
            assert answer.error is None
            assert answer.text_bytes > 8
            async with cluster.session.post(
                cluster.url("collocated", path), json={**body, "stream": False}
            ) as reply:
                assert (await reply.json())["usage"]["completion_tokens"] == 4

    play(tmp_path, scene)


async def until(so: Callable[[], bool]) -> None:
    for _ in range(2000):
        if so():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never became so")


def test_an_instance_that_changes_its_role_refuses_what_comes_meanwhile(tmp_path: Path) -> None:
    async def scene(cluster: Cluster) -> None:
        async def switch(role: str) -> aiohttp.ClientResponse:
            url = cluster.url("decode", "/pd_role_switch")
            return await cluster.session.post(url, json={"new_role": role})

        changing = asyncio.ensure_future(switch("prefill"))
        instance = cluster.instances["decode"]
        await until(lambda: instance._switching)
        body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}, "bootstrap_room": 1}
        async with cluster.session.post(cluster.url("decode"), json=body) as reply:
            assert reply.status == 503
        async with await switch("decode") as reply:
            assert reply.status == 400
            assert "not idle" in (await reply.json())["error"]["message"]
        assert instance.scheduler.role == "decode"
        changing.cancel()
        await asyncio.gather(changing, return_exceptions=True)
        await until(lambda: not instance._switching)  # who asked has left: it stays what it is
        assert instance.scheduler.role == "decode"

    play(tmp_path, scene)


def test_loads_role_switch_and_bad_bodies(tmp_path: Path) -> None:
    async def scene(cluster: Cluster) -> None:
        async with cluster.session.get(cluster.url("prefill", "/v1/loads")) as reply:
            load = (await reply.json())["loads"][0]
            assert load["num_waiting_uncached_tokens"] == 0
            assert load["max_total_num_tokens"] == 20_000
        async with cluster.session.get(cluster.url("prefill", "/server_info")) as reply:
            steps = cluster.instances["prefill"].scheduler.chunk_tokens
            assert (await reply.json())["chunked_prefill_size"] == steps
        began_s = time.monotonic()
        async with cluster.session.post(
            cluster.url("prefill", "/pd_role_switch"), json={"new_role": "decode"}
        ) as reply:
            assert reply.status == 200
            assert (await reply.json())["seconds"] >= 0.2
        assert time.monotonic() - began_s >= 0.2, "it takes the profile's time"
        assert cluster.instances["prefill"].scheduler.role == "decode"
        for body in ([], {"input_ids": []}, {"input_ids": ["x"]}, {"input_ids": [1]}):
            async with cluster.session.post(cluster.url("decode"), json=body) as reply:
                assert reply.status == 400
                assert "message" in (await reply.json())["error"]

    play(tmp_path, scene)
