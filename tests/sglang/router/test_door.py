"""The front door before real SGLang servers: prefill in `east`, prefill and decode in `west`.

Long prompts go east, short ones stay, tokens are the plain server's; `east` may die in mid-load.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest

from prfaas.config.loading import check
from prfaas.config.pump import PumpConfig
from prfaas.config.router import RouterConfig
from prfaas.model.transfer import LeaseGrant, TransferKind
from prfaas.pump_client import LocalPumpClient, Transfer
from prfaas.router.outcome import Outcome
from prfaas.router.service import Router
from prfaas_testbed.instances.sglang_client import generate, loads, new_room, prompt_of
from prfaas_testbed.instances.sglang_server import (
    SglangServer,
    build_environment,
    sglang_python,
)

K_HOST = "127.0.0.1"
K_THRESHOLD = 300
K_LONG, K_SHORT = 700, 60  # tokens
K_OUTPUT = 12


@dataclass
class Sites:
    """The router's configuration over running servers, and the one in east."""

    config: dict[str, Any]
    east: SglangServer
    servers: Any
    pump: PumpConfig
    """East's, which keeps the ledger of the link to the others."""


@pytest.fixture(scope="module")
def sites(servers: Any) -> Sites:
    east = servers.east.server
    west: dict[str, Any] = {
        "name": "west",
        "cost": {"prefill_tokens_per_s": 3000},
        "servers": [
            {
                "name": "west-p",
                "role": "prefill",
                "url": servers.prefill.url,
                "bootstrap_port": servers.pair.bootstrap_port,
                "prefixes": servers.prefixes,
            },
            {"name": "west-d", "role": "decode", "url": servers.decode.url},
        ],
    }
    far: dict[str, Any] = {
        "name": "east",
        "cost": {"prefill_tokens_per_s": 3000},
        "servers": [
            {
                "name": "east-p",
                "role": "prefill",
                "url": east.url,
                "bootstrap_port": east.spec.bootstrap_port,
                "kv_events": servers.east.events,
                "prefixes": servers.east.prefixes,
            }
        ],
    }
    config = {
        "listen": {"port": 0},
        "models": [
            {
                "name": "tiny",
                "tokenizer": str(east.spec.model_dir),
                "layers": "dense" if servers.model.name == "dense" else "hybrid",
            }
        ],
        "sites": [west, far],
        "links": [{"source": "east", "target": "west", "rate_mbps": 10000, "rtt_ms": 1}],
        "policy": {"name": "paper", "threshold_tokens": K_THRESHOLD, "regime": "scarce"},
        "movable": True,
        "retry": {"first_token_min_s": 60, "total_s": 240},
        "loads": {"timeout_s": 10.0},
    }
    return Sites(config, east, servers, check(servers.east.pump, PumpConfig, "test"))


@pytest.fixture
def door(sites: Sites) -> Any:
    """`async with door() as (router, url, session)`."""

    class Door:
        async def __aenter__(self) -> tuple[Router, str, aiohttp.ClientSession]:
            self.router = Router(check(sites.config, RouterConfig, "test"))
            host, port = await self.router.start()
            self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300))
            return self.router, f"http://{host}:{port}", self.session

        async def __aexit__(self, *_: object) -> None:
            await self.session.close()
            await self.router.stop()

    return Door


