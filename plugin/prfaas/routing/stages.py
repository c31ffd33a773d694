"""What the slow loop is told of one local cluster: how busy its stages are, and the system to plan for.

`request` and `answered` see each request, `sample` looks at the servers now and then. Lengths, decode times
and offloaded bytes are those of late, and limited in number; busyness is the mean of the samples since the
last look.

The answer's length isn't counted in tokens but in the time that decode spent on it, which is what a place in
the batch is taken for: L_out is that time over T_decode at the batch of late, so that
Θ_pd-d = N_d · BS_max / (T_decode · L_out) rests on a measured residence whatever T_decode is.

A PrfaaS site that serves several local clusters is there for each by its part of their traffic, offloaded or
not: were each to count all of it, all would give up prefill of their own for the same instances.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prfaas.model.ids import LinkId, SiteId
from prfaas.model.lengths import Empirical
from prfaas.model.observations import InstanceObservation, SiteObservation, Snapshot
from prfaas.model.profiles import Curve, DecodeProfile, Profile
from prfaas.planner.system import System
from prfaas.routing.base import CostProfile
from prfaas.routing.slow_loop import Stage, StageLoad

K_KEPT = 4096  # requests whose lengths and times count
K_LEAST_SPAN_S = 1.0  # over which traffic is counted
K_STEP_S = 0.03  # T_decode where no profile tells it; it cancels out
K_GRID_TOKENS = tuple(float(1 << power) for power in range(6, 21))


@dataclass(slots=True)
class _Samples:
    """Sums over the samples since the last look."""

    count: int = 0
    since_s: float | None = None
    span_s: float = 0.0
    sent_bytes: int = 0
    prefill_busy: float = 0.0
    prefill_queue_s: float = 0.0
    decode_busy: float = 0.0
    decode_waiting: float = 0.0
    batch: float = 0.0
    away_busy: float = 0.0
    away_queue_s: float = 0.0
    usable_bps: float = 0.0


class StageMeter:
    """One local cluster `home` and the sites that prefill for it. `now` never goes back."""

    def __init__(self, home: SiteId, profiles: Mapping[SiteId, CostProfile], window_s: float) -> None:
        self.home = home
        self._profiles = profiles
        self._window_s = window_s
        self._lengths: deque[tuple[float, int]] = deque(maxlen=K_KEPT)
        self._decodes_s: deque[tuple[float, float]] = deque(maxlen=K_KEPT)
        self._seen = _Samples()
        self._batch = 1.0

    @property
    def requests(self) -> int:
        """Requests of late, by which the plan is made."""
        return len(self._lengths)

    def request(self, uncached_tokens: int, offloaded_bytes: int, now: float) -> None:
        """One was sent that `home` decodes: tokens that its own cache doesn't cover; bytes over a link."""
        self._lengths.append((now, max(1, uncached_tokens)))
        self._seen.sent_bytes += offloaded_bytes
        _forget(self._lengths, now - self._window_s)

    def answered(self, decode_s: float, now: float) -> None:
        """One was answered whole, after so long in decode."""
        self._decodes_s.append((now, decode_s))
        _forget(self._decodes_s, now - self._window_s)

    def sample(self, snapshot: Snapshot) -> None:
        """The servers as they are at snapshot.now."""
        seen = self._seen
        if seen.since_s is None:
            seen.since_s, seen.sent_bytes = snapshot.now, 0
        seen.span_s = snapshot.now - seen.since_s
        seen.count += 1
        site, costs = snapshot.sites.get(self.home), self._profiles.get(self.home)
        if site is not None:
            seen.prefill_busy += _busy_share(site.instances)
            seen.prefill_queue_s += 0.0 if costs is None else _queue_s(site, costs)
            if site.decode_slots:
                seen.decode_busy += min(1.0, site.decode_running / site.decode_slots)
                seen.decode_waiting += site.decode_waiting / site.decode_slots
            if site.decode_instances:
                seen.batch += site.decode_running / site.decode_instances
        away = self._away(snapshot)
        if away:
            seen.away_busy += sum(_busy_share(one.instances) for one in away) / len(away)
            queues = [_queue_s(one, self._profiles[one.site]) for one in away]
            usable_bps = self._usable_bps(snapshot)
            backlog = sum(snapshot.links[LinkId(one.site, self.home)].backlog_bytes for one in away)
            seen.away_queue_s += max(min(queues), backlog * 8 / usable_bps)
            seen.usable_bps += usable_bps

    def loads(self) -> list[StageLoad]:
        """How busy each stage was since the last call, which forgets it. Empty before any sample."""
        seen, self._seen = self._seen, _Samples()
        if not seen.count:
            return []
        capacity_bytes = seen.usable_bps / seen.count * seen.span_s / 8
        link = min(1.0, seen.sent_bytes / capacity_bytes) if capacity_bytes > 0 else 0.0
        residence_s = self._residence_s() or 0.0
        self._batch = max(1.0, seen.batch / seen.count)
        return [
            StageLoad(Stage.OFFLOAD, max(link, seen.away_busy / seen.count), seen.away_queue_s / seen.count),
            StageLoad(Stage.LOCAL_PREFILL, seen.prefill_busy / seen.count, seen.prefill_queue_s / seen.count),
            StageLoad(
                Stage.DECODE, seen.decode_busy / seen.count, seen.decode_waiting / seen.count * residence_s
            ),
        ]

    def system(self, snapshot: Snapshot, clusters: Iterable[StageMeter] = ()) -> System | None:
        """What to plan for; None while too little is known: no answer yet, or no batch limit. `clusters`: all
        local clusters, which may share PrfaaS sites with this one.
        """
        site, residence_s = snapshot.sites.get(self.home), self._residence_s()
        costs = self._profiles.get(self.home)
        if site is None or costs is None or not self._lengths or not residence_s or not site.decode_instances:
            return None
        decode = costs.decode if isinstance(costs, Profile) else None
        if decode is None:
            slots = site.decode_slots // site.decode_instances
            if slots < 1:
                return None
            decode = DecodeProfile.constant(K_STEP_S, slots)
        away = self._away(snapshot)
        # Several PrfaaS sites count as one of the kind that most instances are of.
        far = self._profiles[max(away, key=lambda one: one.prefill_instances).site] if away else costs
        return System(
            lengths=Empirical(tokens for _, tokens in self._lengths),
            output_tokens=residence_s / decode.step_s(self._batch),
            prfaas_instances=self._share(away, snapshot, clusters),
            egress_bps=self._usable_bps(snapshot),
            prfaas_prefill=prefill_curve(far),
            kv=kv_curve(far),
            local_instances=site.prefill_instances + site.decode_instances,
            local_prefill=prefill_curve(costs),
            decode=decode,
        )

    def _share(
        self, away: Sequence[SiteObservation], snapshot: Snapshot, clusters: Iterable[StageMeter]
    ) -> int:
        """Of the instances of these sites, those that are this cluster's: one at least."""
        own, instances = self._tokens_per_s(snapshot.now), 0.0
        others = [one for one in clusters if one is not self]
        for site in away:
            claims = own + sum(
                one._tokens_per_s(snapshot.now)
                for one in others
                if one.home == site.site or one._reached_from(site, snapshot)
            )
            instances += site.prefill_instances * own / claims
        return max(1, round(instances)) if away else 0

    def _tokens_per_s(self, now: float) -> float:
        """Of late, that its own cache doesn't cover."""
        if not self._lengths:
            return 0.0
        return sum(tokens for _, tokens in self._lengths) / max(K_LEAST_SPAN_S, now - self._lengths[0][0])

    def _residence_s(self) -> float | None:
        if not self._decodes_s:
            return None
        return sum(decode_s for _, decode_s in self._decodes_s) / len(self._decodes_s)

    def _away(self, snapshot: Snapshot) -> list[SiteObservation]:
        """Sites that can prefill for home now."""
        return [
            site
            for name, site in snapshot.sites.items()
            if name in self._profiles and self._reached_from(site, snapshot)
        ]

    def _reached_from(self, site: SiteObservation, snapshot: Snapshot) -> bool:
        if site.site == self.home or site.prefill_instances <= 0:
            return False
        link = snapshot.links.get(LinkId(site.site, self.home))
        return link is not None and link.usable_bps > 0

    def _usable_bps(self, snapshot: Snapshot) -> float:
        return sum(snapshot.links[LinkId(one.site, self.home)].usable_bps for one in self._away(snapshot))


