"""Every way to serve a request, with its predicted TTFT.

T_prefill(l) and S_kv(l) are the report's; the rest is what the report leaves out: queues, the link's
backlog, and how much of the wire time prefill hides. KV leaves as each chunk is finished, so the transfer
ends at

    max(queue + T_prefill + last piece, max(queue + first chunk, link free) + S_kv · 8 / rate) + RTT

and only what lies after the end of prefill counts as the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from prfaas.model.decisions import CacheMove, PathPrediction
from prfaas.model.ids import LinkId, ModelId, SiteId
from prfaas.model.observations import LinkEstimate, RequestView, SiteObservation, Snapshot
from prfaas.routing.base import CostProfile, Fleet
from prfaas.routing.book import DispatchBook

K_CHUNK_TOKENS = 8192  # tokens after which the first bytes can leave
K_TYPICAL_TOKENS = 4096  # tokens at which seconds a token are read off a profile
K_WORKS_KEPT = 1024  # lengths whose time and bytes are remembered: sites of one kind ask for the same ones
_INF = float("inf")


@dataclass(frozen=True, slots=True)
class Costs:
    """A profile's figures with cached prefixes taken into account."""

    prefill_s: Callable[[int, int], float]
    """(prompt tokens, of them cached) to seconds."""
    transfer_bytes: Callable[[int, int], float]
    """(prompt tokens, of them held by the receiver) to bytes."""
    s_per_token: float
    """Seconds of prefill a queued token stands for, where a server reports tokens alone."""
    start_up_s: float
    """T(0): what a prefill takes however short it is."""
    chunk_tokens: int
    """Most tokens of a prefill step."""

    @classmethod
    def of(cls, profile: CostProfile) -> Costs:
        transfer: Callable[[int, int], float] | None = getattr(profile, "transfer_bytes", None)
        # A model.profiles.Profile knows how a cached prefix shortens prefill; another need not.
        prefill: Callable[..., float] = profile.prefill_s
        if transfer is None:
            whole = prefill
            prefill, transfer = (
                lambda tokens, cached: whole(tokens - cached),
                lambda tokens, held: _missing_bytes(profile, tokens, held),
            )
        return cls(
            prefill_s=lru_cache(K_WORKS_KEPT)(prefill),
            transfer_bytes=lru_cache(K_WORKS_KEPT)(transfer),
            s_per_token=profile.prefill_s(K_TYPICAL_TOKENS) / K_TYPICAL_TOKENS,
            start_up_s=max(0.0, profile.prefill_s(0.0)),
            chunk_tokens=getattr(profile, "chunk_tokens", K_CHUNK_TOKENS),
        )


def _missing_bytes(profile: CostProfile, tokens: int, held: int) -> float:
    """S_kv(l) less the KV, but not the state, of what the receiver holds."""
    if held <= 0:
        return profile.kv_bytes(tokens)
    return max(0.0, profile.kv_bytes(tokens) - profile.kv_bytes(min(held, tokens)) + profile.kv_bytes(0))


