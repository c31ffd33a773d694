"""The slow loop on virtual time: the router's own loop and meter, and conversions that take their time.

As the router does it: stages are sampled, a look decides, the instance drains, and is out of service for the
seconds that its profile's `role_switch` says (none where it says nothing). Its prefix cache is gone then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from prfaas.config.policy import SlowLoopConfig
from prfaas.model.decisions import Decision
from prfaas.model.ids import SiteId
from prfaas.model.observations import InstanceObservation, Role, SiteObservation, Snapshot
from prfaas.routing.base import CostProfile, Policy
from prfaas.routing.slow_loop import SlowLoop, Step, StepKind
from prfaas.routing.stages import StageMeter
from prfaas.simulator.engine import Engine
from prfaas.simulator.live import Live
from prfaas.simulator.world import World

K_SAMPLE_S = 1.0  # as the router's
K_DRAINED_S = 0.25  # between two looks at an instance that drains
K_WINDOW_S = 600.0
K_LEAST_REQUESTS = 100


class _Cluster:
    """One site that decodes."""

    def __init__(self, site: SiteId, config: SlowLoopConfig, profiles: Mapping[SiteId, CostProfile]) -> None:
        self.meter = StageMeter(site, profiles, K_WINDOW_S)
        self.loop = SlowLoop(site, config, getattr(profiles.get(site), "role_switch", None))


class RoleChanges:
    """Runs the slow loops of a world from now until nothing is under way any more."""

    def __init__(
        self,
        world: World,
        config: SlowLoopConfig,
        profiles: Mapping[SiteId, CostProfile],
        policy: Policy,
    ) -> None:
        self._world, self._config, self._policy = world, config, policy
        self._clusters: dict[SiteId, _Cluster] = {}
        for engine in world.engines.values():
            if engine.role == "decode" and engine.site not in self._clusters:
                self._clusters[engine.site] = _Cluster(engine.site, config, profiles)
        self._sites = tuple(dict.fromkeys(engine.site for engine in world.engines.values()))
        every_s = min(K_SAMPLE_S, config.look_every_s / 4)
        world.roles = self
        world.agenda.at_in_background(world.agenda.now + every_s, lambda now: self._tick(every_s, now))

    # What the world tells.

    def on_dispatch(self, live: Live, decision: Decision, now: float) -> None:
        chosen = decision.chosen
        cluster = self._clusters.get(chosen.decode_site) if chosen is not None and not live.attempt else None
        if chosen is None or cluster is None:
            return
        paths = [chosen, *decision.alternatives]
        home = next((path for path in paths if path.prefill_site == chosen.decode_site), chosen)
        cluster.meter.request(home.uncached_tokens, chosen.transfer_bytes if chosen.link else 0, now)

    def on_answered(self, live: Live, now: float) -> None:
        cluster = self._clusters.get(live.decode.site) if live.decode is not None else None
        if cluster is not None and live.first_token_s is not None:
            cluster.meter.answered(now - live.first_token_s, now)

    # The loop.

    def _tick(self, every_s: float, now: float) -> None:
        world = self._world
        sites = {site: self._observe(site, now) for site in self._sites}
        estimates = {link_id: link.estimate for link_id, link in world.links.items()}
        snapshot = Snapshot(now, sites, estimates)
        for site, cluster in self._clusters.items():
            cluster.meter.sample(snapshot)
            if cluster.loop.due(now) and cluster.meter.requests >= K_LEAST_REQUESTS:
                self._look(site, cluster, snapshot)
        if world.live or not world.exhausted:
            world.agenda.at_in_background(now + every_s, lambda at_s: self._tick(every_s, at_s))

    def _look(self, site: SiteId, cluster: _Cluster, snapshot: Snapshot) -> None:
        loads, system, now = cluster.meter.loads(), cluster.meter.system(snapshot), snapshot.now
        if system is None:
            return
        able = {name for name, one in self._world.engines.items() if one.profile.decode is not None}
        proposal = cluster.loop.look(snapshot.sites[site], loads, system, now, able)
        if proposal is None:
            return
        if proposal.here is not None and not self._config.dry_run:
            self._policy.on_plan(home=site, threshold_tokens=proposal.here.threshold_tokens, now=now)
        if proposal.step is None:
            return
        self._note(proposal.step, now)
        if proposal.step.dry_run:
            return
        engine = self._world.engines[proposal.step.instance]
        if proposal.step.kind is StepKind.RESUME:
            self._back(engine)
        else:
            engine.drain()
            self._world.outlook.forget_sites()
            self._drain(cluster, engine, now)

    def _drain(self, cluster: _Cluster, engine: Engine, now: float) -> None:
        """Ask until nothing is left on it; the loop gives a drain up that takes too long."""
        if cluster.loop.converting != engine.name:
            return
        if not engine.up:
            self._end(cluster, engine, cluster.loop.on_failed(engine.name, "died", now), now)
        elif engine.idle and not self._owed(engine):
            step = cluster.loop.on_drained(engine.name, now)
            if step is not None:
                self._note(step, now)
                takes = engine.profile.role_switch
                takes_s = 0.0 if takes is None else takes.seconds(step.role is Role.PREFILL)
                self._world.agenda.at(now + takes_s, lambda at_s: self._switched(cluster, engine, step, at_s))
        else:
            self._world.agenda.at(now + K_DRAINED_S, lambda at_s: self._drain(cluster, engine, at_s))

    def _switched(self, cluster: _Cluster, engine: Engine, step: Step, now: float) -> None:
        if not engine.up:
            self._end(cluster, engine, cluster.loop.on_failed(engine.name, "died", now), now)
            return
        role: Literal["prefill", "decode"] = "prefill" if step.role is Role.PREFILL else "decode"
        engine.become(role, now)
        self._world.sort_roles()
        if role == "prefill":
            self._world.outlook.prefixes.join(engine)
        self._end(cluster, engine, cluster.loop.on_switched(engine.name, now), now)

    def _end(self, cluster: _Cluster, engine: Engine, step: Step | None, now: float) -> None:
        if step is not None:
            self._note(step, now)
        self._back(engine)

    def _back(self, engine: Engine) -> None:
        engine.drain(False)
        self._world.outlook.forget_sites()

    def _owed(self, engine: Engine) -> bool:
        """Whether a request is still to come to it, or its bytes are still to leave it."""
        return any(
            engine is live.decode or (engine is live.prefill and live.first_token_s is None)
            for live in self._world.live.values()
        )

    def _note(self, step: Step, now: float) -> None:
        said = " (dry run)" if step.dry_run else ""
        self._world.record.event(now, f"{step.kind} {step.instance} as {step.role}{said}: {step.reason}")

    def _observe(self, site: SiteId, now: float) -> SiteObservation:
        listed = [
            InstanceObservation(
                one.name,
                site,
                Role(one.role),
                now,
                running=one.running if one.role != "prefill" else int(one.backlog_s > 0),
                # As SGLang's decode servers tell it: with those that wait for their KV, or its prefill.
                waiting=max(one.waiting, one.assigned - one.running),
                prefill_backlog_s=one.backlog_s,
                max_running=one.max_batch or None,
                healthy=one.up,
                draining=one.draining,
            )
            for one in self._world.engines.values()
            if one.site == site
        ]
        return SiteObservation.of(site, listed, now)


def of_sites(profiles: Mapping[tuple[SiteId, str], CostProfile]) -> dict[SiteId, CostProfile]:
    """A fleet's profiles by site alone: the simulated door serves one model."""
    return {site: profile for (site, _), profile in profiles.items()}
