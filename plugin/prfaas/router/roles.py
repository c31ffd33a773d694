"""Acts on the slow loop: thresholds to the policy, and one server at a time from one role to the other.

A conversion: the server gets nothing new (drain), is asked to change its role (`/pd_role_switch`) once it
has answered all that it had, and is used in its new role from its answer on. SGLang itself refuses while
anything is left on it, of whomever: then it is asked again until `drain_limit_s`. A server that doesn't say
what became of it is asked for its load, which tells its role; one that says that it broke stays out of use
until it has been restarted. Nothing is done in a dry run, nor to servers that aren't `convertible`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from prfaas.config.router import RouterConfig, SlowLoop
from prfaas.model.errors import PrfaasError
from prfaas.model.ids import SiteId
from prfaas.model.observations import Role, Snapshot
from prfaas.model.profiles import Profile
from prfaas.planner.system import Plan
from prfaas.router.fleet import ServerHandle, ServerPool
from prfaas.router.outcome import Outcome
from prfaas.router.role_switch import ask_switch
from prfaas.router.ticket import Record
from prfaas.routing import CostProfile, Policy, Proposal, StageLoad, StageMeter, Step, StepKind
from prfaas.routing import SlowLoop as Loop
from prfaas.telemetry.router_metrics import RouterMetrics

log = logging.getLogger("prfaas.router")

K_SAMPLE_S = 1.0
"""Between two samples, where looks aren't so frequent that four would not fit between them."""
K_AGAIN_S = 0.5
"""Between two questions to a server that isn't idle yet."""
K_KEPT_STEPS = 100
K_THRESHOLD_STEP = 0.05
"""Share by which a threshold must differ from the one in force before it is set."""


@dataclass(slots=True)
class StepRecord:
    """One step, as the page and the event log show it."""

    at_s: float
    """Wall clock."""
    site: SiteId
    server: str
    step: str
    role: str
    reason: str
    dry_run: bool
    seconds: float | None = None
    """Of a conversion, from its drain to its end."""
    event: str = "slow-loop"


class _Cluster:
    """One site that decodes."""

    def __init__(self, site: SiteId, config: SlowLoop, profiles: Mapping[SiteId, CostProfile]) -> None:
        costs = profiles.get(site)
        self.loop = Loop(site, config, costs.role_switch if isinstance(costs, Profile) else None)
        self.meter = StageMeter(site, profiles, config.window_s)
        self.proposal: Proposal | None = None
        self.loads: list[StageLoad] = []
        self.threshold: float | None = None
        """In force by us."""
        self.task: asyncio.Task[None] | None = None
        self.failed = ""
        """Why no plan could be made, as told."""