class PathFinder:
    """Predicts paths. Keeps nothing of a snapshot."""

    def __init__(self, fleet: Fleet, book: DispatchBook) -> None:
        self.fleet = fleet
        self.book = book
        self._costs: dict[tuple[SiteId, ModelId], Costs] = {}
        self._of_profile: dict[int, Costs] = {}
        """By the profile's identity: the fleet holds them all."""
        self._link_ids: dict[tuple[SiteId, SiteId], LinkId] = {}
        self._all_to: dict[SiteId, tuple[tuple[SiteId, ...], Sequence[SiteId], Sequence[LinkId]]] = {}
        """By home, for the sites of the last snapshot: what `_to` says."""

    def costs(self, site: SiteId, model: ModelId) -> Costs:
        """Raises UsageError when there is no profile."""
        key = (site, model)
        found = self._costs.get(key)
        if found is None:
            profile = self.fleet.profile(site, model)
            found = self._of_profile.get(id(profile))
            if found is None:
                found = self._of_profile[id(profile)] = Costs.of(profile)
            self._costs[key] = found
        return found

    def link_id(self, source: SiteId, target: SiteId) -> LinkId:
        """The same object each time: making one costs more than finding it."""
        found = self._link_ids.get((source, target))
        if found is None:
            found = self._link_ids[source, target] = LinkId(source, target)
        return found

    def queue_s(self, site: SiteObservation, model: ModelId, now: float) -> float:
        """Mean wait for a prefill instance of the site; inf where it has none."""
        if site.prefill_instances <= 0:
            return _INF
        waiting_s = self.book.backlog_s(site, now)
        if site.waiting_uncached_tokens:
            waiting_s += site.waiting_uncached_tokens * self.costs(site.site, model).s_per_token
        return waiting_s / site.prefill_instances

    def decode_sites(self, request: RequestView, snapshot: Snapshot) -> list[SiteId]:
        """Where it may be decoded: at home, or at any local site that has decode instances."""
        if request.home is not None:
            return [request.home]
        local = self.fleet.local_sites
        return [name for name, site in snapshot.sites.items() if name in local and site.decode_instances > 0]

    def predict(
        self,
        request: RequestView,
        snapshot: Snapshot,
        source: SiteId,
        home: SiteId,
        now: float,
        move_from: SiteId | None = None,
        queue_s: float | None = None,
    ) -> PathPrediction:
        """Prefill at `source`, decode at `home`; first bring the prefix that `move_from` holds to `source`.

        `queue_s` is the wait there, where it is known better than by the site's whole queue.
        What can't be done comes back as not feasible, with infinite times where they can't be told.
        """
        tokens = request.prompt_tokens
        site = snapshot.sites.get(source)
        costs = self.costs(source, request.model)
        why_not = ""
        if source in request.excluded:
            why_not = "tried before"
        elif site is None or site.prefill_instances <= 0:
            why_not = "no prefill instance"
        if queue_s is None:
            queue_s = self.queue_s(site, request.model, now) if site is not None else _INF
        cached = request.cached_tokens.get(source, 0) if request.cached_tokens else 0
        if cached:
            cached = max(0, min(cached, tokens - 1))
        move, move_s = None, 0.0
        if move_from is not None:
            there = max(0, min(request.cached_tokens.get(move_from, 0), tokens - 1))
            carrier = snapshot.links.get(self.link_id(move_from, source))
            why_not = why_not or _link_trouble(carrier, move_from, source)
            move = CacheMove(move_from, source, there, int(costs.transfer_bytes(there, cached)))
            move_s = max(0.0, _arrival_s(carrier, move.transfer_bytes) - queue_s) if not why_not else _INF
            cached = max(cached, there)
        prefill_s = costs.prefill_s(tokens, cached)
        size, tail_s = 0.0, 0.0
        if source != home:
            link = snapshot.links.get(self.link_id(source, home))
            rate_bps = 0.0 if link is None else link.usable_bps
            if rate_bps <= 0:
                why_not = why_not or _link_trouble(link, source, home)
            held = request.decode_cached_tokens.get(home, 0) if request.decode_cached_tokens else 0
            size = costs.transfer_bytes(tokens, max(0, min(held, tokens)) if held else 0)
            tail_s = _INF
            if not why_not:
                assert link is not None  # or there were trouble
                tail_s = transfer_tail_s(link, rate_bps, size, queue_s + move_s, prefill_s, tokens - cached)
        # By place, because there are half a dozen of them a decision.
        return PathPrediction(
            source,
            home,
            queue_s + move_s + prefill_s + tail_s,
            queue_s,
            prefill_s,
            tail_s,
            tokens - cached,
            int(size),
            move_s,
            move,
            0.0,
            not why_not,
            why_not,
        )

    def all_paths(self, request: RequestView, snapshot: Snapshot, now: float) -> list[PathPrediction]:
        """For each decode site.

        Local first, then each site with a link to it, then worthwhile cache moves.
        """
        paths: list[PathPrediction] = []
        new = not (request.cached_tokens or request.decode_cached_tokens or request.excluded)
        for home in self.decode_sites(request, snapshot):
            if new:
                paths += self._of_new(request, snapshot, home, now)
                continue
            for source in self.sources(snapshot, home):
                paths.append(self.predict(request, snapshot, source, home, now))
            if self.fleet.movable and request.cached_tokens:
                paths += [
                    self.predict(request, snapshot, source, home, now, giver)
                    for source, giver in self._moves(request, snapshot, home)
                ]
        return paths

    def _of_new(
        self, request: RequestView, snapshot: Snapshot, home: SiteId, now: float
    ) -> list[PathPrediction]:
        """`predict` from each source for a prompt that nobody holds any of and that has failed nowhere: most
        are so, and what sites of one kind have in common is worked out once.
        """
        tokens, model = request.prompt_tokens, request.model
        sites, links, backlog_s = snapshot.sites, snapshot.links, self.book.backlog_s
        costs_of = self._costs.get
        known, prefill_s, rate_bps = None, 0.0, 0.0
        size: float | None = None  # looked up where something is to be sent
        paths: list[PathPrediction] = []
        names, to_home = self._to(home, sites)
        for source, link in zip(names, map(links.get, to_home), strict=True):
            if source == home:
                link = None
            elif link is None:
                continue
            else:
                rate_bps = link.usable_bps
            site = sites.get(source)
            if site is None or site.prefill_instances <= 0 or (link is not None and rate_bps <= 0):
                paths.append(self.predict(request, snapshot, source, home, now))
                continue
            costs = costs_of((source, model)) or self.costs(source, model)
            if costs is not known:
                known, prefill_s, size = costs, costs.prefill_s(tokens, 0), None
            queue_s = backlog_s(site, now)
            if site.waiting_uncached_tokens:
                queue_s += site.waiting_uncached_tokens * costs.s_per_token
            queue_s /= site.prefill_instances
            if link is None:
                paths.append(
                    PathPrediction(source, home, queue_s + prefill_s, queue_s, prefill_s, 0.0, tokens, 0)
                )
                continue
            if size is None:
                size = costs.transfer_bytes(tokens, 0)
            tail_s = transfer_tail_s(link, rate_bps, size, queue_s, prefill_s, tokens)
            paths.append(
                PathPrediction(
                    source,
                    home,
                    queue_s + prefill_s + tail_s,
                    queue_s,
                    prefill_s,
                    tail_s,
                    tokens,
                    int(size),
                )
            )
        return paths

    def sources(self, snapshot: Snapshot, home: SiteId) -> list[SiteId]:
        """Sites that may prefill for `home`, itself first."""
        there = [name for name in snapshot.sites if name != home and (name, home) in snapshot.links]
        return [home, *there]

    def _to(
        self, home: SiteId, sites: Mapping[SiteId, SiteObservation]
    ) -> tuple[Sequence[SiteId], Sequence[LinkId]]:
        """`home` and all other sites, and the links that they would need to it (none is looked up)."""
        known, names = self._all_to.get(home), tuple(sites)
        if known is None or known[0] != names:
            others = [home, *[name for name in names if name != home]]
            known = self._all_to[home] = (names, others, [self.link_id(name, home) for name in others])
        return known[1:]

    def _moves(self, request: RequestView, snapshot: Snapshot, home: SiteId) -> list[tuple[SiteId, SiteId]]:
        """(prefill site, giver of a longer prefix), givers that haven't failed this request."""
        cached = request.cached_tokens
        return [
            (source, giver)
            for source in self.sources(snapshot, home)
            for giver, tokens in cached.items()
            if giver != source
            and tokens > cached.get(source, 0)
            and (giver, source) in snapshot.links
            and giver not in request.excluded
        ]


