"""Which of a site's instances: the one whose queue and cached prefix together make it first."""

from __future__ import annotations

from prfaas.model.decisions import PathPrediction
from prfaas.model.ids import InstanceId
from prfaas.model.observations import RequestView, Snapshot
from prfaas.routing.paths import Costs


def prefill_instance(
    request: RequestView, snapshot: Snapshot, path: PathPrediction, costs: Costs
) -> InstanceId | None:
    """The instance of path.prefill_site that would be done first; None when the shell is to pick."""
    site = snapshot.sites.get(path.prefill_site)
    best: InstanceId | None = None
    best_s = float("inf")
    for one in site.prefills if site is not None else ():
        backlog_s = one.prefill_backlog_s
        if backlog_s is None:
            backlog_s = one.waiting_uncached_tokens * costs.s_per_token
        cached = request.instance_cached_tokens.get(one.instance)
        own_s = path.prefill_s if cached is None else costs.prefill_s(request.prompt_tokens, cached)
        if backlog_s + own_s < best_s:
            best, best_s = one.instance, backlog_s + own_s
    return best


def decode_instance(snapshot: Snapshot, path: PathPrediction) -> InstanceId | None:
    """The instance of path.decode_site with the smallest share of its batch in use; None: the shell picks."""
    site = snapshot.sites.get(path.decode_site)
    best: InstanceId | None = None
    least, least_used = float("inf"), 0
    for one in site.decodes if site is not None else ():
        used, limit = one.running + one.waiting, one.max_running
        share = used / limit if limit else float(used)
        if best is None or share < least or (share == least and used < least_used):
            best, least, least_used = one.instance, share, used
    return best
