"""What using a resource costs the others.

A second of use of a resource delays everybody who comes before its queue is next empty: with a queue of Q
seconds, at load ρ and λ requests a second, that is after Q / (1 − ρ), and so many are delayed:

    raw price  π = λ · Q / (1 − ρ)        seconds of delay to others for a second of use

Queues of the moment alone would mislead: the moment a queue is empty its resource would be given away for
work that is better done elsewhere, and at high load that wastes capacity. So for each request the sum of
the raw prices of what it could use is shared out by the multipliers ν of the fluid optimum (duals.py), and
only K_OWN_SHARE of it stays with the queues themselves, which keeps them in balance:

    μ_i = (1 − K_OWN_SHARE) · ν_i / Σν · Σπ + K_OWN_SHARE · π_i

It goes out exactly when T_local(l) · μ_local > T_prfaas(l) · μ_prfaas + S_kv(l) · μ_link (in seconds of the
whole resource), give or take its own delay.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from math import exp
from typing import TypeAlias

from prfaas.model.decisions import PathPrediction
from prfaas.model.ids import LinkId, SiteId
from prfaas.model.observations import Snapshot
from prfaas.routing.duals import DualPrices
from prfaas.routing.paths import PathFinder

K_RATE_S = 20.0  # s, time constant of load and request rate
K_LOAD_LIMIT = 0.9  # ρ is taken as at most this: what is measured isn't known better
K_OWN_SHARE = 0.1
K_SOLVE_S = 1.0  # s between looks at the fluid optimum, at least,
K_SOLVE_REQUESTS = 32  # and so many requests, unless a capacity moved


class Resource:
    """A site's prefill instances together, or a link. Work is in seconds of the whole resource."""

    __slots__ = (
        "_as_of_s",
        "_requests_per_s",
        "_work_per_s",
        "backlog_s",
        "capacity",
        "number",
        "price",
        "shared",
    )

    def __init__(self, number: int, now: float) -> None:
        self.number = number
        self.capacity = 0.0
        self.backlog_s = 0.0
        self.price = 0.0
        """π of the last look."""
        self.shared = 0.0
        """μ of the last look."""
        self._work_per_s = 0.0
        self._requests_per_s = 0.0
        self._as_of_s = now

    def on_work(self, work_s: float, now: float) -> None:
        """A request that will use it for work_s was sent its way."""
        kept = self._kept(now)
        self._work_per_s = self._work_per_s * kept + work_s / K_RATE_S
        self._requests_per_s = self._requests_per_s * kept + 1 / K_RATE_S
        self._as_of_s = max(now, self._as_of_s)

    def raw_price(self, backlog_s: float, now: float) -> float:
        """π at a queue of backlog_s."""
        as_of_s = self._as_of_s
        kept = exp((as_of_s - now) / K_RATE_S) if now > as_of_s else 1.0  # as _kept, at half its price
        load = self._work_per_s * kept
        if load > K_LOAD_LIMIT:
            load = K_LOAD_LIMIT
        self.backlog_s = backlog_s
        self.price = price = self._requests_per_s * kept * backlog_s / (1 - load)
        return price

    def _kept(self, now: float) -> float:
        return exp((self._as_of_s - now) / K_RATE_S) if now > self._as_of_s else 1.0


Way: TypeAlias = tuple[Resource, LinkId | None, Resource | None]
"""The site that a path prefills at, and the link to where it is decoded, if it needs one."""


