"""In-process servers that speak SGLang's protocol, sound or at fault, and a router in front of them.

They are fixtures for faults that real servers won't produce on demand. A prefill and a decode server meet by
the request's room, as real ones do by bootstrap; what they answer is the prompt's tokens counted up.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prfaas.config.loading import check
from prfaas.config.router import RouterConfig
from prfaas.router.service import Router

K_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": K_TEMPLATE})
    )
    return folder


@dataclass
class Rooms:
    """Where prefill and decode servers of one test meet."""

    ready: dict[int, asyncio.Future[None]] = field(default_factory=dict)

    def room(self, number: int) -> asyncio.Future[None]:
        return self.ready.setdefault(number, asyncio.get_running_loop().create_future())


Fault = Callable[["Fake", web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]


class Fake:
    """One server. `fault`, when set, may answer a request itself, or return None to let it be served."""

    def __init__(self, role: str, rooms: Rooms) -> None:
        self.role, self.rooms = role, rooms
        self.fault: Fault | None = None
        self.seen: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.broken_off = 0
        """Requests whose connection the router closed before the answer."""
        self.load: dict[str, Any] = {"num_running_reqs": 0, "num_waiting_reqs": 0}
        self.load_body: bytes | None = None
        self.settings: dict[str, Any] | None = None
        """What /server_info says; None: there is no such page."""
        self.settings_asked = 0
        self.tells_role = False
        """Its load tells its role, as SGLang's does."""
        self.switches: list[dict[str, Any]] = []
        self.switch_answers: list[dict[str, Any] | None] = []
        """What changes of role are answered, in order; then they succeed. None: cut, though it was done."""
        self.tokens = 5
        self.pause_s = 0.0
        self.hold = asyncio.Event()
        self.hold.set()
        """Cleared: decode waits before its second token."""
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=64 << 20)
        for path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, self._serve)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_get("/server_info", self._tell_settings)
        app.router.add_post("/pd_role_switch", self._switch)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port or self.port)
        await site.start()
        assert self._runner.addresses
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """As a kill: connections are cut, the port is closed."""
        if self._runner is None:
            return
        server = self._runner.server
        assert server is not None
        for site in list(self._runner.sites):
            await site.stop()
        for connection in server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()
        self._runner = None

    async def _loads(self, request: web.Request) -> web.Response:
        load = self.load | ({"disaggregation": {"mode": self.role}} if self.tells_role else {})
        body = self.load_body or json.dumps({"loads": [load]}).encode()
        return web.Response(body=body, content_type="application/json")

    async def _tell_settings(self, request: web.Request) -> web.Response:
        self.settings_asked += 1
        return web.Response(status=404) if self.settings is None else web.json_response(self.settings)

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def _switch(self, request: web.Request) -> web.Response:
        """SGLang's contract: 200, or 400 with a message and whether it is as it was."""
        asked = await request.json()
        self.switches.append(asked)
        answer = self.switch_answers.pop(0) if self.switch_answers else {"success": True}
        if answer is None or answer.get("success"):
            self.role = asked["new_role"]
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return web.json_response(answer, status=200 if answer.get("success") else 400)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.seen.append(body)
        try:
            if self.fault is not None:
                answer = await self.fault(self, request, body)
                if answer is not None:
                    return answer
            return await self._sound(request, body)
        except asyncio.CancelledError:
            self.broken_off += 1
            raise

    async def _sound(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        generate = request.path == "/generate"
        if self.role == "prefill":
            room = self.rooms.room(body["bootstrap_room"])
            if not room.done():
                room.set_result(None)
            return web.json_response(self.whole(generate, 1, body))
        if self.role == "decode":
            await self.rooms.room(body["bootstrap_room"])
        if self.pause_s:
            await asyncio.sleep(self.pause_s)
        if not body.get("stream"):
            return web.json_response(self.whole(generate, self.tokens, body))
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await out.prepare(request)
        for number in range(self.tokens):
            if number:
                await self.hold.wait()
            await out.write(self.event(generate, number))
        await out.write(b"data: [DONE]\n\n")
        await out.write_eof()
        return out

    def event(self, generate: bool, number: int) -> bytes:
        if generate:
            data: dict[str, Any] = {"text": f"t{number}", "meta_info": {"finish_reason": None}}
        else:
            delta = {"role": "assistant", "content": f"t{number} "}
            choice = {"index": 0, "delta": delta, "text": f"t{number} ", "finish_reason": None}
            data = {
                "id": "x",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [choice],
            }
        return b"data: " + json.dumps(data).encode() + b"\n\n"

    def whole(self, generate: bool, tokens: int, body: dict[str, Any]) -> dict[str, Any]:
        text = "".join(f"t{number} " for number in range(tokens))
        if generate:
            meta = {"finish_reason": {"type": "length"}, "cached_tokens": 0, "prompt_tokens": 3}
            return {"text": text, "meta_info": meta}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "text": text, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
        return {
            "id": body.get("rid", "x"),
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }


@dataclass
class Stand:
    """A router and its servers."""

    router: Router
    url: str
    servers: dict[str, Fake]
    session: aiohttp.ClientSession
    settings: dict[str, Any]
    """What a reload reads: change it, then reload."""

    async def post(
        self, path: str = "/v1/chat/completions", headers: dict[str, str] | None = None, **fields: Any
    ) -> tuple[int, Any, Any]:
        """Status, headers, and JSON (or the text of a stream)."""
        if path == "/v1/chat/completions":
            fields.setdefault("messages", [{"role": "user", "content": "the quick brown fox"}])
        async with self.session.post(self.url + path, json=fields, headers=headers) as response:
            text = await response.text()
            if response.content_type == "application/json":
                return response.status, response.headers, json.loads(text)
            return response.status, response.headers, text

    @staticmethod
    async def settle(condition: Callable[[], object], within_s: float = 10.0) -> None:
        """Wait until it holds."""
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, "it never came to hold"
            await asyncio.sleep(0.01)

    async def metrics(self) -> dict[str, float]:
        async with self.session.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if not line.startswith("#")
        }


