"""The client: requests at fixed times over kept connections, and when their first tokens came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Asker(asyncio.Protocol):
    """A connection of the load: one request at a time."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, data: bytes, end: bytes) -> asyncio.Future[None]:
        self.end, self.tail, self.first_s = end, b"", None
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self.done

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        joined = self.tail + data
        if not self.tail and self.done and not self.done.done() and not data.startswith(b"HTTP/1.1 200"):
            # Its end isn't looked for: the connection is not used again.
            self.done.set_exception(ConnectionError(data[:300].decode(errors="replace")))
        if self.first_s is None and (b"data: " in joined or self.end != b"0\r\n\r\n"):
            self.first_s = now
        self.tail = joined[-256:]
        if self.done and not self.done.done() and self.end in joined:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done and not self.done.done():
            self.done.set_exception(ConnectionError("cut"))


class Pool:
    def __init__(self, port: int) -> None:
        self.port, self.free = port, []

    async def get(self) -> Asker:
        while self.free:
            asker = self.free.pop()
            if not asker.transport.is_closing():
                return asker
        _, asker = await asyncio.get_running_loop().create_connection(Asker, "127.0.0.1", self.port)
        return asker


def post(body: bytes) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Load:
    """An open loop: requests leave at their times, whatever became of the others."""

    def __init__(self, rate: float, seed: int) -> None:
        self.rate, self.rng = rate, random.Random(seed)
        words = [f"word{i}" for i in range(170)]
        self.texts = [" ".join(self.rng.choices(words, k=250)) for _ in range(64)]

    def body(self, **extra: Any) -> bytes:
        message = {"role": "user", "content": self.rng.choice(self.texts)}
        return json.dumps({"model": "m", "messages": [message], "stream": True, **extra}).encode()

    async def one(self, pools: list[Pool], ttfts: list[float], errors: list[str]) -> None:
        extra: dict[str, Any] = {}
        if len(pools) == 2:
            extra = {
                "bootstrap_host": "127.0.0.1",
                "bootstrap_port": 1,
                "bootstrap_room": self.rng.getrandbits(62),
            }
        data = post(self.body(**extra))
        began = time.perf_counter()
        try:
            askers = [await pool.get() for pool in pools]
            waits = [
                asker.ask(data, b"0\r\n\r\n" if place == 0 else b"}}") for place, asker in enumerate(askers)
            ]
            await asyncio.wait_for(asyncio.gather(*waits), 60)
        except (OSError, TimeoutError) as error:
            errors.append(repr(error))
            return
        if askers[0].first_s is None or b"[DONE]" not in askers[0].tail:
            errors.append(askers[0].tail.decode(errors="replace"))
        else:
            ttfts.append(askers[0].first_s - began)
        for pool, asker in zip(pools, askers, strict=True):
            pool.free.append(asker)

    async def run(self, ports: list[int], seconds: float) -> tuple[list[float], list[str]]:
        pools = [Pool(port) for port in ports]
        ttfts: list[float] = []
        errors: list[str] = []
        tasks = set()
        at = time.perf_counter()
        end = at + seconds
        while at < end:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            tasks.add(asyncio.ensure_future(self.one(pools, ttfts, errors)))
            at += self.rng.expovariate(self.rate)
        await asyncio.gather(*tasks)
        for pool in pools:
            for asker in pool.free:
                asker.transport.close()
        return ttfts, errors
