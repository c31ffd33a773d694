"""What waits at the door for its instance: planned there as if it were sent, and bound to it by its start.

A held request has a place in its lane, so that predictions and prices count it. It is sent when the step that
it would be in begins within its lead; until then it costs nothing to send it elsewhere, and a shorter prompt
that would otherwise be late may take its place: each time that one would be late the longest so far gives
way (Moore and Hodgson), which keeps the most in time. Whoever gave way is asked for again, and so is all that
waits for an instance that is gone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from prfaas.model.ids import InstanceId, RequestId, SiteId
from prfaas.routing.lanes import K_UNHEARD_S, Lane
from prfaas.routing.steps import K_ROUNDING_S, K_STEPS_MARGIN_S, Hold, Queued, place_of, spoils, work_of

K_YIELDS = 3  # times that a request gives way: without a limit two could take turns for ever
K_MOST_YIELD = 2  # held requests that give way to one


def begins_s(lane: Lane, order_s: float, now: float) -> float:
    """When the step begins that a prompt of that place in the queue would be in first."""
    lane.look(now)
    return _step_s(lane, place_of(lane.hopeful, order_s))


def begins_behind_s(lane: Lane, order_s: float, now: float) -> float:
    """The same for one that is given up: behind all that isn't, and the given up that come before."""
    behind = lane.behind
    if not behind or behind[-1].order_s <= order_s:
        return _hopeful_end_s(lane, now) + lane.behind_s
    return _hopeful_end_s(lane, now) + sum(map(work_of, islice(behind, place_of(behind, order_s))), 0.0)


def _step_s(lane: Lane, at: int) -> float:
    at_s, left, took_s, sharing = lane.states[at]
    return at_s + took_s if left <= 0 or sharing >= lane.prefill_requests else at_s


def _hopeful_end_s(lane: Lane, now: float) -> float:
    lane.look(now)
    at_s, _, took_s, _ = lane.states[-1]
    return at_s + took_s


def first_due(lane: Lane, now: float) -> tuple[float, RequestId] | None:
    """Which of the lane's held requests is to be asked for next, and when."""
    if not lane.held:
        return None
    first: tuple[float, RequestId] | None = None
    for at, one in enumerate(lane.hopeful):
        if one.hold is not None:
            lane.look(now)
            first = _step_s(lane, at) - one.hold.lead_s, one.request
            break
    before_s = 0.0
    for one in lane.behind:
        if one.hold is not None:
            # Its own order counts in the end, whatever still comes: nothing starves at the door.
            if first is not None:
                return min(first, (one.order_s, one.request))
            return min(_hopeful_end_s(lane, now) + before_s - one.hold.lead_s, one.order_s), one.request
        before_s += one.work_s
    return first


def make_room(
    lane: Lane, order_s: float, tokens: float, work_s: float, latest_s: float, miss_s: float, now: float,
    start_up_s: float,
) -> tuple[float, list[Queued]] | None:  # fmt: skip
    """When a prefill of that place would end, and who must give way for it to be in time and all that stay.

    Those give way that cost least to be late, the longest of them first; None where that isn't enough, or
    where the new one is the first to give way.
    """
    before, hopeful = lane.look(now), lane.hopeful
    at = place_of(hopeful, order_s)
    new = Queued(order_s, 0, "", tokens, work_s, latest_s, min(start_up_s, work_s))
    kept, kept_before = [*hopeful[:at], new, *hopeful[at:]], [*before[:at], -math.inf, *before[at:]]
    out: list[Queued] = []
    same = at  # so many at the front are as they were
    while True:
        state = lane.states[same]
        shared = same - state[3]
        """From here on ends may differ: these end with the step that the first who differs is in."""
        ends, late = lane.walk(kept[same:], state), -1
        for place in range(shared, len(kept)):
            one, end_s = kept[place], ends[place - shared]
            if one is new:
                own_end_s = end_s
                is_late = end_s > latest_s - K_STEPS_MARGIN_S
            else:
                is_late = spoils(kept_before[place], end_s, one.latest_s)
            if is_late:
                late = place
                break
        if late < 0:
            return own_end_s, out
        if len(out) == K_MOST_YIELD:
            return None
        first, longest = _first_to_yield(kept[: late + 1])
        if longest is None or longest >= (miss_s, -work_s):
            return None
        out.append(kept.pop(first))
        del kept_before[first]
        same = min(same, first)


def longest_held(lane: Lane) -> tuple[float, float] | None:
    """Who would give way first there, as (what its being late costs, less its work)."""
    if not lane.held:
        return None
    return _first_to_yield(lane.hopeful)[1]


def _first_to_yield(entries: Sequence[Queued]) -> tuple[int, tuple[float, float] | None]:
    """Which of them gives way first, and what that costs: being late, less its work. None: nobody may."""
    first, least = -1, None
    for place, one in enumerate(entries):
        hold = one.hold
        if hold is not None and hold.yields:
            cost = hold.miss_s, -one.work_s
            if least is None or cost < least:
                first, least = place, cost
    return first, least


