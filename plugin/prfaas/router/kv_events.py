"""One server's KV event stream: the socket around routing's EventFeed, which puts messages into order.

SGLang publishes [topic, sequence (8 bytes, big endian), payload] and answers a replay request for a sequence
with everything it still has from there on. What can't be had, or isn't understood, makes the index forget
the server: what isn't known of it must not be promised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import zmq
import zmq.asyncio

from prfaas.config.router import KvEvents
from prfaas.routing import EventFeed, KvEvent, Received
from prfaas.telemetry.router_metrics import RouterMetrics

K_REPLAY_S = 2.0
K_MAX_MESSAGE_BYTES = 64 << 20
K_QUEUE_MESSAGES = 20_000
K_YIELD_EVERY = 32
K_END = b"\xff" * 8
"""SGLang's mark of a replay's end: sequence −1."""


class EventSink(Protocol):
    """What takes the events of one server."""

    def on_events(self, server: str, events: Sequence[KvEvent]) -> None:
        """In order, without a gap since the last call or on_lost."""
        ...

    def on_lost(self, server: str) -> None:
        """Events were missed for good, or the server began anew: forget what it had."""
        ...


class KvEventReader:
    """`run` until cancelled; reconnects by itself (ZeroMQ does)."""

    def __init__(
        self,
        server: str,
        config: KvEvents,
        sink: EventSink,
        metrics: RouterMetrics,
        context: zmq.asyncio.Context,
    ) -> None:
        self._server, self._config, self._sink = server, config, sink
        self._metrics, self._context = metrics, context
        self._feed = EventFeed()
        self._last_live: int | None = None
        self._disconnected = False

    async def run(self) -> None:
        socket = self._socket(zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, self._config.topic.encode())
        socket.setsockopt(zmq.RCVHWM, K_QUEUE_MESSAGES)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        watcher = asyncio.ensure_future(self._watch(monitor))
        try:
            socket.connect(self._config.endpoint)
            await self._replay(0)  # what was published before we came
            taken = 0
            while True:
                await self._take(await socket.recv_multipart())
                taken += 1
                if taken % K_YIELD_EVERY == 0:
                    # Messages that are there already come without a pause: others want the loop too.
                    await asyncio.sleep(0)
        finally:
            watcher.cancel()
            await asyncio.wait({watcher})
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            await monitor.recv_multipart()
            self._disconnected = True

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, K_MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        return socket

    async def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8:
            self._refuse("frames")
            return
        sequence = int.from_bytes(frames[1], "big")
        before, self._last_live = self._last_live, sequence
        if self._disconnected or (before is not None and sequence <= before):
            # It may have begun anew, counting from 0, and said things while nobody listened.
            self._disconnected = False
            self._feed = EventFeed()
            self._lost("restart")
            await self._replay(0)
        self._hand_on(received := self._feed.on_message(sequence, frames[2]))
        if received.replay_from is not None:
            await self._replay(received.replay_from)

    def _hand_on(self, received: Received) -> None:
        for _ in range(received.garbage):
            self._refuse("batch")
        if received.reset:
            self._lost("forgetting")
        if received.events:
            self._sink.on_events(self._server, received.events)
            self._metrics.kv_events.labels(self._server).inc()

    def _refuse(self, cause: str) -> None:
        self._metrics.refused_input.labels("kv_events", cause).inc()

    def _lost(self, how: str) -> None:
        self._metrics.kv_gaps.labels(self._server, how).inc()
        self._sink.on_lost(self._server)

    async def _replay(self, start: int) -> None:
        """Ask for everything from `start` on; what stays missing is given up."""
        if self._config.replay_endpoint is not None:
            socket = self._socket(zmq.DEALER)
            try:
                socket.connect(self._config.replay_endpoint)
                async with asyncio.timeout(K_REPLAY_S):
                    await socket.send_multipart([b"", start.to_bytes(8, "big")])
                    await self._replayed(socket)
                if start:
                    self._metrics.kv_gaps.labels(self._server, "replay").inc()
            except TimeoutError:
                self._refuse("replay timeout")
            finally:
                socket.close(linger=0)
        self._hand_on(self._feed.on_replay_failed())

    async def _replayed(self, socket: zmq.asyncio.Socket) -> None:
        taken = 0
        while True:
            # [b"", topic, sequence, payload], or without a topic where the version has none.
            frames = await socket.recv_multipart()
            if len(frames) < 3 or len(frames[-2]) != 8:
                self._refuse("replay")
                return
            if frames[-2] == K_END:
                return
            self._hand_on(self._feed.on_replayed(int.from_bytes(frames[-2], "big"), frames[-1]))
            taken += 1
            if taken % K_YIELD_EVERY == 0:
                await asyncio.sleep(0)
