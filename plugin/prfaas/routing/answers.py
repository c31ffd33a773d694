"""What all policies share.

Booking of what was sent, instances, and the Decision made of the path they chose.
"""

from __future__ import annotations

from collections.abc import Sequence

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Action, Decision, PathPrediction
from prfaas.model.ids import InstanceId, RequestId, SiteId
from prfaas.model.observations import RequestView, Snapshot
from prfaas.routing.base import Fleet, Policy
from prfaas.routing.book import DispatchBook
from prfaas.routing.instances import decode_instance, prefill_instance
from prfaas.routing.paths import PathFinder

K_RETRY_S = 1.0  # s, retry_after_s where nothing better is known


class BookingPolicy(Policy):
    """Keeps the book of outstanding requests; concrete policies choose a path and say why."""

    def __init__(self, config: PolicyConfig, fleet: Fleet) -> None:
        super().__init__(config, fleet)
        self.book = DispatchBook()
        self.paths = PathFinder(fleet, self.book)

    def on_dispatch(self, *, request: RequestView, decision: Decision, now: float) -> None:
        if decision.chosen is not None:
            self.book.add(request.request, decision.chosen, now)

    def on_prefill_done(self, *, request: RequestId, now: float, ago_s: float = 0.0) -> None:
        self.book.prefilled(request)

    def on_first_token(self, *, request: RequestId, now: float, cached_tokens: int | None = None) -> None:
        self.book.drop(request)

    def on_refused(self, *, request: RequestId, reason: str, retry_after_s: float | None, now: float) -> None:
        self.book.drop(request)

    def on_failed(self, *, request: RequestId, site: SiteId, reason: str, now: float) -> None:
        self.book.drop(request)

    def on_finished(self, *, request: RequestId, now: float) -> None:
        self.book.drop(request)

    def deadline_s(self, request: RequestView) -> float:
        """When the first token is due: the request's own deadline, or its class's."""
        if request.deadline_s is not None:
            return request.deadline_s
        classes = self.config.classes
        slo = classes.get(request.slo_class) or classes[self.config.default_class]
        home = request.home if request.home is not None else min(self.fleet.local_sites, default="")
        # Whoever holds it: else where the router sent its first part would move its deadline by seconds.
        cached = max(request.cached_tokens.values()) if request.cached_tokens else 0
        if cached:
            cached = max(0, min(cached, request.prompt_tokens - 1))
        alone_s = self.paths.costs(home, request.model).prefill_s(request.prompt_tokens, cached)
        return request.arrived_s + slo.base_s + slo.prefill_factor * alone_s

    def dispatch(
        self,
        request: RequestView,
        snapshot: Snapshot,
        now: float,
        chosen: PathPrediction,
        paths: Sequence[PathPrediction],
        reason: str,
        threshold_tokens: float | None = None,
        deadline_s: float | None = None,
        order_s: float | None = None,
        instance: InstanceId | None = None,
    ) -> Decision:
        """The decision to send it on `chosen`, or to hold it until the queue there is short enough."""
        if deadline_s is None:
            deadline_s = self.deadline_s(request)
        if self.config.hold_above_s is not None and request.attempt == 0:
            over_s = self._queue_s(request, snapshot, chosen, now) - self.config.hold_above_s
            if over_s > 0:
                return Decision(
                    request=request.request,
                    policy=self.name,
                    at_s=now,
                    action=Action.HOLD,
                    reason=f"held: {over_s:.2f} s too much before {chosen.label}; {reason}",
                    chosen=chosen,
                    alternatives=tuple(path for path in paths if path is not chosen),
                    deadline_s=deadline_s,
                    order_s=order_s,
                    threshold_tokens=threshold_tokens,
                    until_s=now + over_s,
                )
        if instance is None:
            costs = self.paths.costs(chosen.prefill_site, request.model)
            instance = prefill_instance(request, snapshot, chosen, costs)
        return Decision(  # by place: a class called by names packs them into a dictionary first
            request.request,
            self.name,
            now,
            Action.DISPATCH,
            reason,
            chosen,
            tuple([path for path in paths if path is not chosen]),
            instance,
            decode_instance(snapshot, chosen),
            deadline_s,
            order_s,
            threshold_tokens,
        )

    def _queue_s(self, request: RequestView, snapshot: Snapshot, chosen: PathPrediction, now: float) -> float:
        """The whole wait at the site, whatever place in its queue was predicted; 0 where it has none."""
        site = snapshot.sites.get(chosen.prefill_site)
        if site is None or site.prefill_instances <= 0:
            return 0.0
        return self.paths.queue_s(site, request.model, now)

    def no_path(self, request: RequestView, now: float, paths: Sequence[PathPrediction]) -> Decision:
        """Nothing that could serve it is alive."""
        why = "; ".join(f"{path.label}: {path.why_not}" for path in paths) or "no decode site"
        return Decision(
            request=request.request,
            policy=self.name,
            at_s=now,
            action=Action.NO_PATH,
            reason=why,
            alternatives=tuple(paths),
            retry_after_s=K_RETRY_S,
        )

    def first_of(
        self,
        request: RequestView,
        snapshot: Snapshot,
        now: float,
        paths: Sequence[PathPrediction],
        wanted: Sequence[PathPrediction],
        reason: str,
        threshold_tokens: float | None = None,
    ) -> Decision:
        """Soonest feasible of `wanted`; if none is, soonest feasible of all, saying what was in the way."""
        chosen = soonest(wanted)
        if chosen is None:
            chosen = soonest(paths)
            if chosen is None:
                return self.no_path(request, now, paths)
            trouble = "; ".join(f"{path.label}: {path.why_not}" for path in wanted) or "nothing of that kind"
            reason = f"{reason}, but {trouble}: {chosen.label}"
        return self.dispatch(request, snapshot, now, chosen, paths, reason, threshold_tokens)


def soonest(paths: Sequence[PathPrediction]) -> PathPrediction | None:
    """The feasible path with the smallest TTFT; earlier ones win ties."""
    able = [path for path in paths if path.feasible]
    return min(able, key=lambda path: path.ttft_s) if able else None


def alike(one: PathPrediction, other: PathPrediction) -> bool:
    return (one.prefill_site, one.decode_site, one.cache_move) == (
        other.prefill_site, other.decode_site, other.cache_move,
    )  # fmt: skip


def why_won(chosen: PathPrediction, paths: Sequence[PathPrediction]) -> str:
    """What won, and over what."""
    # "%" takes half of an f-string's time for figures, and a label that is asked for half of this.
    label = chosen.prefill_site if chosen.cache_move is None else chosen.label
    why = "%s: TTFT %.2f s + price %.2f" % (label, chosen.ttft_s, chosen.price)  # noqa: UP031
    before = ", over "
    for path in paths:
        if path is not chosen:
            if path.feasible:
                label = path.prefill_site if path.cache_move is None else path.label
                why += "%s%s %.2f+%.2f" % (before, label, path.ttft_s, path.price)  # noqa: UP031
            else:
                why += f"{before}{path.label} {path.why_not}"
            before = ", "
    return why if before == ", " else f"{why}, the only path"
