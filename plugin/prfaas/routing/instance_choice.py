"""The choice among single instances: each path at each instance, by what that instance has before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prfaas.model.decisions import PathPrediction
from prfaas.model.ids import InstanceId, ModelId, RequestId, SiteId
from prfaas.model.observations import RequestView, Snapshot
from prfaas.routing.held import Lanes, longest_held, make_room
from prfaas.routing.lanes import K_FOREIGN_S, Lane
from prfaas.routing.paths import PathFinder, transfer_tail_s
from prfaas.routing.steps import K_ROUNDING_S, K_STEPS_MARGIN_S

K_GUARD_S = 0.01  # s before a step begins in which nothing is sent that is to be in it
K_LOOKED_AT = 8  # instances of a site, those with least to do,
K_HOLDERS = 2  # and so many more that hold some of the prompt

SortedLane: TypeAlias = tuple[float, InstanceId, Lane]
"""With its work that is still to be in time, seconds, first."""
SiteLanes: TypeAlias = dict[SiteId, list[SortedLane]]


Asked: TypeAlias = tuple[float, int, PathPrediction, float, list[SortedLane]]
"""What a path costs at the site's least busy instance, roughly, and its number; the path, its price, and the
instances that it is looked at for."""


@dataclass(slots=True)
class Choice:
    """A path at one instance, and a place in its queue."""

    path: PathPrediction
    instance: InstanceId
    queue_s: float
    prefill_s: float
    tokens: int
    """To be prefilled there."""
    tail_s: float
    price: float
    cost: float
    misses: bool = False
    """It is late, or makes another late."""
    gives_up: tuple[RequestId, ...] = ()
    """Held requests that lose their place to it."""

    def prediction(self) -> PathPrediction:
        """The path as it is at this instance."""
        path = self.path
        return PathPrediction(
            path.prefill_site,
            path.decode_site,
            self.queue_s + path.move_s + self.prefill_s + self.tail_s,
            self.queue_s,
            self.prefill_s,
            self.tail_s,
            self.tokens,
            path.transfer_bytes,
            path.move_s,
            path.cache_move,
            self.price,
        )


class InstanceChooser:
    """Looks at the instances that a snapshot lists. What was sent where is told to `lanes`."""

    def __init__(self, paths: PathFinder) -> None:
        self._paths = paths
        self.lanes = Lanes()
        self._usable: dict[tuple[SiteId, SiteId, ModelId], frozenset[InstanceId]] = {}
        """Instances that could take a new request of a model, by the site and where it is decoded."""

    def lanes_of(
        self, request: RequestView, paths: Sequence[PathPrediction], snapshot: Snapshot, now: float
    ) -> SiteLanes | None:
        """Each site's instances, with the work of each that is still to be in time, least first; None where
        a site doesn't list them.

        Of many, those with least to do, and some that hold part of the prompt.
        """
        if now >= self.lanes.sweep_at_s:
            self.lanes.sweep(now)
        lanes: SiteLanes = {}
        for path in paths:
            site = path.prefill_site
            if site in lanes:
                continue
            found: list[SortedLane] = []
            if path.feasible:
                found = lanes[site] = self._lanes_at(request, path, snapshot, now)
                if not found:
                    return None
            if request.attempt:
                continue  # one that failed somewhere doesn't see all that others do
            known = self._usable.get((site, path.decode_site, request.model))
            # One that goes as another comes is noticed when its turn would be.
            if (known is None or len(known) != len(found)) and self._changed(request, path, found, now):
                # What was held is without its place now.
                return self.lanes_of(request, paths, snapshot, now)
        for site, found in lanes.items():
            found.sort()
            if len(found) > K_LOOKED_AT:
                held = request.instance_cached_tokens
                holders = [one for one in found[K_LOOKED_AT:] if held.get(one[1])]
                holders.sort(key=lambda one: -held[one[1]])
                lanes[site] = found[:K_LOOKED_AT] + holders[:K_HOLDERS]
        return lanes

    def _lanes_at(
        self, request: RequestView, path: PathPrediction, snapshot: Snapshot, now: float
    ) -> list[SortedLane]:
        """Those of the path's site that take prefills, as they are listed."""
        site, known = path.prefill_site, self.lanes.lanes
        lane_of = known.get
        found: list[SortedLane] = []
        early_s = K_GUARD_S
        if site != path.decode_site:
            early_s += snapshot.links[self._paths.link_id(site, path.decode_site)].rtt_s / 2
        costs = self._paths.costs(site, request.model)
        s_per_token = costs.s_per_token
        for one in snapshot.sites[site].prefills:
            name, chunk_tokens = one.instance, one.chunk_tokens
            lane = lane_of(name)
            if lane is None:
                lane = known[name] = Lane(chunk_tokens or costs.chunk_tokens, one.prefill_requests)
            elif chunk_tokens and (
                chunk_tokens != lane.chunk_tokens or one.prefill_requests != lane.prefill_requests
            ):
                lane.cut(chunk_tokens, one.prefill_requests)  # it tells only now, or came back with others
                self.lanes.touch(lane)
            lane.early_s = early_s
            if one.at_s > lane.reported_s:
                others_tokens = one.others_tokens
                if others_tokens is None:
                    backlog_s = one.prefill_backlog_s
                    if backlog_s is None:
                        backlog_s = one.waiting_uncached_tokens * s_per_token
                    if backlog_s > K_FOREIGN_S or lane.foreign_s:
                        lane.report(backlog_s, one.at_s, now)
                        self.lanes.touch(lane)
                elif others_tokens or lane.foreign_s:
                    speed = one.prefill_tokens_per_s
                    others_s = others_tokens / speed if speed else others_tokens * s_per_token
                    lane.report_others(others_s, one.at_s)
                    self.lanes.touch(lane)
            work_s = lane.ends_s - now
            if work_s <= 0.0:
                if lane.step or lane.hopeful or lane.behind:
                    lane.advance(now)
                    work_s = lane.ends_s - now
                if work_s <= 0.0:
                    work_s = 0.0
            found.append((work_s + lane.hopeful_s + lane.foreign_s, name, lane))
        return found

    def _changed(
        self, request: RequestView, path: PathPrediction, found: Sequence[SortedLane], now: float
    ) -> bool:
        """What is held for an instance that can't be used any more is decided anew at once, and all that is
        held where there are more of them. True where something may have lost its place.
        """
        key = (path.prefill_site, path.decode_site, request.model)
        known = self._usable.get(key)
        self._usable[key] = names = frozenset(one[1] for one in found)
        if known is None:
            return False
        if names - known:
            self.lanes.recall_all(path.decode_site, now)
        self.lanes.recall_from(sorted(known - names), path.decode_site, now)
        return True

    def in_time(
        self,
        request: RequestView,
        paths: Sequence[PathPrediction],
        prices: Sequence[float],
        lanes: SiteLanes,
        snapshot: Snapshot,
        now: float,
        order_s: float,
        deadline_s: float,
        miss_s: float,
        other_miss_s: float,
        planned: Lane | None = None,
    ) -> Choice | None:
        """The cheapest at its deadline's place: what it costs to be late, and to make others late, counts.

        `prices` are the paths', for the prefill that each predicts; `planned` is where it was to go so far,
        which wins where another costs the same. None where no path is feasible.
        """
        best: tuple[PathPrediction, InstanceId, float, float, int, float, float, float, bool] | None = None
        best_cost = enough = math.inf
        shared = bool(request.instance_cached_tokens)
        for _, _, path, price, there in _likeliest_first(paths, prices, lanes, planned):
            site, tokens, own_s, tail_s = path.prefill_site, path.uncached_tokens, path.prefill_s, 0.0
            start_up_s = self._paths.costs(site, request.model).start_up_s
            link, rate_bps, least_s = None, 0.0, path.move_s
            if site != path.decode_site:
                link = snapshot.links[self._paths.link_id(site, path.decode_site)]
                rate_bps, least_s = link.usable_bps, least_s + link.rtt_s
            due_price, move_s = price, path.move_s
            unheld_s = own_s + least_s + due_price
            for held_s, instance, lane in there:
                if shared:
                    tokens, own_s = self._own(request, path, instance)
                    due_price = price * own_s / path.prefill_s if path.prefill_s > 0 else price
                    unheld_s = own_s + least_s + due_price
                hopeful = lane.hopeful
                # It can't cost less than this, or than the next: most lanes need no closer look.
                if held_s + unheld_s >= enough:
                    if not hopeful or hopeful[-1].order_s <= order_s:
                        continue
                    running_s = lane.ends_s - now
                    if (running_s + unheld_s if running_s > 0.0 else unheld_s) >= enough:
                        continue
                end_s = lane.end_s(order_s, tokens, own_s, now, start_up_s)
                ttft_s = end_s - now + move_s
                if ttft_s + due_price >= best_cost:
                    continue
                if link is not None:
                    start_s = end_s - now - own_s + move_s
                    tail_s = transfer_tail_s(link, rate_bps, path.transfer_bytes, start_s, own_s, tokens)
                    ttft_s += tail_s
                late = now + ttft_s + K_STEPS_MARGIN_S > deadline_s
                cost = ttft_s + due_price
                if (cost + miss_s if late else cost) >= best_cost:
                    continue
                # Who is made late is looked at last: it costs as much as all the rest.
                delayed = lane.makes_late(order_s, tokens, own_s, now, start_up_s) if hopeful else 0
                if delayed:
                    cost += other_miss_s * delayed
                if late:
                    cost += miss_s
                if cost < best_cost:
                    best_cost, misses = cost, late or delayed > 0
                    enough = cost + K_ROUNDING_S
                    wait_s = end_s - now - own_s
                    best = (path, instance, wait_s, own_s, tokens, tail_s, due_price, cost, misses)
        return None if best is None else Choice(*best)

    def in_place_of(
        self,
        request: RequestView,
        paths: Sequence[PathPrediction],
        prices: Sequence[float],
        lanes: SiteLanes,
        snapshot: Snapshot,
        now: float,
        order_s: float,
        deadline_s: float,
        miss_s: float,
    ) -> Choice | None:
        """In time, and all that stay as well, because something longer that is held there gives way.

        The longest that is held anywhere is tried first: its seconds are worth most.
        """
        able: list[tuple[float, float, int, InstanceId, Lane, int, float]] = []
        for at, path in enumerate(paths):
            for _, instance, lane in lanes[path.prefill_site] if path.feasible else ():
                longest = longest_held(lane)
                if longest is not None:
                    tokens, own_s = self._own(request, path, instance)
                    if longest < (miss_s, -own_s):
                        able.append((*longest, at, instance, lane, tokens, own_s))
        able.sort(key=lambda one: one[:2])
        for _, _, at, instance, lane, tokens, own_s in able:
            path = paths[at]
            wait_s = max(0.0, lane.work_s(now) - own_s)
            tail_s = self._tail_s(path, snapshot, wait_s, own_s, tokens)
            start_up_s = self._paths.costs(path.prefill_site, request.model).start_up_s
            latest_s = deadline_s - tail_s - path.move_s
            room = make_room(lane, order_s, tokens, own_s, latest_s, miss_s, now, start_up_s)
            if room is None or not room[1]:
                continue
            end_s, out = room
            price = prices[at] * own_s / path.prefill_s if path.prefill_s > 0 else prices[at]
            cost = end_s - now + path.move_s + tail_s + price
            cost += sum(one.hold.miss_s for one in out if one.hold is not None)
            if own_s > 0:
                cost -= sum(one.work_s for one in out) * price / own_s
            gives_up = tuple(one.request for one in out)
            wait_s = end_s - now - own_s
            return Choice(path, instance, wait_s, own_s, tokens, tail_s, price, cost, True, gives_up)
        return None

    def behind(
        self,
        request: RequestView,
        paths: Sequence[PathPrediction],
        lanes: SiteLanes,
        snapshot: Snapshot,
        now: float,
    ) -> Choice | None:
        """The soonest behind everything else, where it delays nobody and pays no price."""
        best: tuple[PathPrediction, InstanceId, float, float, int, float, float, float] | None = None
        best_cost = math.inf
        shared = bool(request.instance_cached_tokens)
        for path in paths:
            if not path.feasible:
                continue
            tokens, own_s, move_s, tail_s = path.uncached_tokens, path.prefill_s, path.move_s, 0.0
            link, rate_bps = None, 0.0
            if path.prefill_site != path.decode_site:
                link = snapshot.links[self._paths.link_id(path.prefill_site, path.decode_site)]
                rate_bps = link.usable_bps
            for _, instance, lane in lanes[path.prefill_site]:
                if shared:
                    tokens, own_s = self._own(request, path, instance)
                running_s = lane.ends_s - now  # as lane.work_s, at half its price
                wait_s = (
                    (running_s if running_s > 0 else 0.0) + lane.foreign_s + lane.hopeful_s + lane.behind_s
                )
                cost = wait_s + own_s + move_s
                if cost > best_cost:
                    continue  # whatever its transfer takes
                if link is not None:
                    start_s = wait_s + move_s
                    tail_s = transfer_tail_s(link, rate_bps, path.transfer_bytes, start_s, own_s, tokens)
                    cost += tail_s
                if cost <= best_cost:
                    best_cost = cost
                    best = (path, instance, wait_s, own_s, tokens, tail_s, 0.0, cost)
        return None if best is None else Choice(*best)

    def _own(self, request: RequestView, path: PathPrediction, instance: InstanceId) -> tuple[int, float]:
        """Tokens that the instance would have to prefill, and the seconds that takes it."""
        held = request.instance_cached_tokens
        if not held:
            return path.uncached_tokens, path.prefill_s
        prompt = request.prompt_tokens
        cached = min(held.get(instance, 0), prompt - 1)
        if path.cache_move is not None:
            cached = max(cached, path.cache_move.tokens)
        tokens = prompt - cached
        if tokens == path.uncached_tokens:
            return tokens, path.prefill_s
        return tokens, self._paths.costs(path.prefill_site, request.model).prefill_s(prompt, cached)

    def _tail_s(
        self, path: PathPrediction, snapshot: Snapshot, start_s: float, own_s: float, tokens: int
    ) -> float:
        """From the end of its prefill, which begins in start_s, to its last byte at the decode side."""
        if path.prefill_site == path.decode_site:
            return 0.0
        link = snapshot.links[self._paths.link_id(path.prefill_site, path.decode_site)]
        return transfer_tail_s(
            link, link.usable_bps, path.transfer_bytes, start_s + path.move_s, own_s, tokens
        )


def _likeliest_first(
    paths: Sequence[PathPrediction], prices: Sequence[float], lanes: SiteLanes, planned: Lane | None
) -> list[Asked]:
    """The feasible paths, so that the best comes soon: what can't cost less needs no closer look."""
    asked: list[Asked] = []
    for at, (path, price) in enumerate(zip(paths, prices, strict=True)):
        if path.feasible:
            there = lanes[path.prefill_site]
            about_s = there[0][0] + path.ttft_s - path.queue_s + price
            asked.append((about_s, at, path, price, there))
    if planned is None:
        asked.sort()  # nothing behind `at` is compared
        return asked
    first = [(*one[:4], [lane]) for one in asked for lane in one[4] if lane[2] is planned]
    return first + asked
