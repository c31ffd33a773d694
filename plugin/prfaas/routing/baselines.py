"""Baselines at equal hardware: what PrfaaS has to beat."""

from __future__ import annotations

from prfaas.model.decisions import Decision
from prfaas.model.observations import RequestView, Snapshot
from prfaas.routing.answers import BookingPolicy
from prfaas.routing.base import register_policy


class _StayPolicy(BookingPolicy):
    reason = ""

    def decide(self, request: RequestView, snapshot: Snapshot, now: float) -> Decision:
        homes = self.paths.decode_sites(request, snapshot)
        paths = [self.paths.predict(request, snapshot, home, home, now) for home in homes]
        return self.first_of(request, snapshot, now, paths, paths, self.reason)


@register_policy("collocated")
class CollocatedPolicy(_StayPolicy):
    """Prefill and decode in one engine, where the request is decoded.

    The site's instances are collocated ones.
    """

    reason = "collocated: prefill where it is decoded"


@register_policy("homogeneous")
class HomogeneousPolicy(_StayPolicy):
    """Prefill-decode disaggregation inside the local cluster; nothing crosses a link."""

    reason = "homogeneous: never offloads"


@register_policy("naive")
class NaivePolicy(BookingPolicy):
    """Every prefill is offloaded; local prefill only when no other path is alive."""

    def decide(self, request: RequestView, snapshot: Snapshot, now: float) -> Decision:
        finder = self.paths
        paths = [
            finder.predict(request, snapshot, source, home, now)
            for home in finder.decode_sites(request, snapshot)
            for source in finder.sources(snapshot, home)
        ]
        away = [path for path in paths if path.link is not None]
        return self.first_of(request, snapshot, now, paths, away, "naive: always offloads")
