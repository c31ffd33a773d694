"""SGLang's KV event stream (ZMQ PUB: topic, 8-byte big-endian sequence, msgpack [ts, events, dp_rank]) with
replay."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from prfaas_testbed.instances.profiled.cache import Change, Cleared, Removed, Stored

K_REPLAY_DEPTH, K_REPLAY_BYTES = 10_000, 32 << 20
"""Most batches kept for those who missed some, as SGLang keeps them, and most bytes: each prompt of thousands
of tokens is tens of kB, and an instance grew by 100 MiB an hour until it had all 10,000.
"""
K_END = b"\xff" * 8


def as_maps(changes: Sequence[Change], block_tokens: int) -> list[dict[str, Any]]:
    """Changes of the cache in SGLang's words."""
    rows: list[dict[str, Any]] = []
    for change in changes:
        if isinstance(change, Stored):
            rows.append(
                {
                    "type": "BlockStored",
                    "block_hashes": list(change.hashes),
                    "parent_block_hash": change.parent,
                    "token_ids": list(change.tokens),
                    "block_size": block_tokens,
                    "lora_id": None,
                    "medium": None,
                }
            )
        elif isinstance(change, Removed):
            rows.append({"type": "BlockRemoved", "block_hashes": list(change.hashes), "medium": None})
        elif isinstance(change, Cleared):
            rows.append({"type": "AllBlocksCleared"})
    return rows


class EventPublisher:
    """Publishes batches and answers replays: [b"", start] is answered by [b"", sequence, batch] each, then
    the end."""

    def __init__(self, host: str, port: int, replay_port: int, topic: str = "kv-events") -> None:
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.bind(f"tcp://{host}:{port}")
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(f"tcp://{host}:{replay_port}")
        self._topic = topic.encode()
        self._sequence = 0
        self._past: deque[tuple[int, bytes]] = deque()
        self._past_bytes = 0

    async def publish(self, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        batch = msgspec.msgpack.encode([time.time(), list(rows), 0])
        self._keep(batch)
        await self._pub.send_multipart([self._topic, self._sequence.to_bytes(8, "big"), batch])
        self._sequence += 1

    def _keep(self, batch: bytes) -> None:
        self._past.append((self._sequence, batch))
        self._past_bytes += len(batch)
        # The newest is kept whatever its size.
        while len(self._past) > K_REPLAY_DEPTH or (self._past_bytes > K_REPLAY_BYTES and len(self._past) > 1):
            self._past_bytes -= len(self._past.popleft()[1])

    async def serve_replays(self) -> None:
        while True:
            frames = await self._router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            start = int.from_bytes(frames[2], "big")
            for sequence, batch in list(self._past):
                if sequence >= start:
                    await self._router.send_multipart([frames[0], b"", sequence.to_bytes(8, "big"), batch])
            await self._router.send_multipart([frames[0], b"", K_END, b""])

    def close(self) -> None:
        self._pub.close(linger=0)
        self._router.close(linger=0)
        self._context.term()