class RoleKeeper:
    """Runs the slow loops of one router. `run` until cancelled; then conversions are given up."""

    def __init__(
        self,
        config: RouterConfig,
        servers: ServerPool,
        metrics: RouterMetrics,
        *,
        profiles: Callable[[RouterConfig], Mapping[SiteId, CostProfile]],
        snapshot: Callable[[float], Snapshot],
        policy: Callable[[], Policy],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        on_step: Callable[[StepRecord], None] = lambda step: None,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self._servers, self._metrics = servers, metrics
        self._profiles, self._snapshot, self._policy = profiles, snapshot, policy
        self._clock, self._wall_clock = clock, wall_clock
        self._on_step, self._on_news = on_step, on_news
        self.steps: deque[StepRecord] = deque(maxlen=K_KEPT_STEPS)
        self._clusters: dict[SiteId, _Cluster] = {}
        self._config: SlowLoop | None = None
        self._made_of: object = None
        self._policy_told: Policy | None = None
        self.apply(config)

    def apply(self, config: RouterConfig) -> None:
        """Take over a configuration. The loops are made anew where what they depend on has changed, which
        gives up a conversion that is under way. Raises UsageError or ConfigError for a profile."""
        profiles = self._profiles(config) if config.slow_loop is not None else {}
        made_of = (config.slow_loop, config.local_sites, profiles)
        if made_of == self._made_of:
            return
        self.end()
        self._made_of, self._config = made_of, config.slow_loop
        self._clusters = {}
        if config.slow_loop is not None:
            for site in sorted(config.local_sites):
                self._clusters[site] = _Cluster(site, config.slow_loop, profiles)

    def end(self) -> None:
        """Give up conversions; servers go back into service as they are."""
        for cluster in self._clusters.values():
            if cluster.task is not None:
                cluster.task.cancel()
                cluster.task = None

    def on_record(self, record: Record) -> None:
        """A decision was made."""
        chosen = record.decision.chosen
        if chosen is None or record.attempt or record.prefill is None:
            return
        cluster = self._clusters.get(chosen.decode_site)
        if cluster is not None:
            paths = [chosen, *record.decision.alternatives]
            uncached = next(
                (path.uncached_tokens for path in paths if path.prefill_site == chosen.decode_site),
                chosen.uncached_tokens,
            )
            offloaded = chosen.transfer_bytes if chosen.link is not None else 0
            cluster.meter.request(uncached, offloaded, self._clock())

    def on_outcome(self, outcome: Outcome) -> None:
        """A request has ended."""
        cluster = self._clusters.get(outcome.decode_site or "")
        if cluster is not None and outcome.decode_s is not None:
            cluster.meter.answered(outcome.decode_s, self._clock())

    async def run(self) -> None:
        try:
            while True:
                every_s = self._config.look_every_s if self._config is not None else K_SAMPLE_S
                await asyncio.sleep(min(K_SAMPLE_S, every_s / 4))
                self.tick()
        finally:
            self.end()

    def tick(self) -> None:
        """One sample, and a look where one is due."""
        now = self._clock()
        if not self._clusters or self._config is None:
            return
        convertible = {one.name for one in self._servers if one.config.convertible and not one.broken}
        for site, cluster in self._clusters.items():
            try:
                self._look(site, cluster, self._snapshot(now), convertible)
                cluster.failed = ""
            except (PrfaasError, ArithmeticError, LookupError, ValueError) as error:
                # Serving doesn't depend on it: a plan that can't be made is told, once, and tried again.
                if repr(error) != cluster.failed:
                    cluster.failed = repr(error)
                    log.error("the slow loop can't plan for %s: %r", site, error)

    def _look(
        self, site: SiteId, cluster: _Cluster, snapshot: Snapshot, convertible: Collection[str]
    ) -> None:
        assert self._config is not None
        meter, there, now = cluster.meter, snapshot.sites.get(site), snapshot.now
        meter.sample(snapshot)
        if there is not None and (given_up := cluster.loop.overdue(there, now)) is not None:
            self._take(cluster, given_up)
        if there is None or not cluster.loop.due(now) or meter.requests < self._config.least_requests:
            return
        cluster.loads = meter.loads()
        system = meter.system(snapshot, [one.meter for one in self._clusters.values()])
        if system is None:
            return
        proposal = cluster.loop.look(there, cluster.loads, system, now, convertible)
        if proposal is None:
            return
        cluster.proposal = proposal
        for load in cluster.loads:
            self._metrics.stage_utilisation.labels(site, load.stage).set(load.utilisation)
        self._set_threshold(site, cluster, proposal.here, now)
        if proposal.step is not None:
            self._take(cluster, proposal.step)

    def _set_threshold(self, site: SiteId, cluster: _Cluster, here: Plan | None, now: float) -> None:
        """The threshold of the split as it is: roles change later, if at all."""
        assert self._config is not None
        if here is None:
            return
        self._metrics.planned_threshold.labels(site).set(here.threshold_tokens)
        if self._config.dry_run:
            return
        policy = self._policy()
        before = cluster.threshold if policy is self._policy_told else None
        if before is None or abs(here.threshold_tokens - before) > K_THRESHOLD_STEP * max(before, 1.0):
            policy.on_plan(home=site, threshold_tokens=here.threshold_tokens, now=now)
            self._policy_told, cluster.threshold = policy, here.threshold_tokens

    def _take(self, cluster: _Cluster, step: Step) -> None:
        handle = self._servers.get(step.instance)
        self._note(step)
        if step.dry_run:
            return
        if step.kind is StepKind.RESUME:  # the drain took too long
            if cluster.task is not None:
                cluster.task.cancel()
            self._metrics.conversions.labels(step.site, step.role, "not drained").inc()
        elif handle is not None:
            cluster.task = asyncio.get_running_loop().create_task(self._convert(cluster, handle, step))
            cluster.task.add_done_callback(_tell_of_death)

    async def _convert(self, cluster: _Cluster, handle: ServerHandle, step: Step) -> None:
        """From the drain to the end, whatever it is."""
        loop, began_s = cluster.loop, self._clock()
        handle.draining = handle.converting = True
        broken = ""
        try:
            await self._drained(handle, began_s)
            switch = loop.on_drained(handle.name, self._clock())
            if switch is None:
                return
            self._note(switch)
            outcome, why, broken = await self._switch(handle, step.role)
            seconds = self._clock() - began_s
            if outcome == "switched":
                handle.role = step.role
                self._metrics.conversion_seconds.set(seconds)
                end = loop.on_switched(handle.name, self._clock())
            else:
                end = loop.on_failed(handle.name, why, self._clock())
            self._metrics.conversions.labels(step.site, step.role, outcome).inc()
            if end is not None:
                self._note(end, seconds)
        finally:
            loop.on_failed(handle.name, "given up", self._clock())  # where it hasn't ended above
            handle.converting = False
            handle.broken = broken
            if self._servers.get(handle.name) is handle and not broken:
                handle.draining = False
            self._on_news()

    async def _drained(self, handle: ServerHandle, since_s: float) -> None:
        """Nothing of ours is on it, and by a report since then nothing of anybody's."""
        while True:
            said = handle.reported
            if handle.in_flight == 0 and said.at_s > since_s and not said.running and not said.waiting:
                return
            await asyncio.sleep(K_AGAIN_S / 2)

    async def _switch(self, handle: ServerHandle, role: Role) -> tuple[str, str, str]:
        """(outcome for the metrics, why it failed, what broke it for good)."""
        assert self._config is not None
        config, began_s = self._config, self._clock()
        while True:
            answer = await ask_switch(handle, role, config)
            if answer is not None and answer.success:
                return "switched", "", ""
            if answer is None or (answer.safe_to_restore is None and answer.error is None):
                if await self._became(handle) is role:
                    return "switched", "", ""
                return "failed", "no answer, and not in its new role", ""
            why = answer.message or (answer.error.message if answer.error else "")
            if answer.safe_to_restore is False:
                return "broken", why, why or "its change of role failed"
            if "idle" not in why or self._clock() - began_s >= config.drain_limit_s:
                return "refused", why, ""
            await asyncio.sleep(K_AGAIN_S)

    async def _became(self, handle: ServerHandle) -> Role | None:
        """Its role by a load report from now on; None where it tells none in time."""
        assert self._config is not None
        since_s = self._clock()
        while self._clock() - since_s < self._config.switch_timeout_s:
            if handle.reported.at_s > since_s:
                return handle.reported.role
            await asyncio.sleep(K_AGAIN_S / 2)
        return None

    def _note(self, step: Step, seconds: float | None = None) -> None:
        record = StepRecord(
            at_s=self._wall_clock(),
            site=step.site,
            server=step.instance,
            step=step.kind.value,
            role=step.role.value,
            reason=step.reason,
            dry_run=step.dry_run,
            seconds=seconds,
        )
        self.steps.append(record)
        self._on_step(record)
        log.info("slow loop: %s %s as %s: %s", record.step, record.server, record.role, record.reason)

    def page(self) -> dict[str, Any]:
        """What /roles shows."""
        return {
            "enabled": self._config is not None,
            "dry_run": self._config is None or self._config.dry_run,
            "sites": {site: self._site(cluster) for site, cluster in self._clusters.items()},
            "servers": {
                one.name: {
                    "site": one.site,
                    "role": one.role,
                    "configured_role": one.config.role,
                    "convertible": one.config.convertible,
                    "draining": one.draining,
                    "broken": one.broken or None,
                }
                for one in self._servers
            },
            "steps": list(reversed(self.steps)),
        }

    def _site(self, cluster: _Cluster) -> dict[str, Any]:
        proposal = cluster.proposal
        return {
            "requests": cluster.meter.requests,
            "converting": cluster.loop.converting,
            "threshold_tokens": cluster.threshold,
            "binding": proposal.binding if proposal else None,
            "agreed": proposal.agreed if proposal else 0,
            "requests_gained": proposal.gained if proposal else None,
            "out_of_service_s": {
                role.value: cluster.loop.out_of_service_s(role) for role in (Role.PREFILL, Role.DECODE)
            },
            "here": _plan(proposal.here) if proposal else None,
            "target": _plan(proposal.target) if proposal else None,
            "stages": {
                load.stage: {"utilisation": load.utilisation, "queue_s": load.queue_s}
                for load in cluster.loads
            },
        }


def _plan(plan: Plan | None) -> dict[str, object] | None:
    if plan is None:
        return None
    return {
        "threshold_tokens": plan.threshold_tokens,
        "prefill": plan.prefill,
        "decode": plan.decode,
        "throughput_rps": plan.throughput_rps,
        "limited_by": plan.limited_by,
    }


def _tell_of_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a conversion died: %r", error, exc_info=error)
