"""`prfaas bench simulate`: what simulating costs, by the length of the run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from prfaas.cli._places import place
from prfaas.config.run import write_run
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, UsageError
from prfaas_testbed.bench import simulate
from prfaas_testbed.experiment.machine import K_RESULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

K_MOST_REQUESTS = 100_000_000  # seven hours of one core


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser("simulate", help="CPU time and memory of a simulation, by its length")
    parser.add_argument("--experiment", default="ten-thousand", help="its file or name (%(default)s)")
    parser.add_argument(
        "--requests",
        default=",".join(map(str, simulate.K_SIZES)),
        metavar="N,…",
        help="lengths, one process each (%(default)s)",
    )
    parser.add_argument("--out", type=place, default=K_RESULTS, metavar="DIR", help="results (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the record on standard output, nothing written")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 when every check passed, 1 when one fell short."""
    sizes = sorted(_sizes(args.requests))
    simulate.loaded(args.experiment)
    started = simulate.now()
    rows = simulate.measure_apart(args.experiment, sizes, _progress)
    checks = simulate.judge(rows)
    record = simulate.run_of(args.experiment, rows, checks, started)
    if args.json:
        sys.stdout.write(json.dumps(record.model_dump(mode="json")) + "\n")
    else:
        sys.stdout.write(_table(rows))
        for check in checks:
            sys.stdout.write(f"{check.outcome}: {check.name}: {check.value}; wanted: {check.wanted}\n")
        sys.stdout.write(f"{write_run(record, simulate.folder_of(args.out, started))}\n")
    return EXIT_FELL_SHORT if any(check.outcome == "failed" for check in checks) else EXIT_OK


def _table(rows: Sequence[simulate.Row]) -> str:
    lines = [
        f"{'requests':>10} {'events':>11} {'CPU s':>8} {'ms/request':>11} {'us/event':>9} {'peak MiB':>9}"
    ]
    lines += [
        f"{row['requests']:>10,} {row['events']:>11,} {row['cpu_s']:>8.1f} {row['ms_per_request']:>11.3f} "
        f"{row['us_per_event']:>9.2f} {row['peak_mib']:>9.0f}"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > K_MOST_REQUESTS:
        raise UsageError(
            f"--requests: found {text!r}; expected whole numbers from 1 to {K_MOST_REQUESTS}, as 10000,100000"
        )
    return sizes


def _progress(text: str) -> None:
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()
