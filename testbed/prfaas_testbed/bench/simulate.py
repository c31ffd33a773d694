"""What simulating costs: an experiment's beginning at several lengths, each in a process of its own.

A request's and an event's CPU time should not grow with the length of a run, and its memory by the compact
columns alone that are kept of each request. CPU time is the process's own, so that neighbours on the machine
matter less than for elapsed time; on cores that share their execution units they still matter.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import prfaas.routing  # noqa: F401  (registers the policies)
from prfaas.config.experiment import Experiment, load_experiment
from prfaas.config.run import CheckRow, Repetition, Run, stamp
from prfaas.model.errors import EXIT_OK, PrfaasError, UsageError
from prfaas.simulator.build import simulation_of
from prfaas_testbed.bench.harness import Progress
from prfaas_testbed.experiment.machine import K_TOPOLOGIES, commit, machine, versions

K_SIZES = (10_000, 100_000, 1_000_000)
K_PARTS = 10  # each run is timed in so many parts of equal numbers of requests
K_FLAT = 1.25  # times the shortest run's cost an event that the longest may have
K_LARGE = 1_000_000  # from so many requests on, what is promised is judged:
K_MOST_CPU_S = 300.0
K_MOST_MIB = 4096.0

Row = dict[str, Any]


def measure(experiment: Experiment, requests: int) -> Row:
    """Play the experiment's first `requests` in this process, which should have done nothing else."""
    workload = experiment.workload.model_copy(update={"requests": requests})
    simulation = simulation_of(experiment.model_copy(update={"workload": workload}), K_TOPOLOGIES)
    agenda, record = simulation.world.agenda, simulation.world.record
    begun_wall, begun = time.monotonic(), time.process_time()
    marks = [(0, 0, begun)]

    def progress(now: float, done: int) -> None:
        if done >= requests * len(marks) / K_PARTS:
            marks.append((done, agenda.events, time.process_time()))

    # Looked at often enough that the parts come out alike.
    simulation.horizon_s = 50.0
    simulation.run(progress)
    cpu_s = time.process_time() - begun
    summary = record.summary()
    return {
        "requests": requests,
        "cpu_s": round(cpu_s, 3),
        "wall_s": round(time.monotonic() - begun_wall, 3),
        "events": agenda.events,
        "ms_per_request": round(cpu_s / requests * 1e3, 4),
        "us_per_event": round(cpu_s / agenda.events * 1e6, 3),
        "us_per_event_by_part": [
            round((after[2] - before[2]) / (after[1] - before[1]) * 1e6, 3)
            for before, after in itertools.pairwise(marks)
            if after[1] > before[1]
        ],
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "simulated_s": round(agenda.now, 1),
        "failed": summary["failed"],
        "ttft_mean_s": summary["ttft_mean_s"],
        "within_slo": summary["within_slo"],
    }


def measure_apart(name: str, sizes: Sequence[int], progress: Progress) -> list[Row]:
    """A row a size, each from a process of its own. Raises PrfaasError when one fails."""
    rows = []
    for size in sizes:
        progress(f"{name}: {size:,} requests")
        ran = subprocess.run(
            [sys.executable, "-m", "prfaas_testbed.bench.simulate", name, str(size)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise PrfaasError(f"simulating {size} requests of {name} ended with status {ran.returncode}")
        rows.append(json.loads(ran.stdout))
    return rows


def judge(rows: Sequence[Row]) -> list[CheckRow]:
    """What is promised of these rows; nothing of costs by length where there is one length alone."""
    checks = []
    shortest, longest = rows[0], rows[-1]
    if len(rows) > 1:
        ratio = longest["us_per_event"] / shortest["us_per_event"]
        checks.append(_check("an event costs alike", round(ratio, 3), K_FLAT, "times the shortest run's"))
    if longest["requests"] >= K_LARGE:
        share = longest["requests"] / K_LARGE
        checks.append(_check("CPU time", longest["cpu_s"], K_MOST_CPU_S * share, "s"))
        checks.append(_check("memory", longest["peak_mib"], K_MOST_MIB * share, "MiB"))
    return checks


def _check(name: str, value: float, most: float, unit: str) -> CheckRow:
    outcome = "passed" if value <= most else "failed"
    return CheckRow.model_validate(
        {"name": name, "outcome": outcome, "value": value, "wanted": f"at most {most:g} {unit}"}
    )


def run_of(name: str, rows: Sequence[Row], checks: Sequence[CheckRow], started: datetime) -> Run:
    """The record, in run.json's form; `rows` holds the measurements."""
    run = Run(
        experiment="bench-simulate",
        description=f"what simulating {name} costs, by its length",
        commit=commit(),
        started=started.isoformat(timespec="seconds"),
        versions=versions(),
        machine=machine(),
        emulation="simulated",
        checks=list(checks),
        repetitions=[Repetition.model_validate({"index": 0, "samples": list(rows)})],
        files={},
    )
    return run.model_copy(update={"rows": list(rows)})


def folder_of(results: Path, started: datetime) -> Path:
    return results / "bench-simulate" / stamp(started)


def now() -> datetime:
    return datetime.now(UTC)


def loaded(name: str) -> Experiment:
    """Raises UsageError for a set or a workload whose length can't be chosen."""
    found = load_experiment(name, K_TOPOLOGIES)
    if not isinstance(found, Experiment):
        raise UsageError(f"{name} is a set of experiments; name one of its parts' files")
    return found


def main(name: str, requests: int) -> int:
    sys.stdout.write(json.dumps(measure(loaded(name), requests)) + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
