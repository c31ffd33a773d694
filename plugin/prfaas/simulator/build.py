"""From an experiment file to a simulated world, and from a finished world to run.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from prfaas.config.experiment import Experiment, Instance, ModelChoice
from prfaas.config.policy import PolicyConfig
from prfaas.config.profile import find_profile
from prfaas.config.router import Retry
from prfaas.config.topology import Topology, load_topology
from prfaas.config.workload import trace_lines
from prfaas.model.errors import UsageError
from prfaas.model.ids import ModelId, SiteId
from prfaas.model.profiles import Profile
from prfaas.routing.base import CostProfile, Fleet, Policy, create_policy
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.collection import seldom_collected
from prfaas.simulator.engine import Engine
from prfaas.simulator.network import Network
from prfaas.simulator.record import Record
from prfaas.simulator.roles import RoleChanges, of_sites
from prfaas.simulator.settings import Settings
from prfaas.simulator.timeline import play_timeline
from prfaas.simulator.world import World
from prfaas.workload.generate import timed_requests
from prfaas.workload.requests import TimedRequest

K_SAMPLE_S = 0.1  # link rows, as the testbed's
K_TOKEN_BYTES = 6.0  # of a prompt as JSON: an id of five digits, or a word, and what is between
K_STUCK_S = 60.0  # s, longer than it takes to believe a link down
K_MOST_SAMPLES = 20_000  # a long run is sampled more coarsely,
K_MOST_SAMPLED_ROWS = 100_000  # and one of many sites and links as well


@dataclass
class Simulation:
    """One repetition of one model, ready to run."""

    world: World
    unsupported: list[str]
    horizon_s: float

    def run(self, progress: Callable[[float, int], None] | None = None) -> Record:
        """To the end of all requests. `progress(now, done)` is called now and then.

        Links that are believed down are probed for ever: when for K_STUCK_S nothing else happens, what is
        still under way is recorded as failed, unfinished.
        """
        with seldom_collected():
            return self._run(progress)

    def _run(self, progress: Callable[[float, int], None] | None) -> Record:
        world, agenda = self.world, self.world.agenda
        stuck_since_s: float | None = None
        while world.live or not world.exhausted:
            agenda.run(agenda.now + max(1.0, self.horizon_s / 50))
            if progress is not None:
                progress(agenda.now, len(world.record))
            if agenda.foreground:
                stuck_since_s = None
            elif stuck_since_s is None:
                stuck_since_s = agenda.now
            elif agenda.now - stuck_since_s >= K_STUCK_S:
                world.abandon(agenda.now)
        return world.record


def profile_of(instance: Instance, model: ModelChoice, topologies: Path) -> Profile:
    """An instance's own profile, or its model's. Raises UsageError."""
    name = instance.profile or model.profile
    if name is None:
        raise UsageError(
            f"instance {instance.name}: model {model.name} has no profile: nothing to simulate by"
        )
    return find_profile(name, topologies)


def simulation_of(
    experiment: Experiment,
    topologies: Path,
    *,
    model: ModelChoice | None = None,
    repetition: int = 0,
    policy: PolicyConfig | None = None,
    requests: Iterable[TimedRequest] | None = None,
    settings: Settings | None = None,
    sample: bool = True,
    topology: Topology | None = None,
) -> Simulation:
    """The world of one model and repetition. Raises UsageError or ConfigError for what the files lack."""
    model = model or experiment.models[0]
    topology = topology or load_topology(experiment.network, topologies / "networks")
    agenda, record = Agenda(), Record()
    engines, profiles = _engines(experiment, model, topology, topologies, agenda)
    local = frozenset(engine.site for engine in engines if engine.role != "prefill")
    chosen = policy or (experiment.router.policy if experiment.router else PolicyConfig(name="naive"))
    movable = experiment.router is not None and experiment.router.move_prefixes
    policy_object: Policy = create_policy(chosen, Fleet(profiles, local, movable))
    slow_loop = experiment.router.slow_loop if experiment.router else None
    settings = settings or _settings(experiment, chosen, local)
    world = World(agenda, engines, Network(topology, agenda), policy_object, record, settings)
    if slow_loop is not None:
        RoleChanges(world, slow_loop, of_sites(profiles), policy_object)
    seed = experiment.seed * 1_000_003 + repetition
    if requests is None:
        lines = trace_lines(experiment.workload, topologies)
        requests = timed_requests(experiment.workload, Random(seed), lines)
    unsupported = play_timeline(world, experiment.timeline)
    world.play(requests)
    horizon_s = experiment.workload.duration_s or experiment.wall_time_s
    if sample:
        rows = len(world.network.pipes) + len({engine.site for engine in engines})
        _sample(world, max(K_SAMPLE_S, horizon_s / K_MOST_SAMPLES, horizon_s * rows / K_MOST_SAMPLED_ROWS))
    return Simulation(world, unsupported, horizon_s)


def _engines(
    experiment: Experiment, model: ModelChoice, topology: Topology, topologies: Path, agenda: Agenda
) -> tuple[list[Engine], dict[tuple[SiteId, ModelId], CostProfile]]:
    """The instances, and each site's profile for whoever decides: a prefill instance's, where it has one.
    Raises UsageError.
    """
    profiles: dict[tuple[SiteId, ModelId], CostProfile] = {}
    alike: dict[Profile, Profile] = {}  # one object for all of a kind: what is worked out of it is shared
    engines = []
    for instance in experiment.instances:
        if instance.site not in topology.sites:
            raise UsageError(
                f"instance {instance.name}: no site {instance.site!r} in {topology.name}; "
                f"there are {', '.join(topology.sites)}"
            )
        profile = profile_of(instance, model, topologies)
        profile = alike.setdefault(profile, profile)
        if instance.role != "decode" or (instance.site, "") not in profiles:
            profiles[instance.site, ""] = profile
        limits = instance.limits
        engines += [
            Engine(
                name,
                instance.site,
                instance.role,
                profile,
                agenda,
                max_batch=limits.max_batch,
                chunk_tokens=limits.chunk_tokens,
                pool_tokens=limits.cache_tokens,
                prefill_requests=limits.prefill_requests,
            )
            for name in instance.names()
        ]
    return engines, profiles


def _settings(experiment: Experiment, policy: PolicyConfig, local: frozenset[SiteId]) -> Settings:
    """What the experiment's file says of the door. Raises UsageError for homes that can't decode."""
    door = experiment.router
    return Settings(
        door_site=door.site if door else None,
        timeout_s=experiment.request_timeout_s,
        retry=Retry(total_s=experiment.request_timeout_s) if door else None,
        # Where servers are asked directly nothing is there that a refusal could send elsewhere.
        admission=door is not None,
        service_order="deadline" if policy.service == "deadline" else "fcfs",
        homes=_homes(experiment, local),
        request_bytes_per_token=0.0 if experiment.transfer.http_by_pump else K_TOKEN_BYTES,
    )


def _homes(experiment: Experiment, local: frozenset[SiteId]) -> tuple[SiteId, ...]:
    """The workload's homes. Raises UsageError for one that can't decode."""
    for home in experiment.workload.homes:
        if home not in local:
            raise UsageError(
                f"workload.homes: found {home}; sites that decode are {', '.join(sorted(local))}"
            )
    return experiment.workload.homes


def _sample(world: World, every_s: float) -> None:
    """Rows of links, engines and the policy, as long as anything goes on. Nothing goes on differently."""
    sent = dict.fromkeys(world.network.pipes, 0.0)

    def look(now: float) -> None:
        for ends, pipe in world.network.pipes.items():
            total, backlog = pipe.as_of(now)
            moved, sent[ends] = total - sent[ends], total
            if moved or backlog:
                world.record.link_rows.append((now, f"{ends[0]}->{ends[1]}", round(moved), round(backlog)))
        for site, seen in world.outlook.look(now).items():
            world.record.engine_rows.append(
                (now, site, seen.prefill_backlog_s, seen.decode_running, seen.decode_waiting)
            )
        world.record.log_rows.append((now, dict(world.policy.get_log_data())))
        if world.live or not world.exhausted:
            world.agenda.at_in_background(now + every_s, look)

    world.agenda.at_in_background(every_s, look)


def repetition_rows(record: Record, model: str, index: int) -> dict[str, Any]:
    """One repetition in run.json's form."""
    return {
        "index": index,
        "requests": list(record.rows(model)),
        "links": [
            {"at_s": round(at_s, 3), "link": link, "direction": link, "bytes": sent, "drops": 0,
             "backlog_bytes": backlog}
            for at_s, link, sent, backlog in record.link_rows
        ],
        "events": [{"at_s": round(at_s, 6), "event": text} for at_s, text in record.events],
        "sites": [
            {"at_s": round(at_s, 3), "site": site, "prefill_backlog_s": round(backlog_s, 4),
             "decode_running": running, "decode_waiting": waiting}
            for at_s, site, backlog_s, running, waiting in record.engine_rows
        ],
        "policy": [
            {"at_s": round(at_s, 3)} | {k: v for k, v in figures.items() if math.isfinite(v)}
            for at_s, figures in record.log_rows
        ],
    }  # fmt: skip
