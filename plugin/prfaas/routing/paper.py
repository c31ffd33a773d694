"""The report's policy: a threshold t on the uncached length, and two regimes for how caches count.

scarce    l_total − l_pd ≤ t: local prefill, else PrfaaS; each cluster's cache counts for itself
abundant  l = max(l_pd, l_prfaas); l_total − l ≤ t: local prefill, else PrfaaS; where the longer cache lies
in the other cluster, it is moved

Where caches can't be moved it is scarce always: what lies elsewhere would count and not be there.

As the report says that a filling link raises t, `raise_at` and `raise_factor` do so; with the factor at its
default of 1 the threshold is fixed, which is what the report evaluates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Decision, PathPrediction
from prfaas.model.ids import LinkId, SiteId
from prfaas.model.observations import RequestView, Snapshot
from prfaas.routing.answers import BookingPolicy
from prfaas.routing.base import Fleet, register_policy

K_EGRESS_S = 5.0  # s, time constant of the utilisation that picks the regime
K_QUEUE_S = 1.0  # s of backlog that count as a full link


@register_policy("paper")
class PaperPolicy(BookingPolicy):
    """Fixed threshold, two regimes."""

    def __init__(self, config: PolicyConfig, fleet: Fleet) -> None:
        super().__init__(config, fleet)
        self._planned: dict[SiteId, float] = {}  # t by home, where the slow loop has set it
        self._egress: dict[LinkId, tuple[float, float]] = {}  # (bits a second, as of)

    def decide(self, request: RequestView, snapshot: Snapshot, now: float) -> Decision:
        finder = self.paths
        paths: list[PathPrediction] = []
        best: Decision | None = None
        for home in finder.decode_sites(request, snapshot):
            decision = self._at(request, snapshot, home, now)
            paths += [*decision.alternatives, *([decision.chosen] if decision.chosen else [])]
            if best is None or _ttft(decision) < _ttft(best):
                best = decision
        return best if best is not None else self.no_path(request, now, paths)

    def _at(self, request: RequestView, snapshot: Snapshot, home: SiteId, now: float) -> Decision:
        finder = self.paths
        sources = finder.sources(snapshot, home)
        paths = [finder.predict(request, snapshot, source, home, now) for source in sources]
        local, away = paths[0], paths[1:]
        used = self._utilisation(snapshot, [path.link for path in away if path.feasible and path.link], now)
        threshold = self._threshold(used, home)
        caches = request.cached_tokens
        here = caches.get(home, 0)
        if not (self.fleet.movable and self._abundant(used)):
            uncached = request.prompt_tokens - here
            wanted = [local] if uncached <= threshold else away
            reason = f"paper, scarce: {uncached} uncached, threshold {threshold:.0f}"
            return self.first_of(request, snapshot, now, paths, wanted, reason, threshold)
        longest = max(sources, key=lambda site: caches.get(site, 0))
        uncached = request.prompt_tokens - max(here, caches.get(longest, 0))
        wanted = [local] if uncached <= threshold else away
        reason = f"paper, abundant: {uncached} uncached, threshold {threshold:.0f}"
        wanted = [self._moved(request, snapshot, path, longest, now) for path in wanted]
        paths = paths + [path for path in wanted if path.cache_move is not None]
        return self.first_of(request, snapshot, now, paths, wanted, reason, threshold)

    def _moved(
        self, request: RequestView, snapshot: Snapshot, path: PathPrediction, giver: SiteId, now: float
    ) -> PathPrediction:
        """`path`, with the longer cache brought to it; as it is where that can't be done."""
        caches = request.cached_tokens
        if caches.get(giver, 0) <= caches.get(path.prefill_site, 0) or giver in request.excluded:
            return path
        moved = self.paths.predict(request, snapshot, path.prefill_site, path.decode_site, now, giver)
        return moved if moved.feasible else path

    def _threshold(self, used: float, home: SiteId) -> float:
        config = self.config
        threshold = self._planned.get(home, config.threshold_tokens)
        if config.raise_factor <= 1 or used <= config.raise_at:
            return threshold
        span = max(1e-9, 1 - config.raise_at)
        return threshold * (1 + (config.raise_factor - 1) * min(1.0, (used - config.raise_at) / span))

    def on_plan(self, *, home: SiteId, threshold_tokens: float, now: float) -> None:
        self._planned[home] = threshold_tokens

    def _abundant(self, used: float) -> bool:
        regime = self.config.regime
        return regime == "abundant" or (regime == "auto" and used < self.config.abundant_below)

    def _utilisation(self, snapshot: Snapshot, links: list[LinkId], now: float) -> float:
        """Share of the freest link in use, a backlog counting as use; 1 when there is none."""
        least = 1.0
        for link in links:
            estimate = snapshot.links[link]
            sent_bps, as_of_s = self._egress.get(link, (0.0, now))
            used = sent_bps * math.exp(-(now - as_of_s) / K_EGRESS_S) / estimate.usable_bps
            queued_s = estimate.backlog_bytes * 8 / estimate.usable_bps
            least = min(least, max(used, queued_s / K_QUEUE_S))
        return least

    def on_dispatch(self, *, request: RequestView, decision: Decision, now: float) -> None:
        super().on_dispatch(request=request, decision=decision, now=now)
        chosen = decision.chosen
        crossings = [] if chosen is None else [(chosen.link, chosen.transfer_bytes)]
        if chosen is not None and chosen.cache_move is not None:
            crossings.append((chosen.cache_move.link, chosen.cache_move.transfer_bytes))
        for link, size in crossings:
            if link is not None:
                before_bps, as_of_s = self._egress.get(link, (0.0, now))
                kept_bps = before_bps * math.exp(-(now - as_of_s) / K_EGRESS_S)
                self._egress[link] = (kept_bps + size * 8 / K_EGRESS_S, now)

    def get_log_data(self) -> Mapping[str, float]:
        return {f"egress_bps {link}": rate_bps for link, (rate_bps, _) in self._egress.items()}


def _ttft(decision: Decision) -> float:
    return decision.chosen.ttft_s if decision.chosen is not None else float("inf")
