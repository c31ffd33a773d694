"""`prfaas-testbed check DIR`: a stored run's checks, computed again from its raw rows."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from prfaas.config.run import read_run
from prfaas_testbed.experiment.checks import exit_status, judge
from prfaas_testbed.experiment.table import check_lines


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("check", help="judge a stored run again, from its raw rows")
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="a folder with run.json")
    parser.add_argument("--json", action="store_true", help="print the matrix of checks as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    stored = read_run(args.run_dir)
    rows = judge(stored)
    if not rows and stored.checks:
        sys.stderr.write("no definition to judge by: these are its checks as its own command wrote them\n")
        rows = stored.checks
    elif not rows:
        sys.stderr.write(f"{stored.experiment} has no checks\n")
    if args.json:
        sys.stdout.write(json.dumps([row.model_dump(exclude_none=True) for row in rows], indent=1) + "\n")
    else:
        sys.stdout.write("\n".join(check_lines(rows)) + "\n")
    before = {row.name: row.outcome for row in stored.checks}
    for row in rows:
        if before.get(row.name, row.outcome) != row.outcome:
            sys.stderr.write(f"{row.name}: the run says {before[row.name]}, its rows say {row.outcome}\n")
    return exit_status(rows, stored)