def prefill_curve(costs: CostProfile) -> Curve:
    """T_prefill as a curve, whatever kind of profile tells it."""
    if isinstance(costs, Profile):
        return costs.prefill
    return Curve.of(K_GRID_TOKENS, [max(1e-9, costs.prefill_s(tokens)) for tokens in K_GRID_TOKENS])


def kv_curve(costs: CostProfile) -> Curve:
    """S_kv as a curve."""
    if isinstance(costs, Profile):
        return costs.kv
    return Curve.of(K_GRID_TOKENS, [max(1.0, costs.kv_bytes(tokens)) for tokens in K_GRID_TOKENS])


def _forget(kept: deque[tuple[float, int]] | deque[tuple[float, float]], before_s: float) -> None:
    while kept and kept[0][0] < before_s:
        kept.popleft()


def _busy_share(instances: Sequence[InstanceObservation]) -> float:
    able = [one for one in instances if one.takes_prefill]
    busy = sum(1 for one in able if one.waiting_uncached_tokens or one.running or one.waiting)
    return busy / len(able) if able else 0.0


def _queue_s(site: SiteObservation, costs: CostProfile) -> float:
    if site.prefill_instances <= 0:
        return 0.0
    waiting_s = costs.prefill_s(site.waiting_uncached_tokens) if site.waiting_uncached_tokens else 0.0
    return (site.prefill_backlog_s + waiting_s) / site.prefill_instances