K_TWO_SITES = {"west-p": "prefill", "west-d": "decode", "east-p": "prefill"}


@pytest.fixture
def stand(model_folder: Path) -> Callable[..., Any]:
    """A context manager: `async with stand(roles, **settings) as s`. Sites are the names' first part."""

    @asynccontextmanager
    async def build(
        roles: dict[str, str] | None = None, *, ordered: bool = False, **settings: Any
    ) -> AsyncIterator[Stand]:
        rooms = Rooms()
        servers: dict[str, Fake] = {}
        sites: dict[str, list[dict[str, Any]]] = {}
        for name, role in (roles or K_TWO_SITES).items():
            fake = servers[name] = Fake(role, rooms)
            await fake.start()
            server = {"name": name, "role": role, "url": f"http://127.0.0.1:{fake.port}"}
            if role == "prefill" or "slow_loop" in settings:
                server["bootstrap_port"] = 1
            if ordered:
                server["ordered"] = role != "decode"
            if "slow_loop" in settings and not name.startswith("east"):
                server["convertible"] = True
            sites.setdefault(name.partition("-")[0], []).append(server)
        data: dict[str, Any] = {
            "listen": {"port": 0},
            "models": [{"name": "m", "aliases": ["also"], "tokenizer": str(model_folder)}],
            "sites": [
                {"name": site, "servers": listed, "cost": {"prefill_tokens_per_s": 1000}}
                for site, listed in sites.items()
            ],
            "policy": {"name": "paper", "threshold_tokens": 100},
            "retry": {"backoff_s": 0.01, "cool_down_s": 0.2},
            "loads": {"interval_s": 0.05},
        }
        if "east" in sites:
            data["links"] = [{"source": "east", "target": "west", "rate_mbps": 10000, "rtt_ms": 1}]
        for name, value in settings.items():
            found = data.get(name)
            data[name] = {**found, **value} if isinstance(found, dict) and isinstance(value, dict) else value

        def read() -> RouterConfig:
            return check(data, RouterConfig, "test.yaml")

        router = None
        try:
            router = Router(read(), reread=read)
            host, port = await router.start()
            async with aiohttp.ClientSession() as session:
                yield Stand(router, f"http://{host}:{port}", servers, session, data)
        finally:
            if router is not None:
                await router.stop()
            for fake in servers.values():
                fake.hold.set()
                await fake.stop()

    return build


K_LONG = "the quick brown fox jumps over the lazy dog " * 60
"""Over the test policy's threshold."""


@pytest.fixture
def long_text() -> str:
    return K_LONG
