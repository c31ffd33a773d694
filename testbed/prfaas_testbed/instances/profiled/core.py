"""The scheduler of a profiled instance: queueing, chunked prefill, batched decode and a bounded pool; pure.

One compute unit does one step at a time: a prefill step of at most `chunk_tokens` over the queue in order,
or a decode step of the whole batch. As in SGLang, waiting prefill goes first, a greater priority before a
smaller, and a prefill that has begun before all others. Time is whatever the caller
passes as `now`; steps that ended in between are completed at their own times, so a late caller doesn't
stretch them.

    offer: pool has room -> Granted -> (prefill: at once; decode: once the shell calls landed) -> steps ->
    events
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from prfaas.model.errors import LocalProtocolError
from prfaas.model.profiles import Profile
from prfaas_testbed.instances.profiled.cache import Pins, PrefixCache

Role = Literal["prefill", "decode", "collocated"]
K_MOST_TOKENS = 1 << 40  # that a pool without a limit is said to hold; a router believes no more
K_UNLIMITED_TOKENS = 1 << 62


@dataclass(frozen=True)
class Granted:
    """The pool holds room for the request until it is released."""

    id: str
    at_s: float
    cached_tokens: int


@dataclass(frozen=True)
class ChunkDone:
    """Prompt tokens [first, last) are computed; `final` is the prompt's end."""

    id: str
    at_s: float
    first: int
    last: int
    final: bool


@dataclass(frozen=True)
class TokenDone:
    """The output's token number `index` exists; `final` ends the request."""

    id: str
    at_s: float
    index: int
    final: bool


Event = Granted | ChunkDone | TokenDone


@dataclass
class _Job:
    id: str
    tokens: tuple[int, ...]
    max_new: int
    cached: int = 0
    done: int = 0
    emitted: int = 0
    reserved: int = 0
    pinned: Pins = field(default_factory=list)
    granted: bool = False
    priority: int = 0
    begun: bool = False


