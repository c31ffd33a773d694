"""Our policy: for each path the request's own delay plus the delay that it causes to others; the cheapest
path wins.

    cost = TTFT + weight · seconds late + price        (price: pricing.py)

No threshold is given. The length from which requests go out is where both sides cost the same; it follows
queues, bandwidth and roles by itself, and `get_log_data` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Action, Decision, PathPrediction
from prfaas.model.ids import SiteId
from prfaas.model.observations import RequestView, Snapshot
from prfaas.routing.answers import BookingPolicy
from prfaas.routing.base import Fleet, register_policy
from prfaas.routing.pricing import PriceList
from prfaas.routing.tenants import TenantShares

K_THRESHOLD_GRID = (
    64,
    1 << 18,
    1.02,
)  # tokens: first, last, ratio of lengths tried for the implied threshold


@register_policy("prices")
class PricesPolicy(BookingPolicy):
    """Chooses the path whose own delay and price together are least."""

    def __init__(self, config: PolicyConfig, fleet: Fleet) -> None:
        super().__init__(config, fleet)
        self.prices = PriceList(self.paths)
        self.tenants = TenantShares(config.tenant_weights)

    def decide(self, request: RequestView, snapshot: Snapshot, now: float) -> Decision:
        paths = self.paths.all_paths(request, snapshot, now)
        if request.attempt == 0:
            self.prices.observe(paths, snapshot, now)
        prices = self.prices.costs(paths, snapshot, self.config.price_gain, now)
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
            _why(chosen, paths),
            deadline_s=deadline_s,
            order_s=deadline_s + self.tenants.lag_s(request.tenant, now),
        )

    def on_dispatch(self, *, request: RequestView, decision: Decision, now: float) -> None:
        super().on_dispatch(request=request, decision=decision, now=now)
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
        found = {}
        for home in self.fleet.local_sites:
            sources = [link.source for link in self.prices.links() if link.target == home]
            if sources:
                found[home] = self._threshold(home, sources)
        return found

    def _threshold(self, home: SiteId, sources: Sequence[SiteId]) -> float:
        def goes_out(tokens: int) -> bool:
            local = self.prices.work_cost(home, self.paths.costs(home, "").prefill_s(tokens, 0), None, 0)
            away = [
                self.prices.work_cost(
                    source,
                    self.paths.costs(source, "").prefill_s(tokens, 0),
                    self.paths.link_id(source, home),
                    self.paths.costs(source, "").transfer_bytes(tokens, 0),
                )
                for source in sources
            ]
            return min(away) < local

        tokens = K_THRESHOLD_GRID[0]
        while tokens < K_THRESHOLD_GRID[1] and not goes_out(tokens):
            tokens = max(tokens + 1, int(tokens * K_THRESHOLD_GRID[2]))
        return float(tokens) if goes_out(tokens) else float("inf")

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


def _why(chosen: PathPrediction, paths: Sequence[PathPrediction]) -> str:
    """What won, and over what."""
    others = ", ".join(
        f"{path.label} {path.ttft_s:.2f}+{path.price:.2f}"
        if path.feasible
        else f"{path.label} {path.why_not}"
        for path in paths
        if path is not chosen
    )
    won = f"{chosen.label}: TTFT {chosen.ttft_s:.2f} s + price {chosen.price:.2f}"
    return f"{won}, over {others}" if others else f"{won}, the only path"
