"""Experiment files (topologies/experiments/*.yaml): what runs where, under what load and trouble, how judged.

The testbed runs a file on an emulated network, the simulator the same file on virtual time. A file is either
one experiment (`Experiment`) or a set of them (`ExperimentSet`, told by its `parts:`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prfaas.config.loading import Strict, check, is_path, read_yaml, unknown_name
from prfaas.config.policy import PolicyConfig, SlowLoopConfig
from prfaas.config.timeline import (
    CrossTraffic,
    CutStream,
    Event,
    FillDisk,
    Flap,
    Hostile,
    Kill,
    LinkDown,
    Name,
    Positive,
    ReplaceCertificate,
    Seconds,
    SetLink,
    StepClock,
    directed,
)
from prfaas.config.workload import WorkloadConfig
from prfaas.model.errors import ConfigError, UsageError

K_NAMES_OR_PATHS = frozenset({"base", "experiment", "file", "network", "profile"})
"""Fields that name a file among the project's, or by its path."""

__all__ = [
    "Baseline", "Capacity", "Capture", "CheckSpec", "Control", "CrossTraffic", "CutStream", "Event",
    "Experiment", "ExperimentSet", "FillDisk", "Flap", "Hostile", "Instance", "Kill", "Limits",
    "LinkDown", "ModelChoice", "Part", "ReplaceCertificate", "Round", "RouterChoice", "SetLink",
    "StepClock", "Transfer", "directed", "find_file", "load_experiment", "merged", "parts_of",
]  # fmt: skip


class ModelChoice(Strict):
    """A model under test. The models of an experiment run one after the other, each with fresh servers."""

    name: Name
    """A model that set-up makes (real servers), or any label (profiled instances)."""
    profile: str | None = None
    """A profile under topologies/profiles or a path: the times of profiled and simulated instances."""


class Limits(Strict):
    """What a profiled or simulated instance may hold; None leaves the profile's own figure."""

    max_batch: Annotated[int, Field(ge=1)] | None = None
    """Requests decoded at once."""
    chunk_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens of one prefill step."""
    prefill_requests: Annotated[int, Field(ge=1)] | None = None
    """Prompts of one prefill step, as SGLang's --prefill-max-requests; any number where absent."""
    cache_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens of KV that the instance can hold, prefix cache included."""


class Instance(Strict):
    """One or several equal servers in a site."""

    name: Name
    site: Name
    role: Literal["prefill", "decode", "collocated"]
    kind: Literal["sglang", "profiled"] = "profiled"
    """`sglang` is a real server on CPU; `profiled` takes a profile's time and moves real bytes."""
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    profile: str | None = None
    """Its own profile, where its hardware isn't the model's: a name under topologies/profiles or a path."""
    limits: Limits = Limits()

    def names(self) -> list[str]:
        """The single servers' names: NAME, or NAME-0, NAME-1, … where there are several."""
        return [self.name] if self.count == 1 else [f"{self.name}-{i}" for i in range(self.count)]


class RouterChoice(Strict):
    """The front door. Without one the client addresses each request to prefill and decode itself, in turn."""

    site: Name
    policy: PolicyConfig = PolicyConfig()
    move_prefixes: bool = False
    """A prefix that one site holds may be brought to another's prefill cache. Real servers keep theirs in
    host memory too then, and tell the router what they cache, as profiled instances always do."""
    slow_loop: SlowLoopConfig | None = None
    """Roles follow the load. Of the testbed's instances, profiled ones change theirs."""


class Baseline(Strict):
    """A plain server that answers the same prompts in the same run, for comparison."""

    site: Name
    warm_up: bool = True


class Capture(Strict):
    """Headers of what passes the WAN's edges at two sites, read after the load: what packets say."""

    source: Name
    target: Name
    at_s: Seconds = 0
    for_s: Annotated[float, Field(gt=0, le=120)]
    keep: bool = False
    """Leave the pcap files with the servers' logs."""


class Round(Strict):
    """The workload once more on the same servers, with a timeline of its own. After it servers are awaited
    until nothing is left of its requests, and asked until they answer rightly."""

    name: Annotated[str, Field(min_length=1, max_length=60)]
    duration_s: Positive | None = None
    """The workload's arrivals are stretched to this; as they are where absent."""
    timeline: tuple[Event, ...] = ()


class Control(Strict):
    """A run with a planted fault whose comparison must fail: it shows that the checks can."""

    name: Name
    fault: Literal["zero_kv", "drop_page"]
    model: Name | None = None
    """With this model only; with each where absent. A real prefill server takes most of a minute to start
    anew."""
    requests: Annotated[int, Field(ge=1, le=16)] = 2


