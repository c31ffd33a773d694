"""One serving instance on virtual time: a queue of prefills taken in chunks, and a batch of decodes.

Prefill takes steps of at most `chunk_tokens` and `prefill_requests`, filled in order of the queue; what is
in a step is done at its end. A prompt that a step has cut goes on in the next before all others, as
SGLang's chunked request does: nothing overtakes it, however urgent. A request that comes is read first,
which takes the profile's latency and keeps nobody waiting. Decode is a batch of at most `max_batch`; all in
it advance together, one token a step, a step's time a function of the batch's size, and stand still while
the same engine prefills; what has landed joins between two steps, as in SGLang's loop. Requests hold their
pages from their reservation to their end; those that find no room wait in order.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal

from prfaas.model.profiles import Profile
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.cache import BlockCache
from prfaas.simulator.job import Job
from prfaas.simulator.tally import Tally
from prfaas.simulator.works import works_of

Role = Literal["prefill", "decode", "collocated"]
K_STEP_END = 1e-6  # of a decode step: what sums of its seconds may be off by


class Engine:
    """One instance. All times are the agenda's."""

    __slots__ = (
        "_agenda", "_begun", "_current", "_decode_plan", "_landed", "_queue", "_reading", "_running",
        "_serial", "_step_ends_s", "_step_took_s", "_steps", "_steps_at_s", "_unplaced", "assigned",
        "backlog_s", "backlog_tokens", "busy_s", "cache", "chunk_tokens", "draining", "fullness",
        "keeps_backlog", "keeps_fullness", "max_batch", "name", "pool_tokens", "prefill_requests", "profile",
        "reserved_tokens", "role", "site", "tally", "up", "works",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        site: str,
        role: Role,
        profile: Profile,
        agenda: Agenda,
        *,
        max_batch: int | None = None,
        chunk_tokens: int | None = None,
        pool_tokens: int | None = None,
        prefill_requests: int | None = None,
    ) -> None:
        self.name, self.site, self.role = name, site, role
        self.profile, self._agenda, self.works = profile, agenda, works_of(profile)
        decode = profile.decode
        if role != "prefill" and decode is None:
            raise ValueError(f"{name}: profile {profile.name} has no decode figures")
        self.max_batch = max_batch or (decode.max_batch if decode else 0)
        self.chunk_tokens = chunk_tokens or profile.chunk_tokens
        self.prefill_requests: float = prefill_requests or math.inf
        """Most prompts of one prefill step."""
        self.pool_tokens = pool_tokens if pool_tokens is not None else profile.pool_tokens
        self.cache = BlockCache(profile.block_tokens, self.pool_tokens, exact=profile.state_bytes > 0)
        self.up = True
        self.draining = False
        """Takes nothing new."""
        self.keeps_backlog: tuple[list[float], int] | None = None
        self.keeps_fullness: tuple[list[float], int] | None = None
        """Where `backlog_s` and `fullness` are kept for whoever compares many instances."""
        self.tally: tuple[Tally, int] | None = None
        """Who is told, under which number, what this one has to do."""
        self.busy_s = 0.0
        """Seconds spent in prefill steps."""
        self.reserved_tokens = self.assigned = 0
        """Requests that hold pages here, wherever their prefill is."""
        self.backlog_s = 0.0
        """Seconds of prefill queued, the running step's share included until it ends."""
        self.backlog_tokens = 0
        self._queue: list[tuple[float, int, Job]] = []
        self._begun: Job | None = None
        """The prompt that the last step cut, or the running one cuts."""
        self._reading = 0
        """Requests that have come and aren't queued yet."""
        self._current: list[tuple[Job, int]] | None = None
        self._step_ends_s = self._step_took_s = 0.0
        self._serial = 0
        self._unplaced: deque[tuple[Job, int, Callable[[Job, float], None]]] = deque()
        self._landed: deque[Job] = deque()
        # The batch: `_steps` counts decode steps taken; a job ends when it reaches its own figure.
        self._running: list[tuple[float, int, Job]] = []
        self._steps, self._steps_at_s, self._decode_plan = 0.0, 0.0, 0
        self.fullness = math.inf if role == "prefill" else 0.0
        """Requests that hold pages or wait here, over the batch limit; inf where it takes none."""

    # Pages.

    def reserve(self, job: Job, tokens: int, granted: Callable[[Job, float], None], now: float) -> None:
        """Pages for `tokens`, held until `release`; `granted` is called at once or when there is room."""
        self._unplaced.append((job, tokens, granted))
        self._place(now)
        self._fill()

    def _place(self, now: float) -> None:
        while self._unplaced:
            job, tokens, granted = self._unplaced[0]
            if not job.void:
                most = self.pool_tokens
                if most is not None and self.reserved_tokens and self.reserved_tokens + tokens > most:
                    return
                job.reserved = tokens
                self.assigned += 1
                self.reserved_tokens += tokens
                if self.pool_tokens is not None and self.cache.block_tokens:
                    self.cache.fit(self.pool_tokens - self.reserved_tokens)
            self._unplaced.popleft()
            if not job.void:
                granted(job, now)

    def release(self, job: Job, now: float) -> None:
        """Its pages are free. Harmless when it holds none."""
        if job.reserved:
            self.reserved_tokens = max(0, self.reserved_tokens - job.reserved)  # 0 after it was killed
            job.reserved = 0
            self.assigned = max(0, self.assigned - 1)
            self._place(now)
            self._fill()

    # Prefill.

    def prefill(self, job: Job, now: float) -> None:
        """Read it, and queue it then. `on_chunk(job, now, final)` is called as its chunks end."""
        if self.profile.latency_s > 0:
            self._reading += 1
            self._agenda.at(now + self.profile.latency_s, lambda at_s: self._read(job, at_s))
        else:
            self._enqueue(job, now)

    def _read(self, job: Job, now: float) -> None:
        self._reading -= 1
        if self.up and not job.void:
            self._enqueue(job, now)

    def _enqueue(self, job: Job, now: float) -> None:
        job.cached = job.done = self.cache.match(job.block_ids, job.prompt_tokens) if job.block_ids else 0
        job.whole_s, job.taken_s = self.works.occupied_s(job.prompt_tokens, job.cached), 0.0
        self._set_backlog(self.backlog_s + job.whole_s)
        self.backlog_tokens += job.prompt_tokens - job.cached
        self._serial += 1
        heapq.heappush(self._queue, (job.key, self._serial, job))
        if self._current is None:
            self._start_step(now)

    def give_up(self, job: Job, now: float) -> None:
        """Forget the job wherever it is here. A step that holds it isn't cut short."""
        if job.void:
            return
        job.void = True
        if job is self._begun or any(entry[2] is job for entry in self._queue):
            # What the running step does for it comes off when that ends.
            reached = next((last for one, last in self._current or () if one is job), job.done)
            self._set_backlog(self.backlog_s - (job.whole_s - self._taken_s(job, reached)))
            self.backlog_tokens -= job.prompt_tokens - reached
            if job is self._begun:
                self._begun = None
        for position, entry in enumerate(self._running):
            if entry[2] is job:
                self._catch_up(now)
                del self._running[position]
                heapq.heapify(self._running)
                self._fill_batch(now)
                self._fill()
                self._plan_decode(now)
                break
        self.release(job, now)

    def work_s(self, now: float) -> float:
        """Seconds of prefill that are left at `now`, of the running step and of all that is queued."""
        if self._current is None:
            return self.backlog_s
        return self.backlog_s - self._step_took_s + max(0.0, self._step_ends_s - now)

    def ahead_s(self, key: float, now: float) -> float:
        """Seconds until a job of this key would begin: the running step, and what is served before it."""
        ahead_s = max(0.0, self._step_ends_s - now) if self._current else 0.0
        for other, _, job in self._queue:
            if other <= key and not job.void:
                ahead_s += job.whole_s
        if self._begun is not None:
            ahead_s += self._begun.whole_s - self._begun.taken_s
        return ahead_s

    def _taken_s(self, job: Job, reached: int) -> float:
        """Seconds of its prefill up to there."""
        return self.works.occupied_s(reached, job.cached) if reached > job.cached else 0.0

    def _start_step(self, now: float) -> None:
        queue, begun = self._queue, self._begun
        while queue and queue[0][2].void:
            heapq.heappop(queue)
        if not (queue or begun) or not self.up:
            return
        decodes = self.role == "collocated"
        if decodes and len(self._running) >= self.max_batch:
            return
        left, took_s = self.chunk_tokens, 0.0
        pieces: list[tuple[Job, int]] = []
        self._begun = None
        while (queue or begun) and left > 0 and len(pieces) < self.prefill_requests:
            job = begun or heapq.heappop(queue)[2]
            begun = None
            if job.void:
                continue
            last = job.done + left
            if last < job.prompt_tokens:
                reached_s = self._taken_s(job, last)
                self._begun = job
            else:
                last, reached_s = job.prompt_tokens, job.whole_s
            took_s += reached_s - job.taken_s
            job.taken_s = reached_s
            left -= last - job.done
            pieces.append((job, last))
        if decodes:
            self._catch_up(now)
        self._current = pieces
        self.busy_s += took_s
        self._step_ends_s, self._step_took_s = now + took_s, took_s
        self._agenda.at(now + took_s, partial(self._end_step, pieces, took_s))
        if decodes:
            self._plan_decode(now)

    def _end_step(self, pieces: list[tuple[Job, int]], took_s: float, now: float) -> None:
        if self._current is not pieces:
            return  # the engine died in the meantime
        decodes = self.role == "collocated"
        if decodes:
            self._steps_at_s = now  # no token was made while it prefilled
        self._current = None
        self._set_backlog(max(0.0, self.backlog_s - took_s))
        for job, last in pieces:
            self.backlog_tokens -= last - job.done
            job.done = last
        for job, last in pieces:
            if job.void:
                continue
            final = last == job.prompt_tokens
            if final and job.block_ids:
                self.cache.insert(job.block_ids, job.prompt_tokens, job.block_tokens)
            if job.on_chunk is not None:
                job.on_chunk(job, now, final)
        if self._current is None:
            self._start_step(now)
        if decodes:
            self._plan_decode(now)

    # Decode.

    def decode(self, job: Job, now: float) -> None:
        """Its KV is here: it joins the batch between two steps (`on_join`), and ends (`on_done`)."""
        self._landed.append(job)
        self._fill_batch(now)
        self._fill()
        self._plan_decode(now)

    def _fill_batch(self, now: float) -> None:
        """Those that have landed take the free places; where it only decodes, once a step has ended."""
        self._catch_up(now)
        if not self._running:
            self._steps = float(round(self._steps))
        elif self.role == "decode" and abs(self._steps - round(self._steps)) > K_STEP_END:
            return
        while self._landed and len(self._running) < self.max_batch:
            job = self._landed.popleft()
            if job.void:
                continue
            self._serial += 1
            # The first token came with its KV.
            heapq.heappush(self._running, (self._steps + max(0, job.output_tokens - 1), self._serial, job))
            if job.on_join is not None:
                job.on_join(job, now)

    def _rate(self) -> float:
        """Decode steps a second now."""
        if not self._running or not self.up or (self.role == "collocated" and self._current is not None):
            return 0.0
        return self.works.steps_per_s(len(self._running))

    def _catch_up(self, now: float) -> None:
        passed_s = now - self._steps_at_s
        if passed_s:
            self._steps += self._rate() * passed_s
            self._steps_at_s = now

    def _plan_decode(self, now: float) -> None:
        self._catch_up(now)
        self._decode_plan = plan = self._decode_plan + 1
        rate = self._rate()
        if rate > 0:
            until = self._running[0][0]
            if self._landed and len(self._running) < self.max_batch:
                until = min(until, math.floor(self._steps + K_STEP_END) + 1)
            self._agenda.at(now + max(0.0, until - self._steps) / rate, partial(self._end_decodes, plan))

    def _end_decodes(self, plan: int, now: float) -> None:
        if plan != self._decode_plan:
            return
        self._catch_up(now)
        ended = []
        while self._running and self._running[0][0] <= self._steps + K_STEP_END:
            ended.append(heapq.heappop(self._running)[2])
        self._fill_batch(now)
        self._fill()
        self._plan_decode(now)
        for job in ended:
            self.release(job, now)
            if job.on_done is not None:
                job.on_done(job, now)
        if self.role == "collocated" and self._current is None:
            self._start_step(now)

    # Life.

    def kill(self, now: float) -> None:
        """Everything here is lost; the world gives the requests up and sends them elsewhere."""
        self.up = False
        self._current = self._begun = None
        for waiting in (self._queue, self._running, self._landed, self._unplaced):
            waiting.clear()
        self._decode_plan += 1
        self._set_backlog(0.0)
        self.backlog_tokens = self.reserved_tokens = self.assigned = 0
        self.cache.clear()
        self._able()

    def restart(self, now: float) -> None:
        """Nothing where it is up: two kills may both bring it back."""
        if self.up:
            return
        self.up = True
        self._able()
        self._steps_at_s = now

    def become(self, role: Role, now: float) -> None:
        """Change the role of an idle instance; its cache is empty then. Raises ValueError as __init__."""
        if role != "prefill" and self.profile.decode is None:
            raise ValueError(f"{self.name}: profile {self.profile.name} has no decode figures")
        self.role = role
        self.cache.clear()
        self._steps_at_s = now
        self.fullness = math.inf
        self._able()

    def drain(self, draining: bool = True) -> None:
        """Take nothing new from now on, or do again."""
        self.draining = draining
        self._able()

    def _set_backlog(self, backlog_s: float) -> None:
        self.backlog_s = backlog_s
        if self.keeps_backlog is not None:
            self.keeps_backlog[0][self.keeps_backlog[1]] = backlog_s
        if self.tally is not None and self.up and not self.draining:
            self.tally[0].backlogs[self.tally[1]] = backlog_s

    def _fill(self) -> None:
        """`fullness` anew, after anything that it counts."""
        if self.role != "prefill":
            waiting = self.waiting
            if self.up and not self.draining:
                self.fullness = (self.assigned + waiting) / self.max_batch
                if self.tally is not None:
                    tally, number = self.tally
                    tally.running[number], tally.waiting[number] = len(self._running), waiting
            else:
                self.fullness = math.inf
        if self.keeps_fullness is not None:
            self.keeps_fullness[0][self.keeps_fullness[1]] = self.fullness

    def _able(self) -> None:
        """It takes other work than before, or none any more."""
        if self.tally is not None:
            self.tally[0].stale = True
        self._fill()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._landed) + len(self._unplaced)

    @property
    def idle(self) -> bool:
        prefills = self._queue or self._begun or self._current or self._reading
        return not (prefills or self._running or self._landed or self._unplaced)