class Lanes:
    """All instances'. Every request ends by `drop`, which may be repeated."""

    def __init__(self) -> None:
        self.lanes: dict[InstanceId, Lane] = {}
        self.sweep_at_s = -math.inf
        self._where: dict[RequestId, Lane] = {}
        self._serial = 0
        self._held: dict[RequestId, Lane] = {}
        self._recalled: dict[RequestId, None] = {}
        """Held without a place: to be asked for at once."""
        self._yielded: Counter[RequestId] = Counter()
        self._turns: Counter[RequestId] = Counter()
        self._due: dict[Lane, tuple[float, RequestId]] = {}
        """The first held of each lane, and when it is to be asked for."""
        self._moved: dict[Lane, None] = {}
        """Lanes whose entry there is to be found anew; in order, so that a run can be played again."""

    def sweep(self, now: float) -> None:
        """Forget lanes without work: instances come and go. Those that stay get another at the next look."""
        self.sweep_at_s = now + K_UNHEARD_S
        self.lanes = {name: lane for name, lane in self.lanes.items() if lane.busy(now)}

    def get(self, instance: InstanceId | None) -> Lane | None:
        return None if instance is None else self.lanes.get(instance)

    def add(
        self, request: RequestId, lane: Lane, order_s: float, tokens: float, work_s: float, latest_s: float,
        now: float, start_up_s: float = 0.0, hold: Hold | None = None,
    ) -> None:  # fmt: skip
        """It was sent to an instance, or is to be."""
        self.drop(request, now)
        self._serial += 1
        start_up_s = min(start_up_s, work_s)
        lane.add(Queued(order_s, self._serial, request, tokens, work_s, latest_s, start_up_s, hold), now)
        self._where[request] = lane
        if hold is not None:
            self._held[request] = lane
            self._turns[request] += 1
        self.touch(lane)

    def done(self, request: RequestId, now: float, ago_s: float = 0.0) -> None:
        lane = self._where.pop(request, None)
        if lane is not None:
            lane.done(request, now, ago_s)
            self.touch(lane)

    def drop(self, request: RequestId, now: float) -> None:
        self._recalled.pop(request, None)
        self._held.pop(request, None)
        lane = self._where.pop(request, None)
        if lane is not None:
            lane.drop(request, now)
            self.touch(lane)

    def forget(self, request: RequestId, now: float) -> None:
        """It waits nowhere any more, whatever became of it."""
        self.drop(request, now)
        self._yielded.pop(request, None)
        self._turns.pop(request, None)

    # What is held.

    def held(self) -> int:
        return len(self._held) + len(self._recalled)

    def holds(self, request: RequestId) -> bool:
        return request in self._held or request in self._recalled

    def where(self, request: RequestId) -> Lane | None:
        """The instance that it was sent to, or is held for."""
        return self._where.get(request)

    def turns(self, request: RequestId) -> int:
        """How often it was held so far."""
        return self._turns.get(request, 0)

    def yields(self, request: RequestId) -> bool:
        """Whether it may still give way."""
        return self._yielded[request] < K_YIELDS if request in self._yielded else True

    def give_way(self, request: RequestId, now: float) -> None:
        """It loses its place to another."""
        if request in self._held:
            self._yielded[request] += 1
            self.recall(request, now)

    def recall(self, request: RequestId, now: float) -> None:
        """It must be decided anew. Nothing where it isn't held."""
        if request in self._held:
            self.drop(request, now)
            self._recalled[request] = None

    def recall_all(self, home: SiteId, now: float) -> None:
        """All that is to be decoded at `home`, in the order of service: there is somewhere else to go."""
        held = [
            one
            for lane in dict.fromkeys(self._held.values())
            for one in (*lane.hopeful, *lane.behind)
            if one.hold is not None and one.hold.home == home
        ]
        for one in sorted(held):
            self.recall(one.request, now)

    def recall_from(self, instances: Iterable[InstanceId], home: SiteId, now: float) -> None:
        """All that is held for these instances and is to be decoded at `home`."""
        for instance in instances:
            lane = self.lanes.get(instance)
            for one in [*lane.hopeful, *lane.behind] if lane is not None else ():
                if one.hold is not None and one.hold.home == home:
                    self.recall(one.request, now)

    def touch(self, lane: Lane) -> None:
        """Its steps may begin at other times than before."""
        if self._held:
            self._moved[lane] = None

    def due(self, now: float) -> tuple[list[RequestId], float]:
        """Held requests to be asked for now, and when to look again (inf: when something has happened)."""
        found, next_s = list(self._recalled), math.inf
        for lane in self._moved:
            self._look(lane, now)
        self._moved.clear()
        for lane, (at_s, request) in list(self._due.items()):
            if at_s <= now + K_ROUNDING_S:
                # Others' work may be before it still.
                at_s, request = self._look(lane, now)
                if at_s <= now + K_ROUNDING_S:
                    found.append(request)
                    continue
            next_s = min(next_s, at_s)
        return found, next_s

    def _look(self, lane: Lane, now: float) -> tuple[float, RequestId]:
        lane.advance(now)
        first = first_due(lane, now)
        if first is None:
            self._due.pop(lane, None)
            return math.inf, ""
        self._due[lane] = first
        return first

    def __len__(self) -> int:
        return len(self._where)
