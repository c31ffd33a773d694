"""What each prefill instance has before it: the same steps that the instance will take, reckoned ahead.

An instance takes steps of at most `chunk_tokens` and `prefill_requests`, filled in order of service;
whatever is in a step is done at its end, and what comes meanwhile waits for that end, however urgent it is.
A prompt that a step has cut goes on before all others, as SGLang's chunked request does, so that what comes
waits for all of it. So a prompt's prefill ends later than the work before it says: by the rest of what runs,
and by what shares its last step. Near a deadline that decides, and a request that is let in by a wrong
account makes all behind it late.

A lane is told what was sent to its instance and what was done. Where the instance is slower than reckoned,
all that follows moves back; where it reports more work than is known here, others have sent it. What the
door keeps for this instance has its place here as well; no step takes it before it is sent.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from prfaas.model.ids import RequestId, SiteId

K_STEPS_MARGIN_S = 0.05  # s by which a prediction by the instance's own steps must keep a deadline
K_ROUNDING_S = 1e-6  # s by which sums of the same seconds in another order may differ, and more
K_FOREIGN_S = 0.5  # s by which a report must exceed what is known here for others' work to count
K_UNHEARD_S = 60.0  # s after which an instance's last report says nothing
K_REMEMBERED = 64  # requests reckoned done and not yet said to be


_State: TypeAlias = tuple[float, float, float, int]
"""Of steps reckoned ahead: when the one being filled begins, tokens left in it, its seconds so far,
and how many prompts it ends."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What the door knows of a request that it keeps for an instance."""

    lead_s: float
    """So long before its step begins it must be sent."""
    miss_s: float
    """What it costs if it is late."""
    home: SiteId
    """Where it is to be decoded."""
    yields: bool = True
    """Whether it may lose its place to a shorter one."""


@dataclass(slots=True, order=True)
class Queued:
    """One request at an instance: what is left of its prefill."""

    order_s: float
    serial: int
    request: RequestId = field(compare=False)
    tokens: float = field(compare=False)
    work_s: float = field(compare=False)
    latest_s: float = field(compare=False)
    """When its prefill must have ended for its first token to be in time; inf where that is given up."""
    start_up_s: float = field(compare=False, default=0.0)
    """Part of the work that comes with its first tokens, however few: T(0) of the profile."""
    hold: Hold | None = field(compare=False, default=None)
    """None: it was sent."""