def body(prompt: list[int], **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": K_OUTPUT, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, **more}


def streamed_tokens(text: str) -> list[int]:
    """Of /generate's stream, whose chunks may hold all tokens so far, or only the new ones."""
    chunks = [json.loads(event[6:]) for event in text.split("\n\n") if event and "[DONE]" not in event]
    assert all("error" not in chunk for chunk in chunks), text[-500:]
    last: list[int] = chunks[-1]["output_ids"]
    if len(last) == K_OUTPUT:
        return last
    return [token for chunk in chunks for token in chunk["output_ids"]]


def test_long_prompts_go_east_short_stay_and_tokens_are_the_plain_servers(sites: Sites, door: Any) -> None:
    prompts = {"east": prompt_of(K_LONG, 41), "west": prompt_of(K_SHORT, 42)}
    wanted = {
        site: generate(sites.servers.plain.url, prompt, K_OUTPUT).tokens for site, prompt in prompts.items()
    }

    async def main() -> None:
        async with door() as (router, url, session):
            for site, prompt in prompts.items():
                async with session.post(url + "/generate", json=body(prompt)) as response:
                    answer = await response.json()
                    assert response.status == 200, answer
                    assert response.headers["x-prfaas-site"] == site
                    assert answer["output_ids"] == wanted[site]
                async with session.post(url + "/generate", json=body(prompt, stream=True)) as response:
                    assert streamed_tokens(await response.text()) == wanted[site]
            for handle in router.servers:
                async with session.get(handle.url + "/server_info") as response:
                    told = (await response.json())["chunked_prefill_size"]
                assert handle.chunk_tokens == told > 0, "the size of its steps, which it was asked for"
            metrics = router.metrics.registry
            assert (
                metrics.get_sample_value(
                    "prfaas_router_attempts_failed_total",
                    {"site": "east", "side": "prefill", "kind": "server"},
                )
                is None
            )

    asyncio.run(main())


def test_the_official_client_and_the_servers_count_the_same_prompt_tokens(door: Any) -> None:
    async def main() -> None:
        async with (
            door() as (router, url, _),
            openai.AsyncOpenAI(base_url=url + "/v1", api_key="x") as client,
        ):
            text = "the quick brown fox word1 token2 " * 8
            messages: Any = [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": text}]},
                {"role": "assistant", "content": "why?"},
                {"role": "user", "content": "because"},
            ]
            extra: Any = {"ignore_eos": True}
            answer = await client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=6, temperature=0, extra_body=extra
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == router.scheduler.records[-1].prompt_tokens
            stream = await client.chat.completions.create(
                model="tiny",
                messages=messages,
                max_tokens=6,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            )
            parts = [chunk async for chunk in stream]
            said = "".join(chunk.choices[0].delta.content or "" for chunk in parts if chunk.choices)
            assert said == answer.choices[0].message.content
            assert parts[-1].usage is not None
            done = await client.completions.create(model="tiny", prompt=text, max_tokens=4, extra_body=extra)
            assert done.usage is not None
            assert done.usage.prompt_tokens == router.scheduler.records[-1].prompt_tokens
            began = time.monotonic()
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model="tiny", messages=messages, temperature=-3)
            assert time.monotonic() - began < 20
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="tiny", prompt=[5] * 20000, max_tokens=4)
            assert all(handle.in_flight == 0 for handle in router.servers)

    asyncio.run(main())


def test_predicted_prefixes_are_what_prefill_reports(sites: Sites, door: Any) -> None:
    async def main() -> None:
        async with door() as (router, url, session):
            said: list[tuple[int | None, int | None]] = []
            router.door._on_outcome = lambda outcome: said.append(
                (outcome.predicted_cached_tokens, outcome.cached_tokens)
            )
            prompt = prompt_of(K_LONG, 43)
            for turn in range(4):
                async with session.post(url + "/generate", json=body(prompt)) as response:
                    answer = await response.json()
                    assert response.headers["x-prfaas-site"] == "east"
                # The next turn: all of this one, its answer, and something new.
                prompt = prompt + answer["output_ids"] + prompt_of(K_LONG, 50 + turn)
                await asyncio.sleep(0.3)
            assert all(predicted == actual for predicted, actual in said), said
            assert said[0][0] == 0
            assert said[3][0] > 2 * K_LONG

    asyncio.run(main())


