"""KV event streams over real sockets: order, gaps, restarts, garbage; and what is predicted from them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from prfaas.config.router import KvEvents
from prfaas.router.kv_events import KvEventReader
from prfaas.routing import block_hashes
from prfaas.telemetry.router_metrics import RouterMetrics

K_END = b"\xff" * 8


def batch(*hashes: int, kind: str = "BlockStored", block_size: int = 1) -> bytes:
    event: dict[str, Any] = {"type": kind, "block_hashes": list(hashes)}
    if kind == "BlockStored":
        event |= {"block_size": block_size, "parent_block_hash": None, "token_ids": [], "lora_id": None}
    if kind == "AllBlocksCleared":
        event = {"type": kind}
    return msgspec.msgpack.encode([0.0, [event], 0])


class Publisher:
    """SGLang's publisher as far as its sockets show it."""

    def __init__(self, context: zmq.asyncio.Context, ports: tuple[int, int] | None = None) -> None:
        self.buffer: list[tuple[int, bytes]] = []
        self.pub = context.socket(zmq.PUB)
        self.replay = context.socket(zmq.ROUTER)
        self.ports = ports or (0, 0)
        for place, socket in enumerate((self.pub, self.replay)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"tcp://127.0.0.1:{ports[place] if ports else '*'}")
        self.endpoints = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (self.pub, self.replay)]
        self.asked: list[int] = []
        self._task = asyncio.ensure_future(self._serve())

    async def _serve(self) -> None:
        while True:
            client, _, start = await self.replay.recv_multipart()
            wanted = int.from_bytes(start, "big")
            self.asked.append(wanted)
            for sequence, payload in self.buffer:
                if sequence >= wanted:
                    await self.replay.send_multipart(
                        [client, b"", b"t", sequence.to_bytes(8, "big"), payload]
                    )
            await self.replay.send_multipart([client, b"", b"", K_END, b""])

    async def send(self, sequence: int, payload: bytes, *, keep: bool = True, lose: bool = False) -> None:
        if keep:
            self.buffer.append((sequence, payload))
        if not lose:
            await self.pub.send_multipart([b"t", sequence.to_bytes(8, "big"), payload])

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        self.pub.close()
        self.replay.close()


class Sink:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stored: list[int] = []
        self.lost = 0

    def on_events(self, server: str, events: Sequence[Any]) -> None:
        for event in events:
            self.stored += getattr(event, "block_hashes", [])

    def on_lost(self, server: str) -> None:
        self.lost += 1
        self.stored.clear()


@asynccontextmanager
async def reading(*, replay: bool = True) -> Any:
    context = zmq.asyncio.Context()
    publisher = Publisher(context)
    sink, metrics = Sink(), RouterMetrics()
    await publisher.send(0, batch(kind="AllBlocksCleared"))
    await publisher.send(1, batch(1, 2))
    config = KvEvents(
        endpoint=publisher.endpoints[0],
        replay_endpoint=publisher.endpoints[1] if replay else None,
        topic="t",
    )
    hearer = KvEventReader("p", config, sink, metrics, context)
    reader = asyncio.ensure_future(hearer.run())
    try:
        # A subscriber takes a moment to join: say something harmless until it has heard of it.
        sequence = 2
        async with asyncio.timeout(10):
            while True:
                await publisher.send(sequence, batch(100 + sequence))
                await asyncio.sleep(0.02)
                sequence += 1
                if hearer._last_live is not None and 100 + sequence - 1 in sink.stored:
                    break
        yield publisher, sink, metrics, sequence
    finally:
        reader.cancel()
        await asyncio.wait({reader})
        await publisher.close()
        context.destroy(linger=0)


