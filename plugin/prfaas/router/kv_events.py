"""One server's KV event stream: subscribed, in order, gaps closed by replay, garbage counted and dropped.

SGLang publishes [topic, sequence (8 bytes, big endian), msgpack [timestamp, [event …], dp rank]] and answers
a replay request for a sequence with everything it still has from there on. A gap that replay can't close
makes the index forget the server: what it doesn't know about it must not promise.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from prfaas.config.router import KvEvents
from prfaas.telemetry.router_metrics import RouterMetrics

K_REPLAY_S = 2.0
K_MAX_MESSAGE_BYTES = 64 << 20
K_QUEUE_MESSAGES = 20_000
K_YIELD_EVERY = 32
K_END = b"\xff" * 8
"""SGLang's mark of a replay's end: sequence −1."""


class EventSink(Protocol):
    """What takes the events of one server."""

    def on_batch(self, server: str, sequence: int, payload: bytes) -> None:
        """A batch in order. Raises ValueError for what isn't one; then nothing has changed."""
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
        self.next_sequence: int | None = None
        """Of the batch to come; None: nothing has come yet."""
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
                frames = await socket.recv_multipart()
                await self._take(frames)
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
            # The server may have begun anew, counting from 0: what was known of it is not known any more.
            self._disconnected = False
            if self.next_sequence is not None:
                self._lost("restart")
            self.next_sequence = None
            await self._replay(0)
        wanted = self.next_sequence
        if wanted is not None and sequence > wanted:
            await self._replay(wanted)
            wanted = self.next_sequence
        if wanted is not None and sequence < wanted:
            return  # replay has brought it
        if sequence != (wanted or 0):
            self._lost("forgetting")
        self._apply(sequence, frames[2])

    def _apply(self, sequence: int, payload: bytes) -> None:
        self.next_sequence = sequence + 1
        try:
            self._sink.on_batch(self._server, sequence, payload)
        except (ValueError, msgspec.DecodeError):
            # Its content is lost, so what the server holds is no longer known.
            self._refuse("batch")
            self._sink.on_lost(self._server)
        else:
            self._metrics.kv_events.labels(self._server).inc()

    def _refuse(self, cause: str) -> None:
        self._metrics.refused_input.labels("kv_events", cause).inc()

    def _lost(self, how: str) -> None:
        self._metrics.kv_gaps.labels(self._server, how).inc()
        self._sink.on_lost(self._server)

    async def _replay(self, start: int) -> None:
        """Ask for everything from `start` on, and apply what fits. Gives up after K_REPLAY_S."""
        if self._config.replay_endpoint is None:
            return
        socket = self._socket(zmq.DEALER)
        try:
            socket.connect(self._config.replay_endpoint)
            async with asyncio.timeout(K_REPLAY_S):
                await socket.send_multipart([b"", start.to_bytes(8, "big")])
                while True:
                    frames = await socket.recv_multipart()
                    # [b"", topic, sequence, payload], or without a topic where the version has none.
                    if len(frames) < 3 or len(frames[-2]) != 8:
                        self._refuse("replay")
                        return
                    if frames[-2] == K_END:
                        break
                    sequence = int.from_bytes(frames[-2], "big")
                    if self.next_sequence is None and sequence > 0:
                        self._lost("forgetting")
                    elif self.next_sequence is not None and sequence != self.next_sequence:
                        if sequence < self.next_sequence:
                            continue
                        self._lost("forgetting")
                    self._apply(sequence, frames[-1])
            if start:
                self._metrics.kv_gaps.labels(self._server, "replay").inc()
        except TimeoutError:
            self._refuse("replay timeout")
        finally:
            socket.close(linger=0)