def _arrival_s(link: LinkEstimate | None, size_bytes: float) -> float:
    """Seconds until bytes handed to the link now are all there."""
    if link is None or link.usable_bps <= 0:
        return _INF
    return (link.backlog_bytes + size_bytes) * 8 / link.usable_bps + link.rtt_s


def transfer_tail_s(
    link: LinkEstimate, rate_bps: float, size_bytes: float, start_s: float, prefill_s: float, uncached: int
) -> float:
    """From the end of prefill, which starts in start_s, to the last byte's acknowledgement."""
    # of prefill: before the first piece leaves, and after the last but one
    share = K_CHUNK_TOKENS / uncached if uncached > K_CHUNK_TOKENS else 1.0
    wire_s = size_bytes * 8 / rate_bps
    wait_s = link.backlog_bytes * 8 / rate_bps
    first_s = start_s + prefill_s * share
    whole_s = (wait_s if wait_s > first_s else first_s) + wire_s - start_s - prefill_s
    last_s = wire_s * share
    return (whole_s if whole_s > last_s else last_s) + link.rtt_s


def _link_trouble(link: LinkEstimate | None, source: SiteId, home: SiteId) -> str:
    if link is None:
        return f"no link {source}>{home}"
    if not link.up:
        return "link down"
    if link.usable_bps <= 0:
        return "link reserved for other traffic"
    return ""
