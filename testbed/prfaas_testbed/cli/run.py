"""`prfaas-testbed run EXPERIMENT`: an experiment from its file to results/EXPERIMENT/STAMP/."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from pathlib import Path

from prfaas.cli._places import place
from prfaas.config.experiment import Experiment, ExperimentSet, load_experiment, parts_of
from prfaas.config.run import Run, stamp
from prfaas.config.topology import Topology
from prfaas.model.errors import EXIT_MACHINE, EXIT_OK, UsageError
from prfaas_testbed.cli._waiting import add_wait
from prfaas_testbed.experiment.before import check_before
from prfaas_testbed.experiment.checks import exit_status, judge
from prfaas_testbed.experiment.load import plan
from prfaas_testbed.experiment.machine import K_RESULTS, K_TOPOLOGIES
from prfaas_testbed.experiment.place import Place, own
from prfaas_testbed.experiment.record import record_of
from prfaas_testbed.experiment.runner import Results, Runner
from prfaas_testbed.experiment.table import check_lines, summary_lines
from prfaas_testbed.experiment.timeline import steps_of

K_MOST_REPETITIONS = 100  # as a file may say


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("run", help="run an experiment", allow_abbrev=False)
    parser.add_argument("experiment", help="a name under topologies/experiments, or a path")
    parser.add_argument(
        "--out", type=place, metavar="DIR", help="results go to DIR/EXPERIMENT/STAMP (default: results)"
    )
    parser.add_argument(
        "--parts", metavar="GLOB[,GLOB]", help="only these parts of a set, for example 'metro-*,*-cut'"
    )
    parser.add_argument(
        "--resume", type=place, metavar="DIR",
        help="go on with the set's run in DIR: run what is missing, was stopped by the machine or is defined "
        "otherwise now; what ended stands, passed or not",
    )  # fmt: skip
    parser.add_argument(
        "--for", dest="for_s", type=float, metavar="S",
        help="begin no part of a set later than this; --resume runs the others another time",
    )  # fmt: skip
    parser.add_argument(
        "--again", metavar="GLOB[,GLOB]",
        help="with --resume: run these parts anew, though they ended; the record keeps that they did",
    )  # fmt: skip
    more = "instead of the file's own number; the time that it declares grows with them"
    parser.add_argument("--repetitions", type=int, metavar="N", help=more)
    add_wait(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the file and all it names, say what would run, and start nothing",
    )
    parser.add_argument(
        "--needs",
        action="store_true",
        help="say which of scripts/setup.py's parts it needs, and start nothing",
    )
    parser.add_argument("--json", action="store_true", help="print the matrix of checks as JSON on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    choice = load_experiment(args.experiment, K_TOPOLOGIES)
    if args.needs:
        real = any("sglang" in one.kinds() for _, one in experiments_of(choice, args))
        sys.stdout.write("all\n" if real else "network\n")
        return EXIT_OK
    if args.repetitions is not None and not 1 <= args.repetitions <= K_MOST_REPETITIONS:
        raise UsageError(f"--repetitions {args.repetitions}: 1 to {K_MOST_REPETITIONS} are allowed")
    if args.parts is not None:
        choice = with_parts(choice, args.parts)
    if not isinstance(choice, ExperimentSet) and (args.resume or args.for_s is not None):
        raise UsageError(f"--resume and --for are for sets: {choice.name} is a single experiment")
    if args.for_s is not None and not args.for_s > 0:
        raise UsageError(f"--for {args.for_s:g}: seconds, above 0")
    if args.again and not args.resume:
        raise UsageError("--again goes with --resume DIR: without it every part runs")
    if args.resume and args.out:
        raise UsageError("--resume DIR goes on in DIR: --out would be another place")
    folder = (args.resume or (args.out or K_RESULTS) / choice.name / stamp()).resolve()
    if args.resume and not folder.is_dir():
        raise UsageError(f"--resume {args.resume}: no such run")
    planned = check_all(choice, args)
    if args.dry_run:
        lines = [*(outline(*one) for one in planned), "no fault found, nothing was started"]
        sys.stdout.write("\n".join(lines) + "\n")
        return EXIT_OK
    # Not at the top: a dry run imports no emulator. Else each part of a set would say the same, and a page be
    # drawn of nothing.
    from prfaas_testbed.network.opening import check_machine

    check_machine()
    stopped: list[str] = []
    with own(folder) as place:
        if isinstance(choice, ExperimentSet):
            record, stopped = run_set(choice, place, args)
        else:
            record = run_one(choice, place, args)
    if args.json:
        sys.stdout.write(
            json.dumps([row.model_dump(exclude_none=True) for row in record.checks], indent=1) + "\n"
        )
    else:
        lines = [*summary_lines(record), "", *check_lines(record.checks)]
        sys.stdout.write("\n".join(lines) + "\n")
    tell(f"results: {folder}")
    status = exit_status(record.checks, record)
    if stopped:
        tell(f"stopped by this machine: {', '.join(stopped)}")
    return EXIT_MACHINE if stopped and status == EXIT_OK else status


def with_parts(choice: Experiment | ExperimentSet, globs: str) -> ExperimentSet:
    """The set with the parts that any of the comma-separated globs matches. Raises UsageError for a single
    experiment and for a glob that matches nothing."""
    if not isinstance(choice, ExperimentSet):
        raise UsageError(f"--parts {globs}: {choice.name} is a single experiment, it has no parts")
    names = [part.name for part in choice.parts]
    wanted: set[str] = set()
    for glob in globs.split(","):
        found = fnmatch.filter(names, glob)
        if not found:
            raise UsageError(
                f"--parts {glob}: no part of {choice.name} matches; there are: {', '.join(names)}"
            )
        wanted.update(found)
    return choice.model_copy(update={"parts": [part for part in choice.parts if part.name in wanted]})


def experiments_of(
    choice: Experiment | ExperimentSet, args: argparse.Namespace
) -> list[tuple[str, Experiment]]:
    """The parts by name, or the single experiment, with what the command line says instead of the file."""
    found = parts_of(choice, K_TOPOLOGIES) if isinstance(choice, ExperimentSet) else [(choice.name, choice)]
    if args.repetitions is None:
        return list(found)
    return [(name, _repeated(one, args.repetitions)) for name, one in found]


def _repeated(experiment: Experiment, repetitions: int) -> Experiment:
    """So many times; more than the file says have so much more of its time."""
    more = max(1.0, repetitions / experiment.repetitions)
    wall_time_s = experiment.wall_time_s * more
    return experiment.model_copy(update={"repetitions": repetitions, "wall_time_s": wall_time_s})


def check_all(
    choice: Experiment | ExperimentSet, args: argparse.Namespace
) -> list[tuple[str, Experiment, Topology]]:
    """All that can be known to be wrong, before anything is made. Raises ConfigError, UsageError and
    MachineError."""
    found = []
    for name, experiment in experiments_of(choice, args):
        origin = f"part {name}" if isinstance(choice, ExperimentSet) else args.experiment
        found.append((name, experiment, check_before(experiment, origin)))
    return found


def outline(name: str, experiment: Experiment, topology: Topology) -> str:
    """What would run, in a line."""
    requests = plan(experiment, "sglang" in experiment.kinds(), experiment.seed)
    servers = sum(instance.count for instance in experiment.instances)
    scale = f" at 1/{topology.scale.factor:g}" if topology.scale else ""
    times = f", {experiment.repetitions} times" if experiment.repetitions > 1 else ""
    return (
        f"{name}: {len(requests)} requests in {max(one.at_s for one in requests):.1f} s{times}, "
        f"{', '.join(model.name for model in experiment.models)} on {servers} servers, "
        f"{topology.name}{scale} ({len(topology.sites)} sites, {len(topology.directed())} links), "
        f"{len(steps_of(experiment.events()))} steps of trouble, {len(experiment.checks)} checks; "
        f"{experiment.wall_time_s:g} s at most"
    )


def run_one(choice: Experiment, place: Place, args: argparse.Namespace) -> Run:
    """Run, judge, write and draw one experiment. What a run that is stopped has gathered is written too."""
    ((_, experiment),) = experiments_of(choice, args)
    topology = check_before(experiment, args.experiment)
    began_s, results = time.monotonic(), Results()
    record = record_of(experiment, topology)
    tell(f"{experiment.name}: {experiment.description}")
    try:
        with place.watched():
            Runner(experiment, topology, place.folder, results, tell, args.wait_s).run()
    except BaseException as error:
        if results.calibration:
            results.into(record)
            record.model_extra["stopped"] = str(error) or type(error).__name__  # type: ignore[index]
            place.keep(record)
        raise
    results.into(record)
    record.model_extra["wall_s"] = round(time.monotonic() - began_s, 1)  # type: ignore[index]
    record.checks = judge(record)
    place.keep(record)
    draw(place.folder)
    return record


def draw(folder: Path) -> None:
    """Figures and page; a run is complete without them, so what is wrong with them is only said."""
    from prfaas_testbed.report.page import draw_run

    try:
        draw_run(folder)
    except Exception as error:
        tell(f"the figures could not be drawn: {type(error).__name__}: {error}")


def run_set(choice: ExperimentSet, place: Place, args: argparse.Namespace) -> tuple[Run, list[str]]:
    """All parts, one after the other, in one record that is written after each; and those that this machine
    stopped."""
    from prfaas_testbed.experiment.sets import SetRun, real_conduct

    parts = experiments_of(choice, args)
    again = args.again.split(",") if args.again else ()
    whole = SetRun(choice, parts, place.folder, tell, again, place.keep)
    if args.resume is not None:
        whole.resume()
    budget_s = choice.wall_time_s if args.for_s is None else min(args.for_s, choice.wall_time_s)
    record = whole.go(real_conduct(place, tell, args.wait_s), budget_s)
    draw(place.folder)
    return record, whole.stopped_now


def tell(line: str) -> None:
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {line}\n")
    sys.stderr.flush()
