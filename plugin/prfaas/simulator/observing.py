"""What the door of a simulated system knows: of its sites, its links, and of the request before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prfaas.model.ids import LinkId, SiteId
from prfaas.model.observations import (
    InstanceObservation,
    LinkEstimate,
    RequestView,
    Role,
    SiteObservation,
    Snapshot,
)
from prfaas.simulator.engine import Engine
from prfaas.simulator.links import WatchedLink
from prfaas.simulator.prefixes import HeardPrefixes
from prfaas.simulator.tally import Tally
from prfaas.workload.requests import TimedRequest


class Outlook:
    """The door's view. Of the sites' load it is up to `every_s` old, as a polling router's; of links, as
    fresh as their reports.
    """

    def __init__(
        self,
        sites: Mapping[SiteId, Sequence[Engine]],
        links: Mapping[LinkId, WatchedLink],
        homes: Sequence[SiteId],
        every_s: float,
        prefixes: HeardPrefixes,
        listed: bool = False,
        hears_links: bool = True,
    ) -> None:
        self._engines, self._homes, self._every_s = sites, homes, every_s
        self._tallies = {site: Tally(engines) for site, engines in sites.items()}
        self.prefixes = prefixes
        self._listed = listed
        """Whether instances that only prefill are told one by one, to a policy that reckons with each."""
        self._site_of = {engine.name: site for site, engines in sites.items() for engine in engines}
        self._sites: dict[SiteId, SiteObservation] = {}
        self._sites_at_s = -math.inf
        self._estimates: dict[LinkId, LinkEstimate] = {}
        for link_id, link in links.items():
            self._estimates[link_id] = link.estimate
            if hears_links:
                link.told = self._estimates

    def snapshot(self, now: float) -> Snapshot:
        """What the door knows at `now`: all of it, because what is missing counts as gone."""
        if now - self._sites_at_s >= self._every_s or not self._sites:
            self._sites_at_s = now
            self._sites = self.look(now)
        return Snapshot(now, self._sites, self._estimates)

    def look(self, now: float) -> dict[SiteId, SiteObservation]:
        """The sites' load as it is; the door doesn't hear of it."""
        return {site: self._observe(site, now) for site in self._engines}

    def forget_sites(self) -> None:
        """The sites' load is looked at anew for the next request, however lately it was."""
        self._sites_at_s = -math.inf

    def view(
        self, request: TimedRequest, excluded: frozenset[SiteId], attempt: int, now: float
    ) -> RequestView:
        """The request as the policy sees it at this attempt."""
        usable = self.prefixes.usable(request, now) if request.block_ids else {}
        cached: dict[SiteId, int] = {}
        for name, tokens in usable.items():
            site = self._site_of[name]
            cached[site] = max(tokens, cached.get(site, 0))
        return RequestView(
            str(request.index),
            request.prompt_tokens,
            request.arrival_s,
            home=self._homes[request.index % len(self._homes)] if self._homes else None,
            cached_tokens=cached,
            instance_cached_tokens=usable,
            output_tokens=request.output_tokens,
            tenant=request.tenant,
            slo_class=request.slo_class,
            excluded=excluded,
            attempt=attempt,
        )

    def _observe(self, site: SiteId, now: float) -> SiteObservation:
        tally = self._tallies[site]
        tally.count()
        listed = []
        if self._listed:
            for engine in self._engines[site]:
                if engine.role == "prefill" and engine.up and not engine.draining:
                    listed.append(
                        InstanceObservation(
                            engine.name,
                            site,
                            Role.PREFILL,
                            now,
                            prefill_backlog_s=engine.work_s(now),
                            chunk_tokens=engine.chunk_tokens,
                            prefill_requests=engine.prefill_requests,
                        )
                    )
        return SiteObservation(
            site,
            now,
            prefill_instances=tally.prefills,
            decode_instances=tally.decodes,
            prefill_backlog_s=sum(tally.backlogs),
            decode_running=sum(tally.running),
            decode_waiting=sum(tally.waiting),
            decode_slots=tally.slots,
            instances=tuple(listed) if len(listed) == tally.prefills else (),
        )