def test_a_prefix_that_only_east_holds_is_brought_to_west_and_reused_to_the_token(
    sites: Sites, door: Any
) -> None:
    first = prompt_of(K_LONG, 47)
    second, third = first + prompt_of(K_SHORT, 48), first + prompt_of(K_SHORT, 49)
    wanted = [generate(sites.servers.plain.url, prompt, K_OUTPUT).tokens for prompt in (first, second, third)]
    sites.config["policy"]["regime"] = "abundant"

    def sent_bytes() -> int:
        """Of KV and states, that east's pump sent."""
        with LocalPumpClient.open(sites.pump, name="test", start=False) as client:
            peers: Any = client.stats()["peers"]
            return sum(peer["payload_bytes_sent"] for peer in peers)

    async def main() -> None:
        async with door() as (router, url, session):
            outcomes: list[Outcome] = []
            router.door._on_outcome = outcomes.append

            async def ask(prompt: list[int]) -> list[int]:
                async with session.post(url + "/generate", json=body(prompt)) as response:
                    answer = await response.json()
                    assert response.status == 200, answer
                    tokens: list[int] = answer["output_ids"]
                    return tokens

            assert await ask(first) == wanted[0]
            await asyncio.sleep(1.0)  # until what it says of its cache is here
            before = await asyncio.to_thread(sent_bytes)
            assert await ask(second) == wanted[1]
            moved = await asyncio.to_thread(sent_bytes) - before
            model = sites.servers.model
            assert moved == K_LONG * model.kv_bytes_per_token + model.state_bytes
            assert await ask(third) == wanted[2]
            found = [(one.site, one.moved_tokens, one.cached_tokens) for one in outcomes]
            # The third finds it in west: nothing crosses for it.
            assert found == [("east", 0, 0), ("west", K_LONG, K_LONG), ("west", 0, K_LONG)]
            assert await asyncio.to_thread(sent_bytes) - before == moved

    try:
        asyncio.run(main())
    finally:
        sites.config["policy"]["regime"] = "scarce"


# Of the router alone, whatever the model.
@pytest.mark.parametrize("servers", ["dense"], indirect=True)
def test_sglangs_own_benchmark_works_against_it_unchanged(sites: Sites, door: Any, tmp_path: Path) -> None:
    model = str(sites.config["models"][0]["tokenizer"])

    async def main() -> None:
        async with door() as (router, url, _):
            sizes = ("--random-input-len", "64", "--random-output-len", "4", "--random-range-ratio", "1.0")
            process = await asyncio.create_subprocess_exec(
                *(str(sglang_python()), "-m", "sglang.benchmark.serving", "--backend", "sglang"),
                *("--host", K_HOST, "--port", url.rpartition(":")[2], "--dataset-name", "random-ids", *sizes),
                *("--num-prompts", "8", "--request-rate", "4", "--tokenizer", model, "--model", model),
                *("--output-file", str(tmp_path / "benchmark.jsonl")),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=build_environment(sites.east.spec, os.environ),
            )
            try:
                output, _ = await asyncio.wait_for(process.communicate(), 240)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            text = output.decode()
            assert process.returncode == 0, text[-2000:]
            (line,) = [line for line in text.splitlines() if line.startswith("Successful requests:")]
            assert line.split()[-1] == "8", text[-2000:]
            assert len(router.scheduler.records) >= 8

    asyncio.run(main())


def eventually(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    end_s = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < end_s:
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def link_down(sites: Sites) -> Iterator[None]:
    """East's link, silent: bytes wait for a peer whose kernel answers nothing, its queue of connections full.

    Up again with the first word from a pump that lives.
    """
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.create_server((K_HOST, 0), backlog=0))
        for _ in range(4):
            one = held.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        client = held.enter_context(LocalPumpClient.open(sites.pump, name="test", start=False))

        def is_up() -> bool:
            links: Any = client.stats()["links"]
            return bool(links[0]["estimate"]["up"])

        memory = np.zeros(4096, dtype=np.uint8)
        client.register([(memory.ctypes.data, memory.size)])

        def submit(address: str) -> Transfer:
            grant = LeaseGrant(address, 1, b"t" * 16, 1, 1, 1 << 20, "test")
            row = [memory.ctypes.data], [memory.ctypes.data], [memory.size]
            return client.submit(grant, *row, kind=TransferKind.KV, deadline_s=300)

        stuck = submit("{}:{}".format(*listener.getsockname()))
        assert eventually(lambda: not is_up())
        yield
        client.cancel(stuck)
        west = {"site": "test", "control_socket": str(sites.servers.verify.parent / "pump.sock")}
        with LocalPumpClient.open(check(west, PumpConfig, "test"), start=False) as other:
            outcome = submit(other.address).wait(30.0)
        assert outcome is not None
        assert outcome.reason == "lease_unknown"
        assert eventually(is_up)


