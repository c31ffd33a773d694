"""What each prefill instance has before it, as far as is known at the door: an account that keeps its steps.

What comes while a step runs waits for its end, however urgent it is. A prompt that a step has cut goes on
before all others, as SGLang's chunked request does, so that what comes waits for all of it.

A lane is told what was sent to its instance and what was done. Where the instance is slower than reckoned,
all that follows moves back; where it reports more work than is known here, others have sent it. What the
door keeps for this instance has its place here as well; no step takes it before it is sent.
"""

from __future__ import annotations

import math
from itertools import chain
from operator import attrgetter

from prfaas.model.ids import RequestId
from prfaas.routing.steps import K_ROUNDING_S, Queued, Steps, place_of, work_of

K_FOREIGN_S = 0.5  # s by which a report must exceed what is known here for others' work to count
K_UNHEARD_S = 60.0  # s after which an instance's last report says nothing
K_REMEMBERED = 64  # requests reckoned done and not yet said to be

_hold_of = attrgetter("hold")


class Lane(Steps):
    """One instance's."""

    def __init__(self, chunk_tokens: int, prefill_requests: float = math.inf) -> None:
        super().__init__(chunk_tokens, prefill_requests)
        self.step: list[Queued] = []
        """What the running step ends; what it only goes on with is queued still, for what will be left."""
        self.held = 0
        """How many of those queued are still at the door."""
        self._shift_s = 0.0
        """By how much this account was moved back."""
        self._idle_s = 0.0
        """Seconds without a step, in all: what was late before them doesn't move what came after."""
        self._reckoned: dict[RequestId, tuple[float, float, float]] = {}
        """Done by this account: when, and the shift and the idle seconds then."""

    def busy(self, now: float) -> bool:
        """Whether anything waits here, or runs, as far as is known. Others' work counts while the instance is
        heard of.
        """
        self.advance(now)
        foreign = self.foreign_s and now - self.reported_s < K_UNHEARD_S
        return bool(self.step or self.hopeful or self.behind or foreign or self._reckoned)

    def cut(self, chunk_tokens: int, prefill_requests: float = math.inf) -> None:
        """Its steps are of this size from the next one on."""
        self.chunk_tokens, self.prefill_requests = chunk_tokens, prefill_requests
        self._ends = None

    def add(self, entry: Queued, now: float) -> None:
        self.advance(now)
        self._reckoned.pop(entry.request, None)  # of an earlier attempt
        self.held += entry.hold is not None
        if math.isinf(entry.latest_s):
            self.behind.insert(place_of(self.behind, entry.order_s), entry)
            self.behind_s += entry.work_s
        else:
            self.hopeful.insert(place_of(self.hopeful, entry.order_s), entry)
            self.hopeful_s += entry.work_s
        if self.ends_s <= now + self.early_s:
            self._start(now + self.early_s)
        self._ends = None

    def done(self, request: RequestId, now: float, ago_s: float = 0.0) -> None:
        """The instance says so, of ago_s before."""
        self.advance(now)
        reckoned = self._reckoned.pop(request, None)
        if reckoned is not None:
            due_s = reckoned[0] + self._shift_s - reckoned[1]
            late_s = now - ago_s - due_s  # below 0 where the next step was reckoned begun before it was
            if self._idle_s > reckoned[2]:
                late_s = max(0.0, late_s - self._idle_s + reckoned[2])
            self._shift_s += late_s
            if self.ends_s > now:
                self.ends_s += late_s
                self._ends = None
        elif any(entry.request == request for entry in self.step):
            # Sooner than reckoned, and all of its step with it.
            self.ends_s = now - ago_s
            self.step = [entry for entry in self.step if entry.request != request]
            self.advance(now)
        else:
            begun = self.hopeful[0] if self.hopeful else None
            self.drop(request, now)
            if begun is not None and begun.request == request and begun.order_s == -math.inf:
                # The running step was the last that it needed.
                self.ends_s, self.step = now - ago_s, []
                self.advance(now)

    def drop(self, request: RequestId, now: float) -> None:
        """It won't be prefilled here, as far as it isn't yet. A step that holds it isn't cut short."""
        self.advance(now)
        self._reckoned.pop(request, None)
        for entry in self.step:
            if entry.request == request:
                entry.request = ""  # the step goes on, for nobody
        for entries in (self.hopeful, self.behind):
            for place, entry in enumerate(entries):
                if entry.request == request:
                    del entries[place]
                    self.held -= entry.hold is not None
                    self._left(entries, entry.work_s)
                    self._ends = None
                    return

    def report(self, backlog_s: float, at_s: float, now: float) -> None:
        """The instance had so much work at at_s, that of this account included."""
        if at_s <= self.reported_s:
            return
        self.reported_s = at_s
        if backlog_s <= K_FOREIGN_S and not self.foreign_s:
            return
        running_s = self.ends_s - now
        if not self.foreign_s and backlog_s <= K_FOREIGN_S - K_ROUNDING_S + max(0.0, running_s) + now - at_s:
            return  # the running step explains it, whatever is queued
        known_s = self.work_s(now) - self.foreign_s - self.held_s() + (now - at_s)
        self._others(backlog_s - known_s)

    def report_others(self, others_s: float, at_s: float) -> None:
        """So much of what the instance had at at_s isn't ours: as `report`, from a door that tells the two
        apart. Ours is known here better: what the door hasn't had an answer to may long be prefilled, and
        crossing to where it is decoded.
        """
        if at_s > self.reported_s:
            self.reported_s = at_s
            self._others(others_s)

    def _others(self, foreign_s: float) -> None:
        foreign_s = foreign_s if foreign_s > K_FOREIGN_S else 0.0
        if foreign_s != self.foreign_s:
            self.foreign_s = foreign_s
            self._ends = None

    def advance(self, now: float) -> None:
        """Steps that have ended by now."""
        until_s = now + self.early_s
        while self.ends_s <= until_s and (self.step or self.hopeful or self.behind):
            if self.step:
                for entry in self.step:
                    if entry.request:  # else for nobody, and nobody will say that it is done
                        self._reckoned[entry.request] = (self.ends_s, self._shift_s, self._idle_s)
                while len(self._reckoned) > K_REMEMBERED:
                    del self._reckoned[next(iter(self._reckoned))]
                self.step = []
            first = self.hopeful[0] if self.hopeful else None
            if first is not None and first.order_s == -math.inf and first.tokens > self.chunk_tokens:
                self._go_on(first, until_s)
            elif not self._start(self.ends_s):
                return  # all that is left is still at the door

    def _go_on(self, cut: Queued, until_s: float) -> None:
        """Steps that begin by then with nothing in them but the prompt that was cut: most of long ones."""
        chunk, tokens, work_s = float(self.chunk_tokens), cut.tokens, cut.work_s
        began_s = self.ends_s
        while self.ends_s <= until_s and tokens > chunk:
            took_s = work_s * chunk / tokens
            tokens -= chunk
            work_s -= took_s
            self.hopeful_s -= took_s
            self.ends_s += took_s
        cut.tokens, cut.work_s = tokens, work_s
        if self._ends is not None and self.states[0][0] == began_s:
            # All end when they were reckoned to: looking again would find the same, but for rounding.
            self.states[0] = self.ends_s, chunk, 0.0, 0
        else:
            self._ends = None

    def _start(self, at_s: float) -> bool:
        """The next step, from at_s on; False where nothing is there for it."""
        left, took_s = float(self.chunk_tokens), 0.0
        self._ends = None
        hopeful, behind = self.hopeful, self.behind
        room: float = len(hopeful) + len(behind) - self.held  # those that were sent
        if room > self.prefill_requests:
            room = self.prefill_requests
        for entries in (hopeful, behind) if behind else (hopeful,):
            at = 0
            while room > 0 and left > 0 and at < len(entries):
                entry = entries[at]
                if entry.hold is not None:
                    at += 1
                    continue
                room -= 1
                tokens = entry.tokens
                if tokens <= left:
                    del entries[at]
                    self.step.append(entry)
                    work_s = entry.work_s
                    self._left(entries, work_s)
                    took_s += work_s
                    left -= tokens
                    continue
                part_s = entry.start_up_s + (entry.work_s - entry.start_up_s) * left / entry.tokens
                entry.tokens -= left
                entry.work_s -= part_s
                entry.start_up_s, entry.order_s = 0.0, -math.inf  # nothing overtakes it now
                self._left(entries, part_s)
                took_s, left = took_s + part_s, 0.0
                if at or entries is behind:
                    del entries[at]
                    hopeful.insert(0, entry)
                if entries is behind:
                    self._left(behind, entry.work_s)
                    self.hopeful_s += entry.work_s
        if left < self.chunk_tokens:
            self._begin(at_s, took_s)
            return True
        return False

    def _begin(self, at_s: float, took_s: float) -> None:
        if at_s > self.ends_s > -math.inf:
            self._idle_s += at_s - self.ends_s
        self.ends_s = at_s + took_s

    def _left(self, entries: list[Queued], work_s: float) -> None:
        """So much of the queue's work is gone."""
        if entries is self.hopeful:
            self.hopeful_s = self.hopeful_s - work_s if entries else 0.0
        else:
            self.behind_s = self.behind_s - work_s if entries else 0.0

    def held_s(self) -> float:
        """Work that is still at the door."""
        if not self.held:
            return 0.0
        return sum(map(work_of, filter(_hold_of, chain(self.hopeful, self.behind))), 0.0)
