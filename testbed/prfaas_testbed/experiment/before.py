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
from prfaas_testbed.experiment.metrics import K_METRICS
from prfaas_testbed.experiment.timeline import steps_of
from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import sglang_python


def check_before(experiment: Experiment, origin: str) -> Topology:
    """All that can be known to be wrong before anything is started. Raises ConfigError, UsageError,
    MachineError."""
    require_known(experiment.checks, origin)
    _checks_can_be_judged(experiment, origin)
    topology = load_topology(experiment.network)
    _servers_are_somewhere(experiment, topology, origin)
    for capture in experiment.captures:
        _two_sites("captures", capture, topology, origin)
    if experiment.capacity is not None:
        rate_of(experiment.workload)
    if experiment.captures:
        check_reader()
    _events_name_links(experiment, topology, origin)
    _changes_fit(topology, [experiment.timeline, *(one.timeline for one in experiment.rounds)], origin)
    _servers_can_start(experiment, origin)
    _router_is_known(experiment, topology, origin)
    if experiment.workload.homes:
        raise ConfigError(
            origin,
            "workload.homes",
            ", ".join(experiment.workload.homes),
            "none here: homes are simulated alone",
        )
    requests = plan(experiment, "sglang" in experiment.kinds(), experiment.seed)
    _times_fit(experiment, max((request.at_s for request in requests), default=0.0), origin)
    _same_sizes(experiment, {len(request.tokens) for request in requests}, topology, origin)
    return topology


def _servers_are_somewhere(experiment: Experiment, topology: Topology, origin: str) -> None:
    known = ", ".join(topology.sites)
    for instance in experiment.instances:
        if instance.site not in topology.sites:
            raise ConfigError(
                origin, f"instances.{instance.name}.site", instance.site, f"sites here: {known}"
            )
    if experiment.baseline is not None and experiment.baseline.site not in topology.sites:
        raise ConfigError(origin, "baseline.site", experiment.baseline.site, f"sites: {known}")


def _events_name_links(experiment: Experiment, topology: Topology, origin: str) -> None:
    links = topology.directed()
    for event in experiment.events():
        _two_sites(f"timeline.{event.do}", event, topology, origin)
        for link in _links_of(event):
            if link not in links:
                raise ConfigError(
                    origin, f"timeline.{event.do}.link", link, f"links here: {', '.join(links)}"
                )


def _servers_can_start(experiment: Experiment, origin: str) -> None:
    """Whether their profiles are there, and what real ones need. Raises ConfigError, MachineError."""
    for instance in experiment.instances:
        _profile_known(instance.profile, origin, f"instances.{instance.name}.profile")
    for model in experiment.models:
        _profile_known(model.profile, origin, f"models.{model.name}.profile")
        if "sglang" not in experiment.kinds():
            continue
        if model.name not in K_MODELS:
            raise ConfigError(
                origin, "models.name", model.name, f"models that set-up makes: {', '.join(K_MODELS)}"
            )
        sglang_python()
        if not (K_MODELS_DIR / model.name / "config.json").exists():
            raise MachineError(f"model {model.name} isn't under {K_MODELS_DIR}: run `make setup`")


def _router_is_known(experiment: Experiment, topology: Topology, origin: str) -> None:
    router = experiment.router
    if router is None:
        return
    if router.site not in topology.sites:
        raise ConfigError(origin, "router.site", router.site, f"sites: {', '.join(topology.sites)}")
    if router.policy.name not in policy_names():
        raise ConfigError(
            origin, "router.policy.name", router.policy.name, f"known: {', '.join(policy_names())}"
        )


def _checks_can_be_judged(experiment: Experiment, origin: str) -> None:
    """Raises ConfigError for a check that would be unsupported whatever happened in the run."""
    for spec in experiment.checks:
        name = spec.metric or spec.name
        needs = K_METRICS[name].needs
        if needs and not any(getattr(experiment, need) for need in needs):
            wanted = " or ".join(f"`{need}:`" for need in needs)
            told = f"nothing to judge it by; give the experiment {wanted}, or leave the check out"
            raise ConfigError(origin, f"checks.{spec.name}", name, told)


def _two_sites(field: str, item: Any, topology: Topology, origin: str) -> None:
    """Raises ConfigError where the sites that an event or a capture names aren't there, or are one."""
    names = _sites_of(item)
    for name in names:
        if name not in topology.sites:
            raise ConfigError(origin, field, name, f"sites here: {', '.join(topology.sites)}")
    if len(names) == 2 and names[0] == names[1]:
        raise ConfigError(origin, field, f"{names[0]} as source and target", "expected two different sites")


def _times_fit(experiment: Experiment, last_s: float, origin: str) -> None:
    """Whether the run can end in its time, and whether its steps can come while load still runs; the
    workload's last request comes at `last_s`. Raises ConfigError.
    """
    if experiment.capacity is not None:  # its search sets the rate, and so the time
        return
    plays = [(one.timeline, one.duration_s or last_s) for one in experiment.rounds]
    plays = plays or [(experiment.timeline, last_s)]
    series = len(experiment.models) * experiment.repetitions
    load_s = series * sum(length_s for _, length_s in plays)
    if load_s > experiment.wall_time_s:
        times = f", {series} times" if series > 1 else ""
        told = (
            f"the load alone lasts {load_s / series:.0f} s{times}: allow more time, or less load; "
            "`prfaas simulate` plays it on virtual time"
        )
        raise ConfigError(origin, "wall_time_s", experiment.wall_time_s, told)
    for items, length_s in [*plays, (experiment.captures, last_s)]:
        end_s = length_s + experiment.request_timeout_s
        for item in items:
            if item.at_s > end_s:
                field = f"timeline.{item.do}.at_s" if hasattr(item, "do") else "captures.at_s"
                told = (
                    f"the load has ended by then: its last request comes at {length_s:.1f} s, and is waited "
                    f"for {experiment.request_timeout_s:g} s at most (request_timeout_s)"
                )
                raise ConfigError(origin, field, item.at_s, told)


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
