"""A profiled instance at work: the scheduler on the real clock, and a request's way through it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prfaas.model.errors import LocalProtocolError
from prfaas.model.profiles import Profile
from prfaas_testbed.instances.profiled import content
from prfaas_testbed.instances.profiled.core import ChunkDone, Event, Granted, Scheduler, TokenDone
from prfaas_testbed.instances.profiled.events import EventPublisher, as_maps
from prfaas_testbed.instances.profiled.mover import MoveFailed, Receiver, Sender
from prfaas_testbed.instances.profiled.peers import Peers, Refused
from prfaas_testbed.instances.profiled.settings import Settings


@dataclass
class Output:
    """An answer so far."""

    ids: list[int]
    cached_tokens: int
    final: bool


@dataclass
class _Grant:
    text: str
    skip_bytes: int
    reply: tuple[str, int]


class Instance:
    """One server. `run` must be under way while requests are served."""

    def __init__(
        self,
        settings: Settings,
        profile: Profile,
        peers: Peers,
        sender: Sender | None = None,
        receiver: Receiver | None = None,
        publisher: EventPublisher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.profile, self._peers = settings, profile, peers
        self._sender, self._receiver, self._publisher, self._clock = sender, receiver, publisher, clock
        self.scheduler = self._fresh(settings.role)
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._priorities: dict[str, int] = {}
        self._grants: dict[int, asyncio.Future[_Grant]] = {}
        self._notes: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._wake = asyncio.Event()
        self._switching = False
        self.aborted: set[str] = set()
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    def _fresh(self, role: str) -> Scheduler:
        limits = self.settings.limits
        return Scheduler(
            self.profile, role, limits.max_batch, limits.chunk_tokens, limits.cache_tokens,  # type: ignore[arg-type]
            limits.prefill_requests,
        )  # fmt: skip

    # The scheduler on the clock.

    async def run(self) -> None:
        """Steps the scheduler at its times; ends by cancellation."""
        while True:
            self._wake.clear()
            self._hand_out(self.scheduler.advance(self._clock()))
            await self._publish()
            next_at = self.scheduler.next_at()
            delay_s = None if next_at is None else max(0.0, next_at - self._clock())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), delay_s)

    def _deliver(self, events: Sequence[Event]) -> None:
        """What a call from outside `run` brought; the time of the next step may have changed."""
        self._hand_out(events)
        self._wake.set()

    def _hand_out(self, events: Sequence[Event]) -> None:
        for event in events:
            queue = self._queues.get(event.id)
            if queue is not None:
                queue.put_nowait(event)

    async def _publish(self) -> None:
        changes = self.scheduler.cache.drain()
        if self._publisher is not None and changes:
            await self._publisher.publish(as_maps(changes, self.profile.block_tokens))

    # A request.

    async def serve(
        self,
        rid: str,
        tokens: Sequence[int],
        max_new: int,
        room: int | None,
        peer: tuple[str, int] | None,
        priority: int = 0,
    ) -> AsyncGenerator[Output, None]:
        """Answers as they grow. Whatever ends the iteration early (a client that left) releases
        everything."""
        if rid in self._queues:
            raise Refused(f"request {rid} is here already", 400)
        if self._switching:
            raise Refused("the server is changing its role", 503)
        self._queues[rid] = asyncio.Queue()
        if self.settings.priority_scheduling:
            self._priorities[rid] = priority
        task = asyncio.current_task()
        if task is not None:
            self._tasks[rid] = task
        try:
            role = self.scheduler.role
            if role == "collocated":
                stream = self._collocated(rid, tokens, max_new)
            elif room is None:
                raise Refused(f"a {role} server needs bootstrap_room", 400)
            elif role == "prefill":
                stream = self._prefill(rid, tokens, room)
            else:
                stream = self._decode(rid, tokens, max_new, room, peer)
            async with contextlib.aclosing(stream):
                async for output in stream:
                    yield output
        finally:
            self._queues.pop(rid, None)
            self._priorities.pop(rid, None)
            self._tasks.pop(rid, None)
            keep = self.scheduler.role != "decode" or self.settings.decode_cache
            self._deliver(self.scheduler.release(rid, self._clock(), keep=keep))

    def abort(self, rid: str | None) -> int:
        """End one request, or all; how many there were."""
        chosen = [key for key in self._tasks if rid is None or key == rid]
        for key in chosen:
            self.aborted.add(key)
            self._tasks[key].cancel()
        return len(chosen)

    async def _collocated(
        self, rid: str, tokens: Sequence[int], max_new: int
    ) -> AsyncGenerator[Output, None]:
        began_s = self._clock()
        seed, ids, cached = content.prompt_seed(tokens), [], 0
        await self._read(began_s)
        self._offer(rid, tokens, max_new)
        async for event in self._events(rid):
            if isinstance(event, Granted):
                cached = event.cached_tokens
            elif isinstance(event, TokenDone):
                ids.append(content.token(seed, 0, event.index))
                yield Output(ids, cached, event.final)
                if event.final:
                    return

    async def _prefill(self, rid: str, tokens: Sequence[int], room: int) -> AsyncGenerator[Output, None]:
        assert self._sender is not None
        began_s = self._clock()
        grant = await self._wait_for(self._grant_of(room), "no decode server came for the request")
        seed, size = content.prompt_seed(tokens), self.profile.kv_bytes(len(tokens))
        memory = await self._sender.memory(room, size)
        sends: list[asyncio.Task[int]] = []
        started_s, cached = None, 0
        try:
            await self._read(began_s)
            self._offer(rid, tokens, 1)
            async for event in self._events(rid):
                if isinstance(event, Granted):
                    cached = event.cached_tokens
                elif isinstance(event, ChunkDone):
                    first = 0 if event.first == cached else self._kv_end(event.first, len(tokens))
                    last = size if event.final else self._kv_end(event.last, len(tokens))
                    first = max(first, grant.skip_bytes)
                    if last > first:
                        content.fill(memory[first:last], seed, first)
                        started_s = started_s or self._clock()
                        send = self._send(room, grant, memory, first, last, event.final)
                        sends.append(asyncio.create_task(send))
                    if event.final:
                        break
            # The note travels beside the bytes: the decode side waits for both.
            source_digest = await asyncio.to_thread(self._source_digest, memory, seed, grant.skip_bytes, size)
            note = {"room": room, "digest": source_digest, "seed": seed}
            await self._peers.post(grant.reply, "/profiled/note", note)
            resent = sum(await asyncio.gather(*sends))
            self._log(
                room=room,
                rid=rid,
                side="source",
                digest=source_digest,
                bytes=size - grant.skip_bytes,
                start_s=started_s,
                end_s=self._clock(),
                resent_blocks=resent,
                cached_tokens=cached,
            )
            yield Output([content.token(seed, 0, 0)], cached, True)
        except BaseException as error:
            for task in sends:
                task.cancel()
            await asyncio.gather(*sends, return_exceptions=True)
            reason = str(error) or type(error).__name__
            if not isinstance(error, GeneratorExit | asyncio.CancelledError):
                with contextlib.suppress(Refused):
                    body = {"room": room, "error": f"prefill failed: {reason}"}
                    await self._peers.post(grant.reply, "/profiled/note", body)
            if isinstance(error, MoveFailed):
                raise Refused(f"transfer failed: {reason}") from None
            raise
        finally:
            await self._sender.forget(room)
            self._grants.pop(room, None)

    async def _send(
        self, room: int, grant: _Grant, memory: memoryview, first: int, last: int, final: bool
    ) -> int:
        assert self._sender is not None
        self._plant(memory, first, last)
        moved = await self._sender.send(
            room, grant.text, first, grant.skip_bytes, last - first, final, self.settings.transfer_timeout_s
        )
        return moved.resent_blocks

    def _source_digest(self, memory: memoryview, seed: int, skip_bytes: int, size: int) -> str:
        """Of what should be sent; memory that a control has damaged can't tell, so it is made again."""
        if self.settings.fault is None:
            return content.digest(memory[skip_bytes:size])
        whole = memoryview(bytearray(size))
        content.fill(whole, seed, 0)
        return content.digest(whole[skip_bytes:])

    def _plant(self, memory: memoryview, first: int, last: int) -> None:
        """A control's fault."""
        if self.settings.fault == "zero_kv":
            memory[first:last] = bytes(last - first)
        elif self.settings.fault == "drop_page" and first == 0:
            end = min(self.settings.page_bytes, last)
            memory[:end] = bytes(end)

    async def _decode(
        self, rid: str, tokens: Sequence[int], max_new: int, room: int, peer: tuple[str, int] | None
    ) -> AsyncGenerator[Output, None]:
        assert self._receiver is not None
        if peer is None:
            raise Refused("a decode server needs bootstrap_host and bootstrap_port", 400)
        notes: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._notes[room] = notes
        try:
            self._offer(rid, tokens, max_new)
            granted = await self._queues[rid].get()
            assert isinstance(granted, Granted)
            size = self.profile.kv_bytes(len(tokens))
            skip = self._kv_end(granted.cached_tokens, len(tokens)) if granted.cached_tokens else 0
            try:
                text, memory = await self._receiver.lease(room, size - skip, self.settings.transfer_timeout_s)
            except MoveFailed as error:
                raise Refused(str(error)) from None
            body = {"room": room, "grant": text, "skip_bytes": skip, "port": self.settings.port}
            await self._peers.post(peer, "/profiled/grant", {**body, "host": self.settings.host})
            note = await self._all_landed(room, notes)
            landed_digest = content.digest(memory)
            self._log(room=room, side="landed", digest=landed_digest, bytes=size - skip, at_s=self._clock())
            seed, damage = int(note["seed"]), content.damage(note["digest"], landed_digest)
            ids: list[int] = []
            self._deliver(self.scheduler.landed(rid, self._clock()))
            async for event in self._events(rid):
                if isinstance(event, TokenDone):
                    # The first token comes with the transfer's own message: wrong KV shows from the second
                    # on.
                    ids.append(content.token(seed, damage if event.index else 0, event.index))
                    yield Output(ids, granted.cached_tokens, event.final)
                    if event.final:
                        return
        finally:
            self._notes.pop(room, None)
            await self._receiver.release(room)

    async def _all_landed(self, room: int, notes: asyncio.Queue[dict[str, Any]]) -> dict[str, Any]:
        """Until the bytes are applied and the sender's note is here. Raises Refused at the first sign of
        failure."""
        assert self._receiver is not None
        limit_s = self.settings.transfer_timeout_s
        note: dict[str, Any] | None = None
        landing = asyncio.create_task(self._receiver.landed(room, limit_s))
        reading = asyncio.create_task(notes.get())
        try:
            async with asyncio.timeout(limit_s):
                while note is None or not landing.done():
                    await asyncio.wait({landing, reading}, return_when=asyncio.FIRST_COMPLETED)
                    if reading.done():
                        told = reading.result()
                        if "error" in told:
                            raise Refused(told["error"])
                        note, reading = told, asyncio.create_task(notes.get())
                    if landing.done():
                        landing.result()
                        if note is None:
                            await asyncio.wait({reading})
        except TimeoutError:
            raise Refused(f"the prefill server sent nothing within {limit_s:g} s") from None
        except MoveFailed as error:
            raise Refused(f"transfer failed: {error}") from None
        finally:
            for task in (landing, reading):
                task.cancel()
            await asyncio.gather(landing, reading, return_exceptions=True)
        return note

    # What peers bring.

    def bring_grant(self, room: int, text: str, skip_bytes: int, reply: tuple[str, int]) -> None:
        future = self._grant_of(room)
        if not future.done():
            future.set_result(_Grant(text, skip_bytes, reply))

    def bring_note(self, room: int, note: dict[str, Any]) -> None:
        """The sender's word on a room. Raises Refused when nobody waits for it any more."""
        if room not in self._notes:
            raise Refused(f"no request waits for room {room}", 404)
        self._notes[room].put_nowait(note)

    async def switch_role(self, role: str) -> None:
        """Takes what the profile says it takes, and requests are refused meanwhile. Raises Refused where one
        is under way, or another change of role is."""
        if self._queues or self._switching:
            raise Refused("instance is not idle", 400)
        switch = self.profile.role_switch
        self._switching = True
        try:
            if switch is not None and role != self.scheduler.role:
                await asyncio.sleep(switch.seconds(role == "prefill"))
        finally:
            self._switching = False
        self.scheduler.flush()
        changes = self.scheduler.cache.changes
        self.scheduler = self._fresh(role)
        self.scheduler.cache.changes = changes
        self._wake.set()

    def flush(self) -> None:
        """Raises Refused while any request is here, as SGLang does."""
        if self._queues:
            raise Refused("the cache isn't flushed: requests are under way", 400)
        self.scheduler.flush()
        self._wake.set()

    # Small things.

    def _grant_of(self, room: int) -> asyncio.Future[_Grant]:
        if room not in self._grants:
            self._grants[room] = asyncio.get_running_loop().create_future()
        return self._grants[room]

    async def _wait_for(self, future: asyncio.Future[Any], otherwise: str) -> Any:
        try:
            return await asyncio.wait_for(future, self.settings.transfer_timeout_s)
        except TimeoutError:
            raise Refused(f"{otherwise} within {self.settings.transfer_timeout_s:g} s") from None

    async def _read(self, began_s: float) -> None:
        """The profile's latency, of which what this process itself took since `began_s` is a part."""
        left_s = began_s + self.profile.latency_s - self._clock()
        if left_s > 0:
            await asyncio.sleep(left_s)

    def _offer(self, rid: str, tokens: Sequence[int], max_new: int) -> None:
        try:
            self._deliver(
                self.scheduler.offer(rid, tokens, max_new, self._clock(), self._priorities.get(rid, 0))
            )
        except LocalProtocolError as error:
            raise Refused(str(error), 400) from None

    async def _events(self, rid: str) -> AsyncIterator[Event]:
        queue = self._queues[rid]
        while True:
            yield await queue.get()

    def _kv_end(self, tokens: int, whole: int) -> int:
        """Where the KV of the first `tokens` ends in the request's bytes; the state lies at their very
        end."""
        limit = self.profile.kv_bytes(whole) - self.profile.state_bytes
        return min(limit, self.profile.kv_bytes(tokens) - self.profile.state_bytes)

    def _log(self, **row: Any) -> None:
        if self.settings.transfers_log is not None:
            with self.settings.transfers_log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