def test_refused_by_the_link_is_503_with_retry_after_on_both_sides_before_any_stream(sites: Sites) -> None:
    prompt = prompt_of(K_LONG, 44)
    west = sites.servers.decode.url
    used = loads(west)["num_used_tokens"]

    async def ask(session: aiohttp.ClientSession, path: str, asked: dict[str, Any]) -> None:
        fields = {
            "bootstrap_host": sites.east.spec.host,
            "bootstrap_port": sites.east.spec.bootstrap_port,
            "bootstrap_room": new_room(),
        }

        async def one(url: str) -> None:
            async with session.post(url + path, json=asked | fields) as response:
                answer = await response.json()
                assert response.status == 503, answer
                error = answer["error"]
                assert int(response.headers["Retry-After"]) >= 1
                assert response.headers["Content-Type"] == "application/json"
                assert error["code"] == "prfaas_refused"
                assert "link to test: link-down" in error["message"]

        await asyncio.gather(one(west), one(sites.east.spec.url))

    async def main() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            text = {"model": "tiny", "max_tokens": 4, "temperature": 0}
            for stream in (False, True):
                await ask(session, "/generate", body(prompt, stream=stream))
                await ask(session, "/v1/completions", text | {"prompt": prompt, "stream": stream})
                messages = [{"role": "user", "content": "why " * 40}]
                await ask(session, "/v1/chat/completions", text | {"messages": messages, "stream": stream})

    with link_down(sites), LocalPumpClient.open(sites.pump, name="look", start=False) as client:
        asyncio.run(main())
        links: Any = client.stats()["links"]
        assert links[0]["refusals"]["link-down"] >= 6
        assert (links[0]["admitted"], links[0]["queued"]) == (0, 0)
        # No prompt was computed, and no page is held.
        assert eventually(lambda: loads(west)["num_used_tokens"] == used, 5.0)
        assert loads(sites.east.spec.url)["num_running_reqs"] == 0


def test_what_the_link_refuses_is_served_at_home_and_east_serves_again_when_it_is_back(
    sites: Sites, door: Any
) -> None:
    prompts = [prompt_of(K_LONG, 45), prompt_of(K_LONG, 46)]
    wanted = [generate(sites.servers.plain.url, prompt, K_OUTPUT).tokens for prompt in prompts]

    async def ask(session: aiohttp.ClientSession, url: str, place: int, stream: bool) -> tuple[str, str]:
        async with session.post(url + "/generate", json=body(prompts[place], stream=stream)) as response:
            text = await response.text()
            assert response.status == 200, text
            tokens = streamed_tokens(text) if stream else json.loads(text)["output_ids"]
            assert tokens == wanted[place]
            return response.headers["x-prfaas-site"], response.headers["x-prfaas-attempts"]

    async def main() -> None:
        async with door() as (router, url, session):
            said: list[list[str]] = []
            router.door._on_outcome = lambda outcome: said.append(outcome.failures)
            with link_down(sites):
                assert await ask(session, url, 0, stream=True) == ("west", "2"), said
            refused = [
                router.metrics.registry.get_sample_value(
                    "prfaas_router_attempts_failed_total", {"site": "east", "side": side, "kind": "refused"}
                )
                for side in ("prefill", "decode")
            ]
            assert sum(n or 0 for n in refused) == 1

        # A new door, which doesn't remember when to ask east again.
        async with door() as (_, url, session):
            assert await ask(session, url, 1, stream=False) == ("east", "1")

    asyncio.run(main())


def test_east_killed_in_mid_load_loses_no_request(sites: Sites, door: Any, tmp_path: Path) -> None:
    prompts = [prompt_of(K_LONG + place, 60 + place) for place in range(10)]
    wanted = [generate(sites.servers.plain.url, prompt, K_OUTPUT).tokens for prompt in prompts]

    async def main() -> None:
        async with door() as (router, url, session):

            async def ask(place: int) -> tuple[list[int], str, str]:
                await asyncio.sleep(0.25 * place)
                request = body(prompts[place], stream=place % 2 == 0)
                async with session.post(url + "/generate", json=request) as response:
                    text = await response.text()
                    assert response.status == 200, text
                    tokens = streamed_tokens(text) if place % 2 == 0 else json.loads(text)["output_ids"]
                    return tokens, response.headers["x-prfaas-site"], response.headers["x-prfaas-attempts"]

            running = [asyncio.ensure_future(ask(place)) for place in range(len(prompts))]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.to_thread(sites.east.stop)
            answers = await asyncio.gather(*running)
            assert [tokens for tokens, _, _ in answers] == wanted
            assert {site for _, site, _ in answers} == {"east", "west"}
            assert all(handle.in_flight == 0 for handle in router.servers)

    asyncio.run(main())
