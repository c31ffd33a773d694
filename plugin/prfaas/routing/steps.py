"""The steps that a prefill instance will take over its queue, reckoned ahead: when each prompt would end.

A step takes at most `chunk_tokens` and `prefill_requests`, filled in order of service; whatever is in a step
is done at its end. So a prompt's prefill ends later than the work before it says: by the rest of what runs,
and by what shares its last step. Near a deadline that decides, and a request that is let in by a wrong
account makes all behind it late.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias

from prfaas.model.ids import RequestId, SiteId

K_STEPS_MARGIN_S = 0.05  # s by which a prediction by the instance's own steps must keep a deadline
K_ROUNDING_S = 1e-6  # s by which sums of the same seconds in another order may differ, and more

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


work_of = attrgetter("work_s")
_order_of = attrgetter("order_s")


class Steps:
    """One instance's, over what waits there. Whoever changes what waits says so by `_ends = None`."""

    def __init__(self, chunk_tokens: int, prefill_requests: float = math.inf) -> None:
        self.chunk_tokens = chunk_tokens
        self.prefill_requests = prefill_requests
        """Most prompts of a step; inf: as many as fit."""
        self.hopeful: list[Queued] = []
        """In order of service; first, whatever else it is, the prompt that the running step cuts."""
        self.behind: list[Queued] = []
        """Those given up; they are served after all others."""
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
        self._ends: list[float] | None = []
        """When each of `hopeful` ends, as things stand; None: to be found."""
        self.states: list[_State] = []
        """Where the steps stand before each of `hopeful`, and after the last; as of `_ends`."""

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
        end_s = self.end_s(order_s, tokens, work_s, now, start_up_s)
        return end_s, self.makes_late(order_s, tokens, work_s, now, start_up_s)

    def makes_late(
        self, order_s: float, tokens: float, work_s: float, now: float, start_up_s: float = 0.0
    ) -> int:
        """How many of those that wait a prefill of that place in the queue would make late."""
        hopeful = self.hopeful
        if not hopeful:
            return 0
        if self._ends is None or self.ends_s <= now + self.early_s:
            self.look(now)
        following = taken = place_of(hopeful, order_s)
        at_s, left, took_s, sharing = self.states[taken]
        judged = taken - sharing
        """Those from here to `taken` end with the step that is being filled."""
        if judged == len(hopeful):
            return 0
        if start_up_s > work_s:
            start_up_s = work_s
        chunk, most, late = float(self.chunk_tokens), self.prefill_requests, 0
        # As in `walk`, but that each is judged once its end is known.
        while True:
            if left <= 0 or sharing >= most:
                at_s += took_s
                late += self._spoilt(judged, taken, at_s)
                judged, left, took_s, sharing = taken, chunk, 0.0, 0
            if tokens > left:
                a_token_s = (work_s - start_up_s) / tokens
                at_s += took_s + start_up_s + left * a_token_s
                late += self._spoilt(judged, taken, at_s)
                judged, sharing = taken, 0
                tokens -= left
                whole = (math.ceil(tokens / chunk) - 1) * chunk
                at_s += whole * a_token_s
                tokens -= whole
                work_s, took_s, left = tokens * a_token_s, 0.0, chunk
            took_s += work_s
            left -= tokens
            sharing += 1
            taken = following
            if taken == len(hopeful):
                return late + self._spoilt(
                    judged, taken, at_s + self._filled_up(left, took_s, most - sharing)
                )
            one = hopeful[taken]
            tokens, work_s, start_up_s = one.tokens, one.work_s, one.start_up_s
            following += 1

    def _spoilt(self, begin: int, until: int, end_s: float) -> int:
        """How many of these are late where they end then, and wouldn't be otherwise."""
        before, late = self._ends, 0
        assert before is not None  # who asks has looked
        for place in range(begin, until):
            late += spoils(before[place], end_s, self.hopeful[place].latest_s)
        return late

    def end_s(self, order_s: float, tokens: float, work_s: float, now: float, start_up_s: float) -> float:
        """When a prefill of that place in the queue would end: as `place` says, without looking at the others
        again.
        """
        hopeful, chunk = self.hopeful, float(self.chunk_tokens)
        if hopeful:
            if self._ends is None or self.ends_s <= now + self.early_s:
                self.look(now)
            at = place_of(hopeful, order_s)
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
        return at_s + (self._filled_up(left, took_s, room) if self.behind else took_s)

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


def place_of(entries: Sequence[Queued], order_s: float) -> int:
    """Where one of that order comes among them: behind its equals."""
    if not entries or entries[-1].order_s <= order_s:
        return len(entries)
    return bisect_right(entries, order_s, key=_order_of)


def spoils(before_s: float, after_s: float, latest_s: float) -> bool:
    """Whether an end that moves from before_s to after_s is too late, or nearly, and wasn't."""
    late = after_s > latest_s - K_STEPS_MARGIN_S
    return late and before_s <= latest_s and after_s > before_s + K_ROUNDING_S