class Scheduler:
    """Raises LocalProtocolError for an unknown or doubled id; nothing changes then."""

    def __init__(
        self, profile: Profile, role: Role, max_batch: int | None = None, chunk_tokens: int | None = None,
        pool_tokens: int | None = None, prefill_requests: int | None = None,
    ) -> None:  # fmt: skip
        self.profile, self.role = profile, role
        self.chunk_tokens = chunk_tokens or profile.chunk_tokens
        self.pool_tokens = pool_tokens or profile.pool_tokens or K_UNLIMITED_TOKENS
        self.prefill_requests = prefill_requests or K_UNLIMITED_TOKENS
        self.max_batch = max_batch or (profile.decode.max_batch if profile.decode else 0)
        if role != "prefill" and profile.decode is None:
            raise LocalProtocolError(f"profile {profile.name} has no decode figures: it can only prefill")
        self.cache = PrefixCache(profile.block_tokens, exact=profile.state_bytes > 0)
        self.reserved_tokens = 0
        self.prefilled_tokens = 0
        self.prefill_busy_s = 0.0
        self._jobs: dict[str, _Job] = {}
        self._waiting: deque[_Job] = deque()  # for room in the pool
        self._prefilling: deque[_Job] = deque()
        self._landed: deque[_Job] = deque()  # for a place in the batch
        self._running: dict[str, _Job] = {}
        self._step: tuple[Literal["prefill", "decode"], float, list[tuple[_Job, int, int]]] | None = None

    # What the shell tells.

    def offer(
        self, id: str, tokens: Sequence[int], max_new: int, now: float, priority: int = 0
    ) -> list[Event]:
        """A request has come (for a prefill server: and its receiver is known). Refuses what can never
        fit."""
        if id in self._jobs:
            raise LocalProtocolError(f"request {id} is here already")
        if not tokens or max_new < 1:
            raise LocalProtocolError("a request needs a token and wants at least one")
        if len(tokens) + self._new_tokens(max_new) > self.pool_tokens:
            raise LocalProtocolError(
                f"{len(tokens)} + {max_new} tokens will never fit a pool of {self.pool_tokens}"
            )
        job = _Job(id, tuple(tokens), max_new, priority=priority)
        self._jobs[id] = job
        _enqueue(self._waiting, job)
        return self.advance(now)

    def landed(self, id: str, now: float) -> list[Event]:
        """A decode server has the request's KV: it may join the batch."""
        job = self._known(id)
        if self.role != "decode" or not job.granted or job in self._landed or id in self._running:
            raise LocalProtocolError(f"request {id} isn't waiting for its KV here")
        self._landed.append(job)
        return self.advance(now)

    def release(self, id: str, now: float, keep: bool = True) -> list[Event]:
        """The request is over (a prefill server: its bytes are away), or, without `keep`, aborted."""
        job = self._jobs.pop(id, None)
        if job is None:
            return []
        for queue in (self._waiting, self._prefilling, self._landed):
            if job in queue:
                queue.remove(job)
        self._running.pop(id, None)
        self.cache.unpin(job.pinned)
        if job.granted:
            self.reserved_tokens -= job.reserved
        if keep and job.granted and job.done >= len(job.tokens):
            self.cache.insert(job.tokens)
        return self.advance(now)

    def take_in(self, tokens: Sequence[int]) -> bool:
        """Keep a prefix that came from elsewhere, at the cost of what is unused; False: it has no room."""
        lacking = self.reserved_tokens + self.cache.used_tokens + len(tokens) - self.pool_tokens
        if lacking > 0:
            lacking -= self.cache.evict(lacking)
        if lacking > 0:
            return False
        self.cache.insert(tokens)
        return True

    def flush(self) -> None:
        self.cache.clear()

    # What it answers.

    def next_at(self) -> float | None:
        """When the running step ends; None where nothing runs."""
        return self._step[1] if self._step else None

    def advance(self, now: float) -> list[Event]:
        """Everything that happened up to `now`, in order."""
        events: list[Event] = []
        self._grant(now, events)
        self._start(now, events)
        while self._step is not None and self._step[1] <= now:
            kind, ended, pieces = self._step
            self._step = None
            if kind == "prefill":
                self._end_prefill(pieces, ended, events)
            else:
                self._end_decode(pieces, ended, events)
            self._grant(ended, events)
            self._start(ended, events)
        return events

    def load(self) -> dict[str, int]:
        """Counts as SGLang's /v1/loads names them."""
        waiting = [*self._waiting, *self._prefilling]
        return {
            "num_running_reqs": len(self._running) + (1 if self._step and self._step[0] == "prefill" else 0),
            "num_waiting_reqs": len(waiting) + len(self._landed),
            "num_waiting_uncached_tokens": sum(
                len(job.tokens) - max(job.done, job.cached) for job in waiting
            ),
            "num_used_tokens": self.reserved_tokens + self.cache.used_tokens,
            "max_total_num_tokens": min(self.pool_tokens, K_MOST_TOKENS),
        }

    @property
    def idle(self) -> bool:
        return not self._jobs

    # How it works.

    def _known(self, id: str) -> _Job:
        if id not in self._jobs:
            raise LocalProtocolError(f"no request {id} here")
        return self._jobs[id]

    def _new_tokens(self, max_new: int) -> int:
        return 0 if self.role == "prefill" else max_new

    def _grant(self, now: float, events: list[Event]) -> None:
        """Rooms are given in the queue's order: a large request isn't starved by small ones behind it."""
        while self._waiting:
            job = self._waiting[0]
            cached = self.cache.match(job.tokens)
            if not self._make_room(job, cached):
                # Nobody is left to wait for: what it would reuse is what it lacks room for.
                alone = self.reserved_tokens == 0
                if not (cached and alone and self._make_room(job, 0)):
                    return
            self._waiting.popleft()
            if self.role != "decode":
                _enqueue(self._prefilling, job)
            events.append(Granted(job.id, now, job.cached))

    def _make_room(self, job: _Job, cached: int) -> bool:
        """Reserve what it needs if it reuses so many tokens, at the cost of what is cached for others."""
        # A tail that is reused becomes part of a block of its own later.
        shared = cached // self.cache.block_tokens * self.cache.block_tokens
        need = len(job.tokens) - shared + self._new_tokens(job.max_new)
        pinned = self.cache.pin(job.tokens, cached)
        lacking = self.reserved_tokens + self.cache.used_tokens + need - self.pool_tokens
        if lacking > 0:
            lacking -= self.cache.evict(lacking)
        if lacking > 0:
            self.cache.unpin(pinned)
            return False
        job.cached = job.done = cached
        job.reserved, job.pinned, job.granted = need, pinned, True
        self.reserved_tokens += need
        return True

    def _start(self, now: float, events: list[Event]) -> None:
        if self._step is not None:
            return
        while self._landed and len(self._running) < self.max_batch:
            # The first token came with the KV: it is out as soon as the request joins the batch.
            self._join(self._landed.popleft(), now, events)
        if self._prefilling and not (self.role == "collocated" and len(self._running) >= self.max_batch):
            pieces: list[tuple[_Job, int, int]] = []
            left, took_s = self.chunk_tokens, 0.0
            for job in self._prefilling:
                if left <= 0 or len(pieces) >= self.prefill_requests:
                    break
                last = min(len(job.tokens), job.done + left)
                pieces.append((job, job.done, last))
                job.begun = True
                took_s += self._chunk_s(job, job.done, last)
                left -= last - job.done
            self.prefill_busy_s += took_s
            self._step = ("prefill", now + took_s, pieces)
        elif self._running:
            decode = self.profile.decode
            assert decode is not None  # the constructor refuses
            batch = list(self._running.values())
            self._step = ("decode", now + decode.step_s(len(batch)), [(job, 0, 0) for job in batch])

    def _chunk_s(self, job: _Job, first: int, last: int) -> float:
        """T of the chunk [first, last) = T(last, cached) − T(first, cached); the first chunk pays the
        start-up, less what the profile says occupies nobody (the shell waits for that)."""
        if first == job.cached:
            return self.profile.occupied_s(last, job.cached)
        return self.profile.prefill_s(last, job.cached) - self.profile.prefill_s(first, job.cached)

    def _end_prefill(self, pieces: list[tuple[_Job, int, int]], at_s: float, events: list[Event]) -> None:
        for job, first, last in pieces:
            self.prefilled_tokens += last - first
            if job.id not in self._jobs:
                continue  # aborted in mid-step: the step itself isn't cut short
            job.done = last
            final = last == len(job.tokens)
            events.append(ChunkDone(job.id, at_s, first, last, final))
            if final:
                self._prefilling.remove(job)
                if self.role == "collocated":
                    self._join(job, at_s, events)

    def _end_decode(self, pieces: list[tuple[_Job, int, int]], at_s: float, events: list[Event]) -> None:
        for job, _, _ in pieces:
            if job.id in self._running:
                self._emit(job, at_s, events)

    def _join(self, job: _Job, at_s: float, events: list[Event]) -> None:
        job.done = len(job.tokens)
        self._running[job.id] = job
        self._emit(job, at_s, events)

    def _emit(self, job: _Job, at_s: float, events: list[Event]) -> None:
        final = job.emitted + 1 >= job.max_new
        events.append(TokenDone(job.id, at_s, job.emitted, final))
        job.emitted += 1
        if final:
            # It holds its pages until the shell releases it, but no place in the batch.
            del self._running[job.id]


def _enqueue(queue: deque[_Job], job: _Job) -> None:
    """Behind all of its priority or a greater one, and behind what has begun."""
    at = len(queue)
    while at > 0 and queue[at - 1].priority < job.priority and not queue[at - 1].begun:
        at -= 1
    queue.insert(at, job)
