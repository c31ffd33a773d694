"""Many simulated runs on all cores, and an experiment's variants by fields and values.

A run is a process's own from its seed on, and results come back in the order in which runs were asked for:
neither depends on how many processes there are.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

import prfaas.routing  # noqa: F401  (registers the policies, in each process)
from prfaas.config.experiment import Experiment, merged
from prfaas.config.loading import check
from prfaas.config.policy import PolicyConfig
from prfaas.model.errors import PrfaasError, UsageError
from prfaas.simulator.build import repetition_rows, simulation_of
from prfaas.simulator.chrome_trace import chrome_trace
from prfaas.simulator.coverage import extrapolations
from prfaas.simulator.scale import completion_rate_rps

K_MOST_ROWS = 200_000  # requests beyond this leave a summary only
K_MOST_VARIANTS = 10_000
K_LINE = 600  # characters of an error's

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One run: one model and repetition of an experiment, or of a part of a set."""

    experiment: Experiment
    part: str
    model: int
    """Its place in experiment.models."""
    repetition: int
    policy: PolicyConfig | None
    topologies: Path
    traced: bool = False
    """Whether a Chrome trace is wanted."""

    def __str__(self) -> str:
        part = f", part {self.part}" if self.part else ""
        model = self.experiment.models[self.model].name
        return f"{self.experiment.name}{part}, {model}, repetition {self.repetition}"


@dataclass
class Played:
    """What is left of a run."""

    job: Job
    summary: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """In run.json's form; empty where there are too many."""
    trace: str | None = None


def play(job: Job, progress: Callable[[float, int], None] | None = None) -> Played:
    """Run it here. Raises UsageError or ConfigError for what the files lack."""
    begun_s = time.monotonic()
    model = job.experiment.models[job.model]
    simulation = simulation_of(
        job.experiment, job.topologies, model=model, repetition=job.repetition, policy=job.policy
    )
    record = simulation.run(progress)
    label = {"part": job.part} if job.part else {}
    played = Played(
        job,
        {
            **label,
            "model": model.name,
            "policy": simulation.world.policy.name,
            "repetition": job.repetition,
            "completion_rate_rps": completion_rate_rps(record),
            **record.summary(),
            "events": simulation.world.agenda.events,
            "took_s": round(time.monotonic() - begun_s, 3),
            "unsupported": simulation.unsupported,
            "extrapolated": extrapolations(simulation.world),
        },
    )
    if len(record) <= K_MOST_ROWS:
        rows = repetition_rows(record, model.name, job.repetition)
        for kind in ("requests", "links", "events", "sites", "policy"):
            played.rows[kind] = [{**one, **label} for one in rows[kind]]
    if job.traced:
        played.trace = chrome_trace(record)
    return played


def play_all(
    jobs: Sequence[Job],
    workers: int | None = None,
    progress: Callable[[float, int], None] | None = None,
) -> Generator[Played, None, None]:
    """Run all, in as many processes as there are cores, or `workers`; results in the order of `jobs`.

    An interruption ends every process. `progress` is called where one process, this one, does all.
    """
    workers = min(len(jobs), workers or len(os.sched_getaffinity(0)))
    if workers <= 1:
        for job in jobs:
            yield play(job, progress)
        return
    yield from spread(play, jobs, workers)


def spread(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Generator[Result, None, None]:
    """function(item) of each, in as many processes as there are cores, or `workers`; in the order of `items`.

    `function` is a module's own, so that it can be named to another process. A PrfaasError of it is raised
    here, and any other error as one.
    """
    workers = min(len(items), workers or len(os.sched_getaffinity(0)))
    if workers <= 1:
        yield from map(function, items)
        return
    over, end = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="prfaas-sweep-") as held:
        executor = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_end_at, initargs=(over,)
        )
        there = _ByFile(_Elsewhere(function), Path(held))
        try:
            for found in _started(executor, there, list(enumerate(items))):
                if isinstance(found, PrfaasError):
                    raise found
                result: Result = pickle.loads(found.read_bytes())
                found.unlink()
                yield result
        except BrokenProcessPool:
            raise PrfaasError("a process that played was ended from outside: out of memory?") from None
        finally:
            end.send_bytes(b"over")  # what they still play, nobody waits for
            executor.shutdown(cancel_futures=True)
            over.close()
            end.close()


