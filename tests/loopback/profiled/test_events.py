"""A profiled instance's KV events can be asked for again, as far back as it keeps them."""

from __future__ import annotations

import asyncio

import pytest
import zmq
import zmq.asyncio

from prfaas_testbed.experiment.profiling import free_ports
from prfaas_testbed.instances.profiled import events

K_BATCHES = 40


async def replayed(port: int, start: int) -> list[int]:
    """The numbers of the batches that it has from `start` on."""
    context = zmq.asyncio.Context()
    asker = context.socket(zmq.DEALER)
    asker.connect(f"tcp://127.0.0.1:{port}")
    found = []
    try:
        await asker.send_multipart([b"", start.to_bytes(8, "big")])
        while True:
            _, sequence, _ = await asyncio.wait_for(asker.recv_multipart(), 10)
            if sequence == events.K_END:
                return found
            found.append(int.from_bytes(sequence, "big"))
    finally:
        asker.close(linger=0)
        context.term()


@pytest.mark.parametrize(
    ("most_bytes", "depth", "kept"),
    [(1 << 20, 100, K_BATCHES), (1 << 20, 7, 7), (25_000, 100, 5), (10, 100, 1)],
    ids=["all", "by their number", "by their bytes", "the newest whatever its size"],
)
def test_what_is_kept_for_those_who_missed_some_has_a_limit(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int, depth: int, kept: int
) -> None:
    monkeypatch.setattr(events, "K_REPLAY_BYTES", most_bytes)
    monkeypatch.setattr(events, "K_REPLAY_DEPTH", depth)

    async def play() -> tuple[list[int], list[int]]:
        ports = free_ports(2)
        publisher = events.EventPublisher("127.0.0.1", *ports)
        replays = asyncio.create_task(publisher.serve_replays())
        try:
            for _ in range(K_BATCHES):
                await publisher.publish([{"type": "BlockStored", "token_ids": [70_000] * 900}])
            return await replayed(ports[1], 0), await replayed(ports[1], K_BATCHES - 1)
        finally:
            replays.cancel()
            publisher.close()

    everything, newest = asyncio.run(play())
    assert everything == list(range(K_BATCHES - kept, K_BATCHES))
    assert newest == [K_BATCHES - 1]
