"""Our policy: for each path the request's own delay plus the delay that it causes to others; the cheapest
path wins.

    cost = TTFT + weight · seconds late + price        (price: pricing.py)

Where instances can serve by deadline (`service: deadline`), a path is looked at in two places of its queue:
where its deadline puts it, at the cost of being late and of each that it makes late, and behind all that can
still be in time (due.py). With `bind: start` a request stays at the door until its prefill is about to begin,
and its instance is chosen anew then (held.py).

No threshold is given. The length from which requests go out is where both sides cost the same; it follows
queues, bandwidth and roles by itself, and `get_log_data` shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Action, Decision, PathPrediction
from prfaas.model.ids import RequestId, SiteId
from prfaas.model.observations import RequestView, Snapshot
from prfaas.routing.answers import BookingPolicy, alike, why_won
from prfaas.routing.base import Fleet, register_policy
from prfaas.routing.due import DueQueue, DueQueues
from prfaas.routing.held import begins_behind_s, begins_s
from prfaas.routing.implied import ImpliedThresholds
from prfaas.routing.instance_choice import Choice, InstanceChooser, SiteLanes
from prfaas.routing.lanes import Lane
from prfaas.routing.pricing import PriceList, Way
from prfaas.routing.steps import K_ROUNDING_S, K_STEPS_MARGIN_S, Hold
from prfaas.routing.tenants import TenantShares

K_BEHIND_S = 600.0  # s: what can't be in time is served as if it were due so much later: it can't starve
K_TURN_S = 1e-6  # s by which a request's place moves forward each time that it is held
K_MISS_S = 500.0  # s: what one more request too late costs, relative to delay
K_MARGIN_S = 0.2  # s by which a prediction must keep a deadline

_hoped_of = itemgetter(0)  # of a SortedLane
_set = object.__setattr__


@register_policy("prices")
class PricesPolicy(BookingPolicy):
    """Chooses the path whose own delay and price together are least."""

    def __init__(self, config: PolicyConfig, fleet: Fleet) -> None:
        super().__init__(config, fleet)
        self.prices = PriceList(self.paths)
        self.tenants = TenantShares(config.tenant_weights)
        self.due = DueQueues()
        self.instances = InstanceChooser(self.paths)
        self.lanes = self.instances.lanes
        self.names_instances = config.service == "deadline"
        self._implied = ImpliedThresholds(self.paths, self.prices)

    def decide(self, request: RequestView, snapshot: Snapshot, now: float) -> Decision:
        paths = self.paths.all_paths(request, snapshot, now)
        ways = self.prices.ways(paths, snapshot, now)
        again = self.lanes.holds(request.request)
        planned = self.lanes.where(request.request) if again else None
        if again:
            self.lanes.drop(request.request, now)
        if request.attempt == 0 and not again:
            self.prices.observe(paths, ways, snapshot, now)
        if self.names_instances:
            lanes = self.instances.lanes_of(request, paths, snapshot, now)
            if lanes is not None:
                return self._by_instance(request, paths, ways, lanes, planned, snapshot, now)
            return self._by_deadline(request, paths, ways, snapshot, now)
        prices = self.prices.costs(paths, ways, snapshot, self.config.price_gain, now)
        deadline_s = self.deadline_s(request)
        weight = self._weight(request)
        best, best_cost = -1, float("inf")
        for index, path in enumerate(paths):
            if path.feasible:
                late_s = max(0.0, now + path.ttft_s - deadline_s)
                cost = path.ttft_s + weight * late_s + prices[index]
                if cost < best_cost:
                    best, best_cost = index, cost
        if best < 0:
            return self.no_path(request, now, paths)
        for path, price in zip(paths, prices, strict=True):
            if path.feasible:
                # Still ours alone: a copy of each would cost more than the decision itself.
                object.__setattr__(path, "price", price)
        if self.config.shed and request.attempt == 0 and self._hopeless(request, paths, deadline_s, now):
            return self._shed(request, paths, deadline_s, now)
        chosen = paths[best]
        return self.dispatch(
            request,
            snapshot,
            now,
            chosen,
            paths,
            why_won(chosen, paths),
            deadline_s=deadline_s,
            order_s=deadline_s + self.tenants.lag_s(request.tenant, now),
        )

    def _by_deadline(
        self,
        request: RequestView,
        paths: list[PathPrediction],
        ways: list[Way | None],
        snapshot: Snapshot,
        now: float,
    ) -> Decision:
        """The path, and the place in its queue, at which fewest are late and others are delayed least.

        A request may go behind all that can be in time: where it can't be itself, where it would make
        another late, and where what it costs the others is more than being late costs. There it delays
        nobody, so that it pays no price. Long prompts give way first, as they take most from the others.
        """
        deadline_s = self.deadline_s(request)
        in_time_s, behind_s = (
            deadline_s + self.tenants.lag_s(request.tenant, now),
            deadline_s + K_BEHIND_S,
        )
        backlogs_s = {
            path.prefill_site: path.queue_s * snapshot.sites[path.prefill_site].prefill_instances
            for path in paths
            if path.feasible
        }
        hoped_s = {
            site: self.due.at(site).hoped_s(backlog_s) / snapshot.sites[site].prefill_instances
            for site, backlog_s in backlogs_s.items()
        }
        prices = self.prices.costs(paths, ways, snapshot, self.config.price_gain, now, hoped_s)
        miss_s = K_MISS_S * self._weight(request)
        best, best_at, best_order_s, best_cost = None, -1, 0.0, math.inf
        for at, (path, price) in enumerate(zip(paths, prices, strict=True)):
            if not path.feasible:
                continue
            backlog_s = backlogs_s[path.prefill_site]
            instances = snapshot.sites[path.prefill_site].prefill_instances
            queue = self.due.at(path.prefill_site)
            there = self._after(request, path, snapshot, queue, in_time_s, backlog_s, now)
            late = now + there.ttft_s + K_MARGIN_S > deadline_s
            delayed = queue.delayed(in_time_s, path.prefill_s, instances, backlog_s, now)
            cost = there.ttft_s + price + miss_s * late + K_MISS_S * len(delayed)
            if cost < best_cost:
                best, best_at, best_order_s, best_cost = there, at, in_time_s, cost
        if best is not None:
            object.__setattr__(best, "price", prices[best_at])
        # Behind costs miss_s at least, and is seldom looked at. It wins where both cost the same: it is late
        # anyway.
        for at, path in enumerate(paths) if best_cost >= miss_s else ():
            if not path.feasible:
                continue
            queue, backlog_s = self.due.at(path.prefill_site), backlogs_s[path.prefill_site]
            there = self._after(request, path, snapshot, queue, behind_s, backlog_s, now)
            cost = there.ttft_s + miss_s
            if cost < best_cost or (cost == best_cost and at <= best_at and best_order_s == in_time_s):
                best, best_at, best_order_s, best_cost = there, at, behind_s, cost
        if best is not None and best_order_s == behind_s:
            object.__setattr__(best, "price", 0.0)
        if best is None:
            return self.no_path(request, now, paths)
        if self.config.shed and request.attempt == 0 and best_order_s == behind_s:
            return self._shed(request, paths, deadline_s, now)
        others = [path for path in paths if not alike(path, best)]
        why = why_won(best, others) + (", behind all that can be in time" if best_order_s == behind_s else "")
        return self.dispatch(
            request, snapshot, now, best, others, why, deadline_s=deadline_s, order_s=best_order_s
        )

    def _after(
        self,
        request: RequestView,
        path: PathPrediction,
        snapshot: Snapshot,
        queue: DueQueue,
        order_s: float,
        backlog_s: float,
        now: float,
    ) -> PathPrediction:
        """The path with the wait that a place in its queue has; itself where all that waits is before it."""
        if not queue.entries or queue.entries[-1].order_s <= order_s:
            return path
        giver = None if path.cache_move is None else path.cache_move.source
        wait_s = queue.ahead_s(order_s, backlog_s) / snapshot.sites[path.prefill_site].prefill_instances
        return self.paths.predict(request, snapshot, path.prefill_site, path.decode_site, now, giver, wait_s)

    def _by_instance(
        self,
        request: RequestView,
        paths: list[PathPrediction],
        ways: list[Way | None],
        lanes: SiteLanes,
        planned: Lane | None,
        snapshot: Snapshot,
        now: float,
    ) -> Decision:
        """As `_by_deadline`, for every instance by its own queue: the instance is part of the choice, and a
        prefix that it holds counts for it alone.
        """
        deadline_s = self.deadline_s(request)
        # One that is asked for again isn't put behind its equals.
        earlier_s = K_TURN_S * self.lanes.turns(request.request)
        in_time_s = deadline_s + self.tenants.lag_s(request.tenant, now) - earlier_s
        behind_s = deadline_s + K_BEHIND_S - earlier_s
        miss_s, order_s = K_MISS_S * self._weight(request), in_time_s
        late_binding = self.config.bind == "start"
        best: Choice | None = None
        if not late_binding or not self._too_late(request, paths, deadline_s, now):
            hoped_s = {}
            for site, there in lanes.items():
                hoped_s[site] = sum(map(_hoped_of, there)) / len(there)
            prices = self.prices.costs(paths, ways, snapshot, self.config.price_gain, now, hoped_s)
            for path, price in zip(paths, prices, strict=True):
                if path.feasible:
                    _set(path, "price", price)  # still ours alone
            best = self.instances.in_time(
                request, paths, prices, lanes, snapshot, now, in_time_s, deadline_s, miss_s, K_MISS_S, planned
            )
            if late_binding and best is not None and best.misses:
                best = self.instances.in_place_of(
                    request, paths, prices, lanes, snapshot, now, in_time_s, deadline_s, miss_s
                )
        if best is None or best.cost >= miss_s:
            behind = self.instances.behind(request, paths, lanes, snapshot, now)
            if behind is not None and (best is None or behind.cost + miss_s <= best.cost):
                best, order_s = behind, behind_s
        if best is None:
            return self.no_path(request, now, paths)
        if self.config.shed and request.attempt == 0 and order_s == behind_s:
            return self._shed(request, paths, deadline_s, now)
        chosen = best.prediction()
        others = [path for path in paths if path is not best.path]
        why = why_won(chosen, others) + (", behind all that can be in time" if order_s == behind_s else "")
        lane = self.lanes.get(best.instance)
        if late_binding and lane is not None and (order_s != behind_s or now < behind_s):
            begins = begins_behind_s if order_s == behind_s else begins_s
            wait_s = begins(lane, order_s, now) - now
            if best.gives_up or wait_s > self._lead_s(lane) + 2 * K_ROUNDING_S:
                return Decision(  # by place, as in `dispatch`
                    request.request,
                    self.name,
                    now,
                    Action.HOLD,
                    "held until %s is about to begin it, in %.2f s; %s" % (best.instance, wait_s, why),  # noqa: UP031
                    chosen,
                    tuple(others),
                    best.instance,
                    None,
                    deadline_s,
                    order_s,
                    gives_up=best.gives_up,
                )
        return self.dispatch(
            request, snapshot, now, chosen, others, why,
            deadline_s=deadline_s, order_s=order_s, instance=best.instance,
        )  # fmt: skip

    def _too_late(
        self, request: RequestView, paths: Sequence[PathPrediction], deadline_s: float, now: float
    ) -> bool:
        """Whether it can't be in time even where nothing waits: then no place need be looked for."""
        left_s = deadline_s - now - K_STEPS_MARGIN_S + K_ROUNDING_S
        if request.instance_cached_tokens:
            return left_s < 0  # what an instance holds may leave it next to nothing to do
        for path in paths:  # noqa: SIM110 (a generator costs as much as all the rest)
            if path.prefill_s <= left_s and path.feasible:
                return False
        return True

    def _lead_s(self, lane: Lane) -> float:
        """So long before its step begins a request is sent: the instance must never wait for it."""
        return self.config.lead_s + 2 * lane.early_s

    def recalls(self, now: float) -> tuple[Sequence[RequestId], float]:
        return self.lanes.due(now)

    def on_hold(self, *, request: RequestView, decision: Decision, now: float) -> None:
        self.prices.settle()  # it waits anyway
        for other in decision.gives_up:
            self.lanes.give_way(other, now)
        lane = self.lanes.get(decision.prefill_instance)
        if lane is not None and decision.chosen is not None:
            yields = self.lanes.yields(request.request)
            miss_s, home = K_MISS_S * self._weight(request), decision.chosen.decode_site
            self._plan(request, decision, lane, now, Hold(self._lead_s(lane), miss_s, home, yields))

    def _plan(
        self, request: RequestView, decision: Decision, lane: Lane, now: float, hold: Hold | None = None
    ) -> None:
        """Its place at an instance; still at the door where `hold` is given."""
        chosen, order_s, due_s = decision.chosen, decision.order_s, decision.deadline_s
        assert chosen is not None
        assert order_s is not None  # decide sets both
        assert due_s is not None
        ended_s = math.inf if order_s > due_s + K_BEHIND_S / 2 else due_s - chosen.tail_s
        start_up_s = self.paths.costs(chosen.prefill_site, request.model).start_up_s
        tokens, own_s = chosen.uncached_tokens, chosen.prefill_s
        self.lanes.add(request.request, lane, order_s, tokens, own_s, ended_s, now, start_up_s, hold)

    def on_prefill_done(self, *, request: RequestId, now: float, ago_s: float = 0.0) -> None:
        super().on_prefill_done(request=request, now=now, ago_s=ago_s)
        self.prices.settle()
        self.lanes.done(request, now, ago_s)
        self.due.drop(request)

    def on_first_token(self, *, request: RequestId, now: float, cached_tokens: int | None = None) -> None:
        path = self.book.path(request)
        super().on_first_token(request=request, now=now, cached_tokens=cached_tokens)
        if path is not None:
            self.lanes.done(request, now, path.tail_s)  # where nobody said so before
        self._gone(request, now)

    def on_refused(self, *, request: RequestId, reason: str, retry_after_s: float | None, now: float) -> None:
        super().on_refused(request=request, reason=reason, retry_after_s=retry_after_s, now=now)
        self._gone(request, now)

    def on_failed(self, *, request: RequestId, site: SiteId, reason: str, now: float) -> None:
        super().on_failed(request=request, site=site, reason=reason, now=now)
        self._gone(request, now)

    def on_finished(self, *, request: RequestId, now: float) -> None:
        super().on_finished(request=request, now=now)
        self.prices.settle()
        self._gone(request, now)

    def _gone(self, request: RequestId, now: float) -> None:
        """It waits nowhere any more, whatever became of it."""
        self.lanes.forget(request, now)
        self.due.drop(request)

    def on_dispatch(self, *, request: RequestView, decision: Decision, now: float) -> None:
        super().on_dispatch(request=request, decision=decision, now=now)
        chosen = decision.chosen
        if self.config.service == "deadline" and chosen is not None:
            order_s, due_s = decision.order_s, decision.deadline_s
            assert order_s is not None  # decide sets both
            assert due_s is not None
            behind = order_s > due_s + K_BEHIND_S / 2
            latest_s = math.inf if behind else due_s - chosen.prefill_s - chosen.tail_s - K_MARGIN_S
            self.due.add(request.request, chosen.prefill_site, order_s, chosen.prefill_s, latest_s)
            lane = self.lanes.get(decision.prefill_instance)
            if lane is not None:
                self._plan(request, decision, lane, now)
        if decision.chosen is not None:
            self.prices.on_dispatch(decision.chosen, now)
            self.tenants.on_work(request.tenant, decision.chosen.prefill_s, now)

    def get_log_data(self) -> Mapping[str, float]:
        data = {**self.prices.get_log_data(), "outstanding": float(len(self.book))}
        for home, threshold in self.thresholds().items():
            data[f"threshold_tokens {home}"] = threshold
        return data

    def thresholds(self) -> Mapping[SiteId, float]:
        """Length from which a request without cached prefix would go out now, by home."""
        return self._implied.thresholds(self.fleet.local_sites)

    def _weight(self, request: RequestView) -> float:
        classes = self.config.classes
        return (classes.get(request.slo_class) or classes[self.config.default_class]).weight

    def _hopeless(
        self, request: RequestView, paths: Sequence[PathPrediction], deadline_s: float, now: float
    ) -> bool:
        """Whether no path meets the deadline, and that is a reason to refuse."""
        soonest_s = min(path.ttft_s for path in paths if path.feasible)
        left_s = deadline_s - now
        # A tenant above its share is refused sooner, one below it later.
        slack = self.config.shed_slack * self.tenants.leniency(request.tenant, now)
        return soonest_s > left_s * slack

    def _shed(
        self, request: RequestView, paths: Sequence[PathPrediction], deadline_s: float, now: float
    ) -> Decision:
        soonest_s = min(path.ttft_s for path in paths if path.feasible)
        left_s = deadline_s - now
        return Decision(
            request=request.request,
            policy=self.name,
            at_s=now,
            action=Action.SHED,
            reason=f"due in {left_s:.2f} s, soonest path takes {soonest_s:.2f} s",
            alternatives=tuple(paths),
            deadline_s=deadline_s,
            retry_after_s=max(0.1, soonest_s - left_s),
        )