class Lane:
    """One instance's."""

    def __init__(self, chunk_tokens: int, prefill_requests: float = math.inf) -> None:
        self.chunk_tokens = chunk_tokens
        self.prefill_requests = prefill_requests
        """Most prompts of a step; inf: as many as fit."""
        self.hopeful: list[Queued] = []
        """In order of service; first, whatever else it is, the prompt that the running step cuts."""
        self.behind: list[Queued] = []
        """Those given up; they are served after all others."""
        self.step: list[Queued] = []
        """What the running step ends; what it only goes on with is queued still, for what will be left."""
        self.ends_s = -math.inf
        """When the running step ends; in the past where none runs."""
        self.hopeful_s = self.behind_s = 0.0
        """Work queued, beyond the running step."""
        self.foreign_s = 0.0
        """Work that others have sent, by the last report; counts as served first."""
        self.reported_s = -math.inf
        """When the last report was made."""
        self.early_s = 0.0
        """So long before a step begins whatever is to be in it must have been sent."""
        self._shift_s = 0.0
        """By how much this account was moved back."""
        self._idle_s = 0.0
        """Seconds without a step, in all: what was late before them doesn't move what came after."""
        self._reckoned: dict[RequestId, tuple[float, float, float]] = {}
        """Done by this account: when, and the shift and the idle seconds then."""
        self._ends: list[float] | None = []
        """When each of `hopeful` ends, as things stand; None: to be found."""
        self.states: list[_State] = []
        """Where the steps stand before each of `hopeful`, and after the last; as of `_ends`."""

    def busy(self, now: float) -> bool:
        """Whether anything waits here, or runs, as far as is known. Others' work counts while the instance is
        heard of.
        """
        self.advance(now)
        foreign = self.foreign_s and now - self.reported_s < K_UNHEARD_S
        return bool(self.step or self.hopeful or self.behind or foreign or self._reckoned)

    # What happens.

    def cut(self, chunk_tokens: int, prefill_requests: float = math.inf) -> None:
        """Its steps are of this size from the next one on."""
        self.chunk_tokens, self.prefill_requests = chunk_tokens, prefill_requests
        self._ends = None

    def add(self, entry: Queued, now: float) -> None:
        self.advance(now)
        self._reckoned.pop(entry.request, None)  # of an earlier attempt
        if math.isinf(entry.latest_s):
            insort(self.behind, entry)
            self.behind_s += entry.work_s
        else:
            insort(self.hopeful, entry)
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
        known_s = self.work_s(now) - self.foreign_s - self.held_s() + (now - at_s)
        foreign_s = backlog_s - known_s
        foreign_s = foreign_s if foreign_s > K_FOREIGN_S else 0.0
        if foreign_s != self.foreign_s:
            self.foreign_s = foreign_s
            self._ends = None

    def advance(self, now: float) -> None:
        """Steps that have ended by now."""
        while self.ends_s <= now + self.early_s and (self.step or self.hopeful or self.behind):
            for entry in self.step:
                if entry.request:  # else for nobody, and nobody will say that it is done
                    self._reckoned[entry.request] = (self.ends_s, self._shift_s, self._idle_s)
            while len(self._reckoned) > K_REMEMBERED:
                del self._reckoned[next(iter(self._reckoned))]
            self.step = []
            if not self._start(self.ends_s):
                return  # all that is left is still at the door

    def _start(self, at_s: float) -> bool:
        """The next step, from at_s on; False where nothing is there for it."""
        left, took_s = float(self.chunk_tokens), 0.0
        room = self.prefill_requests
        self._ends = None
        for entries in (self.hopeful, self.behind):
            at = 0
            while at < len(entries) and left > 0 and room > 0:
                entry = entries[at]
                if entry.hold is not None:
                    at += 1
                    continue
                room -= 1
                if entry.tokens > left:
                    part_s = entry.start_up_s + (entry.work_s - entry.start_up_s) * left / entry.tokens
                    entry.tokens -= left
                    entry.work_s -= part_s
                    entry.start_up_s, entry.order_s = 0.0, -math.inf  # nothing overtakes it now
                    self._left(entries, part_s)
                    took_s, left = took_s + part_s, 0.0
                    del entries[at]
                    self.hopeful.insert(0, entry)
                    if entries is self.behind:
                        self._left(self.behind, entry.work_s)
                        self.hopeful_s += entry.work_s
                else:
                    del entries[at]
                    self.step.append(entry)
                    self._left(entries, entry.work_s)
                    took_s, left = took_s + entry.work_s, left - entry.tokens
        if left < self.chunk_tokens:
            if at_s > self.ends_s > -math.inf:
                self._idle_s += at_s - self.ends_s
            self.ends_s = at_s + took_s
            return True
        return False

    def _left(self, entries: list[Queued], work_s: float) -> None:
        """So much of the queue's work is gone."""
        if entries is self.hopeful:
            self.hopeful_s = self.hopeful_s - work_s if entries else 0.0
        else:
            self.behind_s = self.behind_s - work_s if entries else 0.0

    # What would be.

    def held_s(self) -> float:
        """Work that is still at the door."""
        return sum(one.work_s for some in (self.hopeful, self.behind) for one in some if one.hold)

    def work_s(self, now: float) -> float:
        """All work before the instance."""
        running_s = self.ends_s - now
        return (running_s if running_s > 0 else 0.0) + self.foreign_s + self.hopeful_s + self.behind_s

    def hoped_s(self, now: float) -> float:
        """Work before it that is still to be in time."""
        running_s = self.ends_s - now
        return (running_s if running_s > 0 else 0.0) + self.foreign_s + self.hopeful_s

    def place(
        self, order_s: float, tokens: float, work_s: float, now: float, start_up_s: float = 0.0
    ) -> tuple[float, int]:
        """When a prefill of that place in the queue would end, and how many it would make late."""
        hopeful = self.hopeful
        if not hopeful:
            return self.end_s(order_s, tokens, work_s, now, start_up_s), 0
        before = self.look(now)
        at = bisect_right(hopeful, order_s, key=order_of)
        new = Queued(order_s, 0, "", tokens, work_s, math.inf, min(start_up_s, work_s))
        state = self.states[at]
        sharing = state[3]
        ends = self.walk([new, *hopeful[at:]], state)
        late, gone = 0, at - sharing - 1
        for place in range(at, len(hopeful)):
            late += spoils(before[place], ends[place - gone], hopeful[place].latest_s)
        # One whose step it fills up ends later, though it comes before.
        for place in range(at - sharing, at):
            late += spoils(before[place], ends[0], hopeful[place].latest_s)
        return ends[sharing], late

    def end_s(self, order_s: float, tokens: float, work_s: float, now: float, start_up_s: float) -> float:
        """When a prefill of that place in the queue would end: as `place` says, without looking at the others
        again.
        """
        hopeful, chunk = self.hopeful, float(self.chunk_tokens)
        if hopeful:
            if self._ends is None or self.ends_s <= now + self.early_s:
                self.look(now)
            at = bisect_right(hopeful, order_s, key=order_of)
            at_s, left, took_s, sharing = self.states[at]
            if left <= 0 or sharing >= self.prefill_requests:
                at_s += took_s
                left, took_s, sharing = chunk, 0.0, 0
        else:
            at_s = self.free_s(now)
            if not self.behind:
                return at_s + work_s
            at, left, took_s, sharing = 0, chunk, 0.0, 0
        # As in `walk`, from here to the end of the step that ends it.
        if tokens > left:
            if start_up_s > work_s:
                start_up_s = work_s
            a_token_s = (work_s - start_up_s) / tokens
            at_s += took_s + start_up_s + left * a_token_s
            tokens -= left
            whole = (math.ceil(tokens / chunk) - 1) * chunk
            at_s += whole * a_token_s
            tokens -= whole
            work_s, took_s, left, sharing = tokens * a_token_s, 0.0, chunk, 0
        took_s += work_s
        left -= tokens
        room = self.prefill_requests - sharing - 1
        for entry in hopeful[at:]:
            if left <= 0 or room <= 0:
                return at_s + took_s
            room -= 1
            tokens = entry.tokens
            if tokens > left:
                a_token_s = (entry.work_s - entry.start_up_s) / tokens
                return at_s + (took_s + entry.start_up_s + left * a_token_s)
            took_s += entry.work_s
            left -= tokens
        return at_s + self._filled_up(left, took_s, room)

    def look(self, now: float) -> list[float]:
        """When each of `hopeful` ends: reckoned anew where something has changed."""
        ends = self._ends
        if ends is None or self.ends_s <= now + self.early_s:
            self.states = []
            ends = self._ends = self.walk(self.hopeful, self.first(now), self.states)
        return ends

    def free_s(self, now: float) -> float:
        """When the first step begins that what comes now can be in. Others' work is served as time passes."""
        soonest_s, free_s = now + self.early_s, self.ends_s
        if self.foreign_s:
            free_s = max(free_s, self.reported_s) + self.foreign_s
        return free_s if free_s > soonest_s else soonest_s

    def first(self, now: float) -> _State:
        return self.free_s(now), float(self.chunk_tokens), 0.0, 0

    def walk(
        self, entries: Sequence[Queued], state: _State, states: list[_State] | None = None
    ) -> list[float]:
        """When the prefill of each ends, those first that share the step that `state` fills. `states` gets
        where the steps stand before each, and after the last.
        """
        chunk, most = float(self.chunk_tokens), self.prefill_requests
        at_s, left, took_s, sharing = state
        ends: list[float] = []
        for entry in entries:
            if states is not None:
                states.append((at_s, left, took_s, sharing))
            tokens, work_s = entry.tokens, entry.work_s
            if left <= 0 or sharing >= most:
                at_s += took_s
                ends += [at_s] * sharing
                left, took_s, sharing = chunk, 0.0, 0
            if tokens > left:
                # It fills this step, perhaps further ones, and begins another.
                a_token_s = (work_s - entry.start_up_s) / tokens
                at_s += took_s + entry.start_up_s + left * a_token_s
                if sharing:
                    ends += [at_s] * sharing
                    sharing = 0
                tokens -= left
                whole = (math.ceil(tokens / chunk) - 1) * chunk
                at_s += whole * a_token_s
                tokens -= whole
                work_s, took_s, left = tokens * a_token_s, 0.0, chunk
            took_s += work_s
            left -= tokens
            sharing += 1
        if states is not None:
            states.append((at_s, left, took_s, sharing))
        if sharing:
            ends += [at_s + self._filled_up(left, took_s, most - sharing)] * sharing
        return ends

    def _filled_up(self, left: float, took_s: float, room: float) -> float:
        """Seconds of the last step, once those that are given up have filled what is left of it."""
        for entry in self.behind:
            if left <= 0 or room <= 0:
                break
            room -= 1
            if entry.tokens <= left:
                took_s += entry.work_s
            else:
                took_s += entry.start_up_s + (entry.work_s - entry.start_up_s) * left / entry.tokens
            left -= entry.tokens
        return took_s


def order_of(entry: Queued) -> float:
    return entry.order_s


def spoils(before_s: float, after_s: float, latest_s: float) -> bool:
    """Whether an end that moves from before_s to after_s is too late, or nearly, and wasn't."""
    late = after_s > latest_s - K_STEPS_MARGIN_S
    return late and before_s <= latest_s and after_s > before_s + K_ROUNDING_S
