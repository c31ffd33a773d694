"""`prfaas simulate EXPERIMENT`: an experiment file on virtual time, its record in the form of run.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prfaas.cli._places import file_for, folder_for, place, writing
from prfaas.config.experiment import Experiment, ExperimentSet, load_experiment, parts_of
from prfaas.config.places import checkout
from prfaas.config.run import Repetition, Run, stamp, write_run
from prfaas.figures.simulation import draw_simulation
from prfaas.model.errors import UsageError
from prfaas.simulator.sweep import Job, Played, play_all, variants


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("simulate", help="an experiment on virtual time")
    parser.add_argument("experiment", help="a name under topologies/experiments, or a path")
    parser.add_argument("--policy", help="this policy instead of the file's")
    parser.add_argument("--repetitions", type=int, help="so many, with seeds of their own")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=V,V,…",
        help="each of these values of a field, as workload.arrivals.rate_rps=2,3; repeated: all combinations",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes at once; one a core otherwise")
    parser.add_argument("--out", type=place, help="folder for run.json; results/NAME/STAMP otherwise")
    parser.add_argument(
        "--chrome-trace", type=place, metavar="FILE", help="the first repetition as a Chrome trace"
    )
    parser.add_argument("--json", action="store_true", help="one object on standard output, nothing written")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    topologies = checkout() / "topologies"
    loaded = load_experiment(args.experiment, topologies)
    for name, found in (("--repetitions", args.repetitions), ("--workers", args.workers)):
        if found is not None and found < 1:
            raise UsageError(f"{name}: found {found}; at least 1")
    experiments = list(parts_of(loaded, topologies)) if isinstance(loaded, ExperimentSet) else [("", loaded)]
    experiments = variants(experiments, args.sweep)
    if args.chrome_trace is not None:
        file_for("--chrome-trace", args.chrome_trace)
    started = datetime.now(UTC)
    folder = args.out or checkout() / "results" / loaded.name / stamp(started)
    if not args.json:
        folder_for("--out", args.out or folder.parent)
    repetitions: dict[int, dict[str, Any]] = {}
    summaries: list[dict[str, Any]] = []
    jobs = [job for part, experiment in experiments for job in _jobs(part, experiment, args, topologies)]

    def progress(now: float, done: int) -> None:
        sys.stderr.write(f"\r  {now:10.0f} s simulated, {done} requests answered")

    with closing(play_all(jobs, args.workers, None if args.json else progress)) as all_played:
        for played in all_played:
            summaries.append(played.summary)
            _keep(played, repetitions)
            if played.trace is not None:
                with writing(args.chrome_trace):
                    args.chrome_trace.write_text(played.trace, encoding="utf-8")
            if not args.json:
                sys.stderr.write("\r" + " " * 60 + "\r")
                _say(played.summary)
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
    with writing(folder):
        written = write_run(result, folder)
        drawn = draw_simulation(result, folder / "figures")
    sys.stderr.write(f"written to {written}\n")
    for path in drawn:
        if path.suffix == ".png":
            sys.stderr.write(f"drawn: {path}\n")
    return 0


def _jobs(part: str, experiment: Experiment, args: argparse.Namespace, topologies: Path) -> list[Job]:
    """All models and repetitions of one experiment."""
    policy = None
    if args.policy is not None:
        if experiment.router is None:
            raise UsageError(f"{experiment.name}: --policy needs a router in the experiment")
        chosen = experiment.router.policy
        policy = type(chosen)(**(chosen.model_dump() | {"name": args.policy}))
    return [
        Job(
            experiment,
            part,
            model,
            repetition,
            policy,
            topologies,
            traced=args.chrome_trace is not None and repetition == 0,
        )
        for model in range(len(experiment.models))
        for repetition in range(args.repetitions or experiment.repetitions)
    ]


def _keep(played: Played, repetitions: dict[int, dict[str, Any]]) -> None:
    """Its rows go to its repetition's."""
    index = played.job.repetition
    target = repetitions.setdefault(index, {"index": index, "requests": [], "links": [], "events": []})
    target.setdefault("summaries", []).append(played.summary)
    for kind, rows in played.rows.items():
        target.setdefault(kind, []).extend(rows)


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
            ["git", "-C", str(checkout()), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