class Capacity(Strict):
    """Search for the highest mean rate of the workload within the SLO, instead of repetitions at one rate.
    The rule by which it goes on and stops is in the record's events `capacity`."""

    slo_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of requests whose first token comes within slo_ttft_s."""
    least_rps: Positive = 0.1
    most_rps: Positive = 100
    within: Annotated[float, Field(gt=1, le=2)] = 1.1
    """Ratio of the lowest rate that breaks the SLO to the highest that holds it, at the end."""
    duration_s: Positive = 20
    """Of each trial."""
    confirm: Annotated[int, Field(ge=0, le=20)] = 4
    """How many more trials of what held, with other arrivals."""


class CheckSpec(Strict):
    """One judgement: a metric computed from raw rows, and the bound it has to keep."""

    name: Name
    metric: str = ""
    """The metric's name; the check's own name where absent. `prfaas-testbed list metrics` lists them."""
    at_least: float | None = None
    at_most: float | None = None
    model: Name | None = None
    """Judge this model's rows only."""

    @model_validator(mode="after")
    def _a_bound(self) -> CheckSpec:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a check needs at_least or at_most")
        return self


class Transfer(Strict):
    """How KV travels between sites."""

    engine: Literal["prfaas", "mooncake_tcp"] = "prfaas"
    """`mooncake_tcp`: SGLang's stock backend of that name, real servers without pumps, for comparison."""
    streams: Annotated[int, Field(ge=1, le=64)] | None = None
    """TCP connections a peer; None leaves the choice to the engine."""
    tls: bool = True
    http_by_pump: bool = False
    """HTTP to servers of other sites, KV events and links' status cross by the pumps too, encrypted, as an
    operator has it; else as they are."""
    estimated: bool = False
    """Pumps estimate their links and keep their ledgers, and the router asks; else it believes the file."""

    @model_validator(mode="after")
    def _pumps_encrypt(self) -> Transfer:
        if self.http_by_pump and not (self.tls and self.engine == "prfaas"):
            raise ValueError("http_by_pump needs pumps (engine prfaas) and tls")
        return self


class Experiment(Strict):
    """One experiment."""

    name: Name
    description: Annotated[str, Field(min_length=1, max_length=400)]
    wall_time_s: Positive
    """How long the whole run may take; it is stopped beyond."""
    network: str
    """A topology under topologies/networks, or a path. Its scale divides the KV bytes of profiles, too."""
    seed: int = 1
    repetitions: Annotated[int, Field(ge=1, le=100)] = 1
    spoilt: Literal["again", "keep"] = "again"
    """What becomes of a repetition that the emulator spoilt. `keep` counts it, runs on a network that isn't
    quite as asked for, and the page says so: for what must be right however late packets are, never for a
    time. Rounds are always kept."""
    models: Annotated[list[ModelChoice], Field(min_length=1)]
    instances: Annotated[list[Instance], Field(min_length=1)]
    router: RouterChoice | None = None
    baseline: Baseline | None = None
    workload: WorkloadConfig
    prompts: Literal["as_traced", "independent"] = "as_traced"
    """`independent`: no two prompts share a prefix, whatever the workload says."""
    request_timeout_s: Positive = 60
    slo_ttft_s: Positive | None = None
    verify: bool = True
    """Digests of source and landed pages are compared for every request, and leased pages are poisoned."""
    transfer: Transfer = Transfer()
    controls: tuple[Control, ...] = ()
    timeline: tuple[Event, ...] = ()
    rounds: tuple[Round, ...] = ()
    """In place of plain repetitions: a repetition plays all of them, one after the other."""
    captures: tuple[Capture, ...] = ()
    capacity: Capacity | None = None
    checks: tuple[CheckSpec, ...] = ()

    @model_validator(mode="after")
    def _names_fit(self) -> Experiment:
        seen: set[str] = set()
        for instance in self.instances:
            for name in instance.names():
                if name in seen:
                    raise ValueError(f"two instances are named {name}")
                seen.add(name)
        if "router" in seen and self.router is not None:
            raise ValueError("an instance can't be named router where there is one")
        killable = seen | ({"router"} if self.router is not None else set())
        for event in self.events():
            if isinstance(event, Kill) and event.instance not in killable:
                raise ValueError(
                    f"timeline kills {event.instance}, which isn't one of {', '.join(sorted(killable))}"
                )
        if self.rounds and (self.timeline or self.captures or self.capacity):
            raise ValueError("rounds have timelines of their own, and neither captures nor a capacity search")
        if len({one.name for one in self.rounds}) != len(self.rounds):
            raise ValueError("two rounds have the same name")
        names = [spec.name for spec in self.checks]
        if len(names) != len(set(names)):
            raise ValueError("two checks have the same name")
        if any(i.kind == "profiled" and i.profile is None for i in self.instances):
            for model in self.models:
                if model.profile is None:
                    raise ValueError(f"model {model.name} needs a profile: profiled instances take its times")
        if self.capacity is not None and self.slo_ttft_s is None:
            raise ValueError("a capacity search needs slo_ttft_s")
        if self.transfer.engine != "prfaas" and self.kinds() != {"sglang"}:
            raise ValueError(f"transfer.engine {self.transfer.engine} is one of real servers alone")
        roles = {instance.role for instance in self.instances}
        if ("prefill" in roles) != ("decode" in roles):
            raise ValueError("prefill and decode instances come together")
        return self

    def events(self) -> tuple[Event, ...]:
        """Of the timeline, and of those of all rounds."""
        return (*self.timeline, *(event for one in self.rounds for event in one.timeline))

    def ordered(self) -> bool:
        """Whether prefill instances serve by the router's order instead of that of arrival."""
        return self.router is not None and self.router.policy.service == "deadline"

    def kinds(self) -> set[str]:
        return {instance.kind for instance in self.instances}


