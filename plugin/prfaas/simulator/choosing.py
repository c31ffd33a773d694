"""Which of a site's instances takes a request, and the request's place in that instance's queue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Literal

from prfaas.model.decisions import Decision
from prfaas.model.ids import InstanceId
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


_backlog_s = attrgetter("backlog_s")
_fullness = attrgetter("fullness")


def pick_prefill(
    engines: Sequence[Engine],
    request: TimedRequest,
    key: float,
    order: ServiceOrder,
    now: float,
    cached_tokens: Mapping[InstanceId, int],
) -> Engine | None:
    """The instance that would be through with it soonest, by what is believed of their caches.

    None if none takes prefills.
    """
    if order == "fcfs" and not request.block_ids and engines:
        # As below for the usual case: hundreds of instances that differ in their backlog alone.
        first = min(engines, key=_backlog_s)
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
            cost_s += engine.profile.prefill_s(request.prompt_tokens, cached)
        if engine.role == "collocated" and engine.running + engine.waiting >= engine.max_batch:
            cost_s += 1e3  # no place in its batch: only if all are so
        if cost_s < least_s:
            best, least_s = engine, cost_s
    return best


def pick_decode(engines: Sequence[Engine]) -> Engine | None:
    """The instance whose batch is least full; None if none decodes."""
    best = min(engines, key=_fullness, default=None)
    return None if best is None or math.isinf(best.fullness) else best
