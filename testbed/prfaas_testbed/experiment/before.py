"""What can be known to be wrong with an experiment before anything is started."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from prfaas.config.experiment import Event, Experiment, SetLink, directed
from prfaas.config.profile import find_profile
from prfaas.config.topology import Impairments, Topology, load_topology
from prfaas.model.errors import ConfigError, MachineError, UsageError
from prfaas.routing import policy_names
from prfaas_testbed.experiment.capacity import rate_of
from prfaas_testbed.experiment.captures import check_reader
from prfaas_testbed.experiment.checks import require_known
from prfaas_testbed.experiment.fleet import K_MODELS_DIR
from prfaas_testbed.experiment.load import plan
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.timeline import steps_of
from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import sglang_python


def check_before(experiment: Experiment, origin: str) -> Topology:
    """All that can be known to be wrong before anything is started. Raises ConfigError, UsageError,
    MachineError."""
    require_known(experiment.checks, origin)
    topology = load_topology(experiment.network)
    for instance in experiment.instances:
        if instance.site not in topology.sites:
            known = ", ".join(topology.sites)
            raise ConfigError(
                origin, f"instances.{instance.name}.site", instance.site, f"sites here: {known}"
            )
    if experiment.baseline is not None and experiment.baseline.site not in topology.sites:
        raise ConfigError(
            origin, "baseline.site", experiment.baseline.site, f"sites: {', '.join(topology.sites)}"
        )
    for capture in experiment.captures:
        for name in (capture.source, capture.target):
            if name not in topology.sites:
                raise ConfigError(origin, "captures", name, f"sites here: {', '.join(topology.sites)}")
    if experiment.capacity is not None:
        rate_of(experiment.workload)
    if experiment.captures:
        check_reader()
    links = topology.directed()
    for event in experiment.events():
        for name in _sites_of(event):
            if name not in topology.sites:
                raise ConfigError(
                    origin, f"timeline.{event.do}", name, f"sites here: {', '.join(topology.sites)}"
                )
        for link in _links_of(event):
            if link not in links:
                raise ConfigError(
                    origin, f"timeline.{event.do}.link", link, f"links here: {', '.join(links)}"
                )
    _changes_fit(topology, [experiment.timeline, *(one.timeline for one in experiment.rounds)], origin)
    for instance in experiment.instances:
        _profile_known(instance.profile, origin, f"instances.{instance.name}.profile")
    for model in experiment.models:
        _profile_known(model.profile, origin, f"models.{model.name}.profile")
        if "sglang" in experiment.kinds():
            if model.name not in K_MODELS:
                raise ConfigError(
                    origin, "models.name", model.name, f"models that set-up makes: {', '.join(K_MODELS)}"
                )
            sglang_python()
            if not (K_MODELS_DIR / model.name / "config.json").exists():
                raise MachineError(f"model {model.name} isn't under {K_MODELS_DIR}: run `make setup`")
    if experiment.router is not None and experiment.router.site not in topology.sites:
        raise ConfigError(
            origin, "router.site", experiment.router.site, f"sites: {', '.join(topology.sites)}"
        )
    if experiment.router is not None and experiment.router.policy.name not in policy_names():
        raise ConfigError(
            origin, "router.policy.name", experiment.router.policy.name, f"known: {', '.join(policy_names())}"
        )
    if experiment.workload.homes:
        raise ConfigError(
            origin,
            "workload.homes",
            ", ".join(experiment.workload.homes),
            "none here: homes are simulated alone",
        )
    requests = plan(experiment, "sglang" in experiment.kinds(), experiment.seed)
    _same_sizes(experiment, {len(request.tokens) for request in requests}, topology, origin)
    return topology


def _profile_known(name: str | None, origin: str, field: str) -> None:
    """Raises ConfigError, which names the profile's own file where that is at fault."""
    try:
        if name is not None:
            find_profile(name, K_TOPOLOGIES)
    except ConfigError:
        raise
    except UsageError as error:
        raise ConfigError(origin, field, name, str(error)) from None


def _changes_fit(topology: Topology, timelines: Sequence[Sequence[Event]], origin: str) -> None:
    """Whether each change can be made to what those before it leave, as emulated. Raises ConfigError."""
    factor = topology.scale.factor if topology.scale else 1.0
    states, before = topology.emulated(), dict[tuple[int, str], Impairments]()
    for step in itertools.chain.from_iterable(steps_of(events) for events in timelines):
        event = step.event
        for link in directed(event.link) if isinstance(event, SetLink) else ():
            assert isinstance(event, SetLink)
            change, key = event.set.divided(factor), (id(event), link)
            if step.phase == "begin":
                before[key] = states[link]
            else:
                change = before[key].undoing(event.set)
            try:
                states[link] = states[link].changed(change)
            except UsageError as error:
                found = event.set.model_dump(exclude_unset=True).items()
                said = ", ".join(f"{name} {value}" for name, value in found)
                if factor != 1:
                    said += f", at scale {factor:g}"
                field = f"timeline.set_link of {link} at {step.at_s:g} s"
                raise ConfigError(origin, field, said, str(error)) from None


def _same_sizes(experiment: Experiment, lengths: set[int], topology: Topology, origin: str) -> None:
    """Profiled instances that hand one another a request must say the same of its size: a lease is for so
    many bytes. Raises ConfigError.
    """
    scale = topology.scale.factor if topology.scale else 1.0
    for model in experiment.models:
        names = {i.profile or model.profile for i in experiment.instances if i.kind == "profiled"} - {None}
        profiles = [find_profile(name, K_TOPOLOGIES).scaled(scale) for name in sorted(map(str, names))]
        for one, other in itertools.pairwise(profiles):
            for tokens in sorted(lengths):
                sizes = one.kv_bytes(tokens), other.kv_bytes(tokens)
                if sizes[0] != sizes[1]:
                    raise ConfigError(
                        origin,
                        "instances.profile",
                        f"{one.name} and {other.name}",
                        f"KV of {tokens} tokens is {sizes[0]} bytes by one, {sizes[1]} by the other",
                    )


def _sites_of(event: Any) -> list[str]:
    return [value for name in ("source", "target", "site") if (value := getattr(event, name, None))]


def _links_of(event: Any) -> list[str]:
    return directed(event.link) if hasattr(event, "link") else []