class PriceList:
    """Prices of all resources, known by site name or LinkId."""

    def __init__(self, paths: PathFinder) -> None:
        self._paths = paths
        self._book = paths.book
        self._duals = DualPrices()
        self._resources: dict[Hashable, Resource] = {}
        self._ways: dict[tuple[SiteId, SiteId], Way] = {}
        """What a path without a cache move uses, by prefill and decode site."""
        self._looked_s = -math.inf
        self._unsolved = 0
        self._came: tuple[Sequence[PathPrediction], Sequence[Way | None]] | None = None
        """The last request's paths, until they are settled."""
        self._capacities: list[float] | None = None
        """What the optimum is to be found for, if it is due; None: it isn't."""

    def ways(self, paths: Sequence[PathPrediction], snapshot: Snapshot, now: float) -> list[Way | None]:
        """What each path uses, with capacities of now; None for those that aren't feasible."""
        known, sites, links = self._ways, snapshot.sites, snapshot.links
        ways: list[Way | None] = []
        for path in paths:
            if not path.feasible:
                ways.append(None)
                continue
            way = known.get((path.prefill_site, path.decode_site)) or self._way(path, now)
            site, link_id, link = way
            site.capacity = float(sites[path.prefill_site].prefill_instances)
            if link is not None and link_id is not None:
                link.capacity = links[link_id].usable_bps
            ways.append(way)
        return ways

    def observe(
        self, paths: Sequence[PathPrediction], ways: Sequence[Way | None], snapshot: Snapshot, now: float
    ) -> None:
        """A request came that could take `paths`: part of the traffic that the optimum is for, once that is
        settled. The last one is by now.
        """
        self.settle()
        self._came = paths, ways
        if now - self._looked_s >= K_SOLVE_S:
            self._looked_s = now
            self._refresh(snapshot)
            self._capacities = [resource.capacity for resource in self._resources.values()]

    def settle(self) -> None:
        """Find the optimum with what has come, if that is due. It takes as long as several decisions, so that
        it is best done where no request waits for it.
        """
        if self._came is None:
            return
        options = []
        for path, way in zip(*self._came, strict=True):
            if way is None or path.cache_move is not None:
                continue
            site, _, link = way
            number = -1 if link is None else link.number
            options.append((site.number, path.prefill_s, number, path.transfer_bytes * 8.0))
        self._came = None
        if options:
            self._duals.observe(options)
            self._unsolved += 1
        capacities, self._capacities = self._capacities, None
        if capacities is not None and (self._unsolved >= K_SOLVE_REQUESTS or self._duals.moved(capacities)):
            self._unsolved = 0
            self._duals.solve(capacities)

    def costs(
        self,
        paths: Sequence[PathPrediction],
        ways: Sequence[Way | None],
        snapshot: Snapshot,
        gain: float,
        now: float,
        queues_s: Mapping[SiteId, float] | None = None,
    ) -> list[float]:
        """Seconds of delay to others for each path (inf where it isn't feasible).

        `queues_s` are the sites' queues that matter to others, where not all that waits does.
        """
        used: list[Resource] = []
        for path, way in zip(paths, ways, strict=True):
            if way is None:
                continue
            site, link_id, link = way
            if site not in used:
                used.append(site)
                site.raw_price(path.queue_s if queues_s is None else queues_s[path.prefill_site], now)
            if link is not None and link_id is not None and link not in used:
                used.append(link)
                self._look_at(link, link_id, snapshot, now)
            move = path.cache_move
            if move is not None:
                link_id = self._paths.link_id(move.source, move.target)
                link = self._link(link_id, snapshot, now)
                if link not in used:
                    used.append(link)
                    self._look_at(link, link_id, snapshot, now)
        self._share_out(used)
        costs = []
        for path, way in zip(paths, ways, strict=True):
            if way is None:
                costs.append(math.inf)
                continue
            site, _, link = way
            cost = site.shared * (path.prefill_s / site.capacity)
            if link is not None:
                cost += link.shared * (path.transfer_bytes * 8 / link.capacity)
            move = path.cache_move
            if move is not None:
                link = self._resources[self._paths.link_id(move.source, move.target)]
                cost += link.shared * (move.transfer_bytes * 8 / link.capacity)
            costs.append(gain * cost)
        return costs

    def on_dispatch(self, path: PathPrediction, now: float) -> None:
        """A request was sent on `path`."""
        way = self._ways.get((path.prefill_site, path.decode_site))
        if way is not None:
            site, _, link = way
            if site.capacity > 0:
                site.on_work(path.prefill_s / site.capacity, now)
            if link is not None and link.capacity > 0:
                link.on_work(path.transfer_bytes * 8 / link.capacity, now)
        move = path.cache_move
        if move is not None:
            link = self._resources.get(self._paths.link_id(move.source, move.target))
            if link is not None and link.capacity > 0:
                link.on_work(move.transfer_bytes * 8 / link.capacity, now)

    def multiplier(self, resource: Hashable) -> float:
        """ν of a site or link; 0 before anything is known."""
        known = self._resources.get(resource)
        multipliers = self._duals.multipliers
        return multipliers[known.number] if known is not None and known.number < len(multipliers) else 0.0

    def links(self) -> list[LinkId]:
        """Links that some request could have used."""
        return [name for name in self._resources if isinstance(name, LinkId)]

    def price_of_work(self, resource: Hashable) -> float:
        """ν of a second of one instance, or of a bit, in the fluid optimum; inf where it is out of use."""
        known = self._resources.get(resource)
        if known is None or known.capacity <= 0:
            return math.inf
        return self.multiplier(resource) / known.capacity

    def get_log_data(self) -> Mapping[str, float]:
        data: dict[str, float] = {}
        for name, resource in self._resources.items():
            data[f"price {name}"] = resource.price
            data[f"backlog_s {name}"] = resource.backlog_s
            data[f"multiplier {name}"] = self.multiplier(name)
        return data

    def _crossed(self, path: PathPrediction) -> LinkId | None:
        if path.prefill_site == path.decode_site:
            return None
        return self._paths.link_id(path.prefill_site, path.decode_site)

    def _look_at(self, link: Resource, link_id: LinkId, snapshot: Snapshot, now: float) -> None:
        """A link's π: its queue lasts until it is free of what it has and of what prefill will hand it."""
        waiting = snapshot.links[link_id].backlog_bytes + self._book.coming_bytes(link_id, now)
        link.raw_price(waiting * 8 / link.capacity, now)

    def _share_out(self, used: Sequence[Resource]) -> None:
        """μ of each, from their π."""
        multipliers = self._duals.multipliers
        known, weight, every = len(multipliers), 0.0, 0.0
        for one in used:
            if one.number >= known:
                weight = 0.0
                break
            weight += multipliers[one.number]
            every += one.price
        if weight <= 0:
            for one in used:
                one.shared = one.price
            return
        factor = (1 - K_OWN_SHARE) * every / weight
        for one in used:
            one.shared = factor * multipliers[one.number] + K_OWN_SHARE * one.price

    def _way(self, path: PathPrediction, now: float) -> Way:
        """The site and the link that a path uses, seen for the first time."""
        crossed = self._crossed(path)
        way = self._ways[path.prefill_site, path.decode_site] = (
            self._resource(path.prefill_site, now),
            crossed,
            None if crossed is None else self._resource(crossed, now),
        )
        return way

    def _link(self, link: LinkId, snapshot: Snapshot, now: float) -> Resource:
        resource = self._resource(link, now)
        resource.capacity = snapshot.links[link].usable_bps
        return resource

    def _resource(self, name: Hashable, now: float) -> Resource:
        found = self._resources.get(name)
        if found is None:
            found = self._resources[name] = Resource(len(self._resources), now)
        return found

    def _refresh(self, snapshot: Snapshot) -> None:
        """Capacities of now, 0 for what is gone."""
        for name, resource in self._resources.items():
            if isinstance(name, LinkId):
                link = snapshot.links.get(name)
                resource.capacity = link.usable_bps if link is not None else 0.0
            elif isinstance(name, str):
                site = snapshot.sites.get(name)
                resource.capacity = float(site.prefill_instances) if site is not None else 0.0