class Part(Strict):
    """One experiment of a set: a named file, or the set's base, with some fields set."""

    name: Name
    experiment: str | None = None
    """A name under topologies/experiments or a path; the set's `base` where absent."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields that replace the file's; maps are merged, lists replaced."""


class ExperimentSet(Strict):
    """Several experiments with one run.json; a check is named PART/CHECK."""

    name: Name
    description: Annotated[str, Field(min_length=1, max_length=400)]
    wall_time_s: Positive
    base: str | None = None
    parts: Annotated[list[Part], Field(min_length=1)]

    @model_validator(mode="after")
    def _parts_fit(self) -> ExperimentSet:
        names = [part.name for part in self.parts]
        if len(names) != len(set(names)):
            raise ValueError("two parts have the same name")
        for part in self.parts:
            if part.experiment is None and self.base is None:
                raise ValueError(f"part {part.name} names no experiment, and the set has no base")
        return self


def find_file(name: str, folder: Path, kind: str) -> Path:
    """`name` as a path, or as FOLDER/NAME.yaml. Raises UsageError that lists what there is."""
    if is_path(name):
        if (path := Path(name)).is_file():
            return path
        raise UsageError(f"{name}: no such file")
    path = folder / f"{name}.yaml"
    if path.is_file():
        return path
    raise unknown_name(kind, name, folder, [one.stem for one in folder.glob("*.yaml")])


def load_experiment(name: str, topologies: Path) -> Experiment | ExperimentSet:
    """A file by name or path. Raises UsageError or ConfigError."""
    path = find_file(name, topologies / "experiments", "experiment")
    data = _beside(path, read_yaml(path))
    if isinstance(data, Mapping) and "parts" in data:
        return check(data, ExperimentSet, str(path))
    return check(data, Experiment, str(path))


def _beside(path: Path, data: Any) -> Any:
    """`data` of the file at `path`, whose relative paths are taken from its folder. Names stay names."""
    if isinstance(data, list):
        return [_beside(path, one) for one in data]
    if not isinstance(data, dict):
        return data
    found = {key: _beside(path, value) for key, value in data.items()}
    for key in K_NAMES_OR_PATHS & found.keys():
        value = found[key]
        if isinstance(value, str) and (is_path(value) or ("." in value and (path.parent / value).is_file())):
            found[key] = str(path.resolve().parent / value)
    return found


def parts_of(choice: ExperimentSet, topologies: Path) -> Iterator[tuple[str, Experiment]]:
    """The set's experiments with their fields set, as (part, experiment). Raises UsageError, ConfigError."""
    for part in choice.parts:
        path = find_file(part.experiment or choice.base or "", topologies / "experiments", "experiment")
        data = _beside(path, read_yaml(path))
        if not isinstance(data, Mapping) or "parts" in data:
            raise ConfigError(
                str(path), "the file", type(data).__name__, "a part must be a single experiment"
            )
        yield part.name, check(merged(data, part.set), Experiment, f"{path} (part {part.name})")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`: maps are merged, everything else is replaced."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result
