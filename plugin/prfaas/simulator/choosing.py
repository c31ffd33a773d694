"""Which of a site's instances takes a request, and the request's place in that instance's queue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from prfaas.model.decisions import Decision
from prfaas.model.ids import InstanceId
from prfaas.model.observations import RequestView
from prfaas.simulator.engine import Engine
from prfaas.workload.requests import TimedRequest

K_EQUALS = 1e-3  # what a second served later counts where instances are else alike

ServiceOrder = Literal["fcfs", "deadline"]


def queue_key(decision: Decision, order: ServiceOrder) -> float:
    """Its place in an instance's queue; equal keys are served as they come."""
    if order == "fcfs":
        return 0.0
    due_s = decision.order_s if decision.order_s is not None else decision.deadline_s
    return math.inf if due_s is None else due_s


class Ranked:
    """A site's instances that prefill, or those that decode, with a figure of each in a list that they keep
    up themselves: the least is found without asking hundreds for every request.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self.figures: list[float] = []

    @classmethod
    def by_backlog(cls, engines: Sequence[Engine]) -> Ranked:
        """Seconds of prefill queued. An instance is in one of these at a time."""
        found = cls(engines)
        found.figures = [engine.backlog_s for engine in engines]
        for place, engine in enumerate(engines):
            engine.keeps_backlog = (found.figures, place)
        return found

    @classmethod
    def by_fullness(cls, engines: Sequence[Engine]) -> Ranked:
        """How full the batch is. An instance is in one of these at a time."""
        found = cls(engines)
        found.figures = [engine.fullness for engine in engines]
        for place, engine in enumerate(engines):
            engine.keeps_fullness = (found.figures, place)
        return found

    def least(self) -> Engine:
        """The first of those with the least. There must be one."""
        return self.engines[self.figures.index(min(self.figures))]


def pick_both(
    decision: Decision,
    request: TimedRequest,
    view: RequestView,
    key: float,
    order: ServiceOrder,
    now: float,
    engines: Mapping[InstanceId, Engine],
    prefills: Ranked | None,
    decodes: Ranked | None,
) -> tuple[Engine | None, Engine | None]:
    """Who prefills, the instance that the decision names if it can, and who decodes: of its site's `prefills`
    by backlog and `decodes` by fullness. None where nobody does.
    """
    prefill = engines.get(decision.prefill_instance) if decision.prefill_instance is not None else None
    if (prefill is None or not prefill.up or prefill.draining) and prefills is not None:
        prefill = pick_prefill(prefills, request, key, order, now, view.instance_cached_tokens)
    if prefill is not None and prefill.role == "collocated" and not decision.offloaded:
        return prefill, prefill
    return prefill, None if decodes is None else pick_decode(decodes)


def pick_prefill(
    ranked: Ranked,
    request: TimedRequest,
    key: float,
    order: ServiceOrder,
    now: float,
    cached_tokens: Mapping[InstanceId, int],
) -> Engine | None:
    """The instance that would be through with it soonest, by what is believed of their caches.

    `ranked` is by backlog. None if none takes prefills.
    """
    engines = ranked.engines
    if order == "fcfs" and not request.block_ids and engines:
        # As below for the usual case: hundreds of instances that differ in their backlog alone.
        first = ranked.least()
        if first.role == "prefill" and first.up and not first.draining:
            return first
    best, least_s = None, math.inf
    for engine in engines:
        if engine.role == "decode" or not engine.up or engine.draining:
            continue
        cost_s = engine.backlog_s
        if order == "deadline":
            # What is served later doesn't matter, but for equals.
            cost_s = engine.ahead_s(key, now) + K_EQUALS * cost_s
        if request.block_ids:
            cached = cached_tokens.get(engine.name, 0)
            cost_s += engine.works.prefill_s(request.prompt_tokens, cached)
        if engine.role == "collocated" and engine.running + engine.waiting >= engine.max_batch:
            cost_s += 1e3  # no place in its batch: only if all are so
        if cost_s < least_s:
            best, least_s = engine, cost_s
    return best


def pick_decode(ranked: Ranked) -> Engine | None:
    """The instance whose batch is least full; None if none decodes. `ranked` is by fullness."""
    best = ranked.least() if ranked.engines else None
    return None if best is None or math.isinf(best.fullness) else best
