"""Our policy: each path's own TTFT plus the delay that it causes to others, and the cheapest path wins."""

from __future__ import annotations

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Decision, PathPrediction
from prfaas.model.ids import LinkId, SiteId
from prfaas.model.observations import RequestView, Snapshot
from prfaas.routing.answers import BookingPolicy
from prfaas.routing.base import Fleet, register_policy
from prfaas.routing.pricing import Resource

K_LATE = 5.0


@register_policy("prices")
class PricesPolicy(BookingPolicy):
    """Chooses the path whose TTFT and price together are least."""

    def __init__(self, config: PolicyConfig, fleet: Fleet) -> None:
        super().__init__(config, fleet)
        self._sites: dict[SiteId, Resource] = {}
        self._links: dict[LinkId, Resource] = {}
        self._n: dict[SiteId, int] = {}
        self._rate: dict[LinkId, float] = {}

    def decide(self, request: RequestView, snapshot: Snapshot, now: float) -> Decision:
        paths = self.paths.all_paths(request, snapshot, now)
        deadline = self.deadline_s(request)
        best, best_cost = None, float("inf")
        for path in paths:
            if not path.feasible:
                continue
            price = self._price(path, snapshot, now)
            object.__setattr__(path, "price", price)
            late = max(0.0, now + path.ttft_s - deadline)
            cost = path.ttft_s + price + K_LATE * late
            if cost < best_cost:
                best, best_cost = path, cost
        if best is None:
            return self.no_path(request, now, paths)
        return self.dispatch(request, snapshot, now, best, paths, f"cost {best_cost:.2f}", None, deadline)

    def _price(self, path: PathPrediction, snapshot: Snapshot, now: float) -> float:
        gain = self.config.price_gain
        site = self._sites.setdefault(path.prefill_site, Resource())
        n = self._n[path.prefill_site] = snapshot.sites[path.prefill_site].prefill_instances
        total = path.prefill_s / n * site.at(path.queue_s, gain, now)
        link = path.link
        if link is not None:
            res = self._links.setdefault(link, Resource())
            est = snapshot.links[link]
            self._rate[link] = est.usable_bps
            bits = (est.backlog_bytes + self.book.coming_bytes(link)) * 8 / est.usable_bps
            total += path.transfer_bytes * 8 / est.usable_bps * res.at(bits, gain, now)
        return total

    def on_dispatch(self, *, request: RequestView, decision: Decision, now: float) -> None:
        super().on_dispatch(request=request, decision=decision, now=now)
        path = decision.chosen
        if path is None:
            return
        self._sites[path.prefill_site].on_work(path.prefill_s / self._n[path.prefill_site], now)
        if path.link is not None:
            self._links[path.link].on_work(path.transfer_bytes * 8 / self._rate[path.link], now)