async def until(sink: Sink, block: int) -> None:
    async with asyncio.timeout(10):
        while block not in sink.stored:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def count(metrics: RouterMetrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def test_what_was_said_before_joining_is_replayed_and_then_heard_live_once() -> None:
    async def main() -> None:
        async with reading() as (_, sink, _metrics, sequence):
            assert sink.stored[:2] == [1, 2]
            assert sink.stored[2:] == [100 + one for one in range(2, sequence)]

    asyncio.run(main())


def test_a_gap_is_closed_by_replay_in_order() -> None:
    async def main() -> None:
        async with reading() as (publisher, sink, metrics, sequence):
            before, lost = list(sink.stored), sink.lost
            await publisher.send(sequence, batch(7001), lose=True)
            await publisher.send(sequence + 1, batch(7002), lose=True)
            await publisher.send(sequence + 2, batch(7003))
            await until(sink, 7003)
            assert sink.stored == [*before, 7001, 7002, 7003]
            assert sink.lost == lost
            assert count(metrics, "prfaas_router_kv_event_gaps_total", server="p", closed_by="replay") == 1

    asyncio.run(main())


@pytest.mark.parametrize("replay", [True, False])
def test_a_gap_that_cannot_be_closed_forgets_the_server(replay: bool) -> None:
    async def main() -> None:
        async with reading(replay=replay) as (publisher, sink, _metrics, sequence):
            await publisher.send(sequence, batch(8001), keep=False, lose=True)
            await publisher.send(sequence + 1, batch(8002))
            await until(sink, 8002)
            assert sink.stored == [8002]
            await publisher.send(sequence + 2, batch(8003))
            await until(sink, 8003)
            assert sink.stored == [8002, 8003]

    asyncio.run(main())


def test_a_server_that_begins_anew_is_forgotten_and_learnt_again() -> None:
    async def main() -> None:
        async with reading() as (publisher, sink, _metrics, _sequence):
            publisher.buffer.clear()
            await publisher.send(0, batch(kind="AllBlocksCleared"), lose=True)
            await publisher.send(1, batch(9001), lose=True)
            await publisher.send(2, batch(9002))
            await until(sink, 9002)
            assert sink.stored == [9001, 9002]

    asyncio.run(main())


def test_garbage_is_counted_and_forgets_no_more_than_it_must() -> None:
    async def main() -> None:
        async with reading() as (publisher, sink, metrics, sequence):
            lost = sink.lost
            for frames in ([b"t"], [b"t", b"123", b""], [b"t", b"", b"", b"", b""]):
                await publisher.pub.send_multipart(frames)
            await publisher.send(sequence, batch(6001))
            await until(sink, 6001)
            assert sink.lost == lost
            assert (
                count(metrics, "prfaas_router_refused_input_total", source="kv_events", cause="frames") == 3
            )
            for offset, payload in enumerate((b"", b"\xff" * 50, b"\x91" * 5000, b"{}"), 1):
                await publisher.send(sequence + offset, payload)
            await publisher.send(sequence + 5, batch(6002))
            await until(sink, 6002)
            assert sink.stored == [6002]
            assert sink.lost > lost
            assert count(metrics, "prfaas_router_refused_input_total", source="kv_events", cause="batch") == 4

    asyncio.run(main())


def test_the_router_sends_a_prompt_to_the_server_that_has_its_prefix(stand: Any) -> None:
    async def main() -> None:
        context = zmq.asyncio.Context()
        publisher = Publisher(context)
        try:
            roles = {"west-p": "prefill", "west-p2": "prefill", "west-d": "decode"}
            async with stand(roles) as s:
                listed = s.settings["sites"][0]["servers"]
                for server in listed:
                    if server["name"] == "west-p2":
                        server["kv_events"] = {
                            "endpoint": publisher.endpoints[0],
                            "replay_endpoint": publisher.endpoints[1],
                        }
                prompt = list(range(5, 60))
                hashes = block_hashes(prompt, 1)
                await publisher.send(0, batch(kind="AllBlocksCleared"))
                await publisher.send(1, batch(*hashes[:40]))
                await s.router.reload()
                book = s.router.prefixes
                await s.settle(lambda: book.index.statistics().blocks == 40)
                for _ in range(3):
                    assert (await s.post("/v1/completions", prompt=prompt))[0] == 200
                assert len(s.servers["west-p2"].seen) == 3
                record = s.router.scheduler.records[-1]
                assert record.cached_tokens == {"west-p2": 40}
                # Under a salt the servers keep it apart, so nothing is promised.
                await s.post("/v1/completions", prompt=prompt, cache_salt="s")
                assert s.router.scheduler.records[-1].cached_tokens == {}
        finally:
            await publisher.close()
            context.destroy(linger=0)

    asyncio.run(main())