def _end_at(over: Connection) -> None:
    """This process ends at once when the sweep is over, or when the one that it plays for is gone, however
    that ended. All look at the same message, so none takes it.
    """

    def watch() -> None:
        wait([over])
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _started(
    executor: ProcessPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[Result]:
    """The processes leave an interruption to this one, from their first instruction on.

    Spawned, because a copy of a process that has threads may stand still.
    """
    resource_tracker.ensure_running()  # or the executor would start it, and allow interruptions again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.map(function, items)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _ByFile(Generic[Item, Result]):
    """(place, item) to the file that has the result: a process that is killed while it writes a long one to
    the pipe that all share would leave the others, and whoever reads it, waiting for ever.
    """

    function: Callable[[Item], Result | PrfaasError]
    folder: Path

    def __call__(self, placed: tuple[int, Item]) -> Path | PrfaasError:
        place, item = placed
        found = self.function(item)
        if isinstance(found, PrfaasError):
            return found
        path = self.folder / str(place)
        try:
            path.write_bytes(pickle.dumps(found))
        except OSError as error:
            return PrfaasError(f"{path}: a run's result can't be kept there: {error.strerror}")
        return path


@dataclass(frozen=True)
class _Elsewhere(Generic[Item, Result]):
    """What goes wrong travels as a line of text, and where as a note: not every error survives the way
    between processes.
    """

    function: Callable[[Item], Result]

    def __call__(self, item: Item) -> Result | PrfaasError:
        try:
            return self.function(item)
        except UsageError as error:
            return UsageError(str(error))
        except PrfaasError as error:
            told = PrfaasError(str(error))
            told.exit_status = error.exit_status
            return told
        except Exception as error:  # whatever it is, the others' results and our pool must not hang on it
            told = PrfaasError(f"{item}: a fault of ours: {type(error).__name__}: {error}"[:K_LINE])
            told.add_note(traceback.format_exc())
            return told


def variants(
    experiments: Sequence[tuple[str, Experiment]], sweeps: Sequence[str]
) -> list[tuple[str, Experiment]]:
    """Each part with every combination of values, as (PART/FIELD=VALUE,…, experiment).

    `sweeps` are FIELD=V1,V2,…: a field by its path in the file, as workload.arrivals.rate_rps; values as YAML
    has them. Raises UsageError, or ConfigError for a value that the file couldn't have.
    """
    axes = [_axis(sweep) for sweep in sweeps]
    if not axes:
        return list(experiments)
    combinations = list(itertools.product(*axes))
    if len(combinations) * len(experiments) > K_MOST_VARIANTS:
        raise UsageError(f"--sweep: {len(combinations)} combinations; at most {K_MOST_VARIANTS} runs")
    found = []
    for part, experiment in experiments:
        # As the file has it: in a change of a link, what isn't said isn't null.
        base = experiment.model_dump(mode="json", exclude_unset=True)
        for combination in combinations:
            changes: dict[str, Any] = {}
            for path, _, value in combination:
                changes = merged(changes, _nested(path, value))
            said = ",".join(f"{path[-1]}={text}" for path, text, _ in combination)
            changed = check(merged(base, changes), Experiment, f"{experiment.name} with {said}")
            found.append((f"{part}/{said}" if part else said, changed))
    return found


def _axis(sweep: str) -> list[tuple[tuple[str, ...], str, Any]]:
    name, equals, texts = sweep.partition("=")
    path, values = tuple(name.split(".")), texts.split(",")
    if not equals or not all(path) or not all(values):
        raise UsageError(f"--sweep: found {sweep!r}; expected FIELD=VALUE,VALUE,…")
    try:
        return [(path, text, yaml.safe_load(text)) for text in values]
    except yaml.YAMLError:
        raise UsageError(f"--sweep: {texts!r} of {name} aren't values") from None


def _nested(path: Sequence[str], value: Any) -> Mapping[str, Any]:
    for name in reversed(path):
        value = {name: value}
    found: Mapping[str, Any] = value
    return found
