"""`prfaas simulate EXPERIMENT`: an experiment file on virtual time, its record in the form of run.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prfaas.routing  # noqa: F401  (registers the policies)
from prfaas.config.experiment import Experiment, ExperimentSet, load_experiment, parts_of
from prfaas.config.run import Repetition, Run, stamp, write_run
from prfaas.figures.simulation import draw_simulation
from prfaas.model.errors import UsageError
from prfaas.simulator.build import repetition_rows, simulation_of
from prfaas.simulator.chrome_trace import chrome_trace
from prfaas.simulator.coverage import extrapolations
from prfaas.simulator.scale import completion_rate_rps

K_ROOT = Path(__file__).resolve().parents[3]
K_MOST_ROWS = 200_000  # requests beyond this leave a summary only


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("simulate", help="an experiment on virtual time")
    parser.add_argument("experiment", help="a name under topologies/experiments, or a path")
    parser.add_argument("--policy", help="this policy instead of the file's")
    parser.add_argument("--repetitions", type=int, help="so many, with seeds of their own")
    parser.add_argument("--out", type=Path, help="folder for run.json; results/NAME/STAMP otherwise")
    parser.add_argument(
        "--chrome-trace", type=Path, metavar="FILE", help="the first repetition as a Chrome trace"
    )
    parser.add_argument("--json", action="store_true", help="one object on standard output, nothing written")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    topologies = K_ROOT / "topologies"
    loaded = load_experiment(args.experiment, topologies)
    if args.repetitions is not None and args.repetitions < 1:
        raise UsageError(f"--repetitions: found {args.repetitions}; at least 1")
    experiments = list(parts_of(loaded, topologies)) if isinstance(loaded, ExperimentSet) else [("", loaded)]
    started = datetime.now(UTC)
    repetitions: dict[int, dict[str, Any]] = {}
    summaries: list[dict[str, Any]] = []
    for part, experiment in experiments:
        for row in _simulate(experiment, part, args, topologies, repetitions):
            summaries.append(row)
            if not args.json:
                _say(row)
    result = Run(
        experiment=loaded.name,
        commit=_commit(),
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions={"prfaas": version("prfaas"), "python": platform.python_version()},
        machine={"cores": os.cpu_count(), "load": list(os.getloadavg())},
        emulation="simulated",
        scale=1,
        repetitions=[Repetition.model_validate(repetitions[i]) for i in sorted(repetitions)],
        parts=[part for part, _ in experiments if part],
        description=loaded.description,
        definition=loaded.model_dump(mode="json"),
        files={},
    )
    if args.json:
        sys.stdout.write(json.dumps(result.model_dump(mode="json") | {"summaries": summaries}) + "\n")
        return 0
    folder = args.out or K_ROOT / "results" / loaded.name / stamp(started)
    sys.stderr.write(f"written to {write_run(result, folder)}\n")
    for path in draw_simulation(result, folder / "figures"):
        if path.suffix == ".png":
            sys.stderr.write(f"drawn: {path}\n")
    return 0


def _simulate(
    experiment: Experiment,
    part: str,
    args: argparse.Namespace,
    topologies: Path,
    repetitions: dict[int, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Run all models and repetitions; rows go to `repetitions`, a summary of each is returned."""
    found = []
    policy = None
    if args.policy:
        base = experiment.router.policy.model_dump() if experiment.router else {}
        policy = (
            type(experiment.router.policy)(**(base | {"name": args.policy})) if experiment.router else None
        )
        if policy is None:
            raise UsageError(f"{experiment.name}: --policy needs a router in the experiment")
    for model in experiment.models:
        for index in range(args.repetitions or experiment.repetitions):
            begun = time.monotonic()
            simulation = simulation_of(experiment, topologies, model=model, repetition=index, policy=policy)

            def progress(now: float, done: int) -> None:
                sys.stderr.write(f"\r  {now:10.0f} s simulated, {done} requests answered")

            record = simulation.run(None if args.json else progress)
            if not args.json:
                sys.stderr.write("\r" + " " * 60 + "\r")
            took_s = time.monotonic() - begun
            label = {"part": part} if part else {}
            row = {
                **label,
                "model": model.name,
                "policy": simulation.world.policy.name,
                "repetition": index,
                "completion_rate_rps": completion_rate_rps(record),
                **record.summary(),
                "events": simulation.world.agenda.events,
                "took_s": round(took_s, 3),
                "unsupported": simulation.unsupported,
                "extrapolated": extrapolations(simulation.world),
            }
            found.append(row)
            target = repetitions.setdefault(
                index, {"index": index, "requests": [], "links": [], "events": []}
            )
            target.setdefault("summaries", []).append(row)
            if len(record) <= K_MOST_ROWS:
                rows = repetition_rows(record, model.name, index)
                for kind in ("requests", "links", "events", "sites", "policy"):
                    target.setdefault(kind, []).extend({**one, **label} for one in rows[kind])
            if args.chrome_trace and index == 0:
                args.chrome_trace.write_text(chrome_trace(record), encoding="utf-8")
    return found


def _say(row: dict[str, Any]) -> None:
    def figure(key: str, form: str = ".2f") -> str:
        value = row.get(key)
        return "-" if value is None else format(value, form)

    sys.stdout.write(
        f"{row.get('part', '')} {row['model']} {row['policy']} #{row['repetition']}: "
        f"{row['requests']} requests, {row.get('failed', 0)} failed, "
        f"{figure('completion_rate_rps')} req/s answered while loaded, "
        f"{figure('offloaded_share', '.1%')} offloaded, egress {figure('egress_gbps')} Gbit/s, "
        f"TTFT mean {figure('ttft_mean_s')} p50 {figure('ttft_p50_s')} p90 {figure('ttft_p90_s')} "
        f"p99 {figure('ttft_p99_s')} s, within SLO {figure('within_slo', '.1%')}; "
        f"{row['events']} events in {row['took_s']} s\n".lstrip()
    )
    for line in row["unsupported"]:
        sys.stdout.write(f"  not simulated: {line}\n")
    for line in row["extrapolated"]:
        sys.stdout.write(f"  extrapolated: {line}\n")


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "-C", str(K_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
