"""`prfaas config check`: whether files that people wrote are right, without running anything."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prfaas.cli import _kinds
from prfaas.model.errors import EXIT_OK, EXIT_USAGE, UsageError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("config", help="check configuration, topology and experiment files")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="say of each file which kind it is, or its first fault")
    check.add_argument("--kind", help="check as this kind, instead of telling it from the fields")
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    check.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    """Every file is judged; exit 2 when one of them is wrong."""
    status = EXIT_OK
    for path in args.files:
        try:
            kind = _kinds.check_file(path, args.kind)
        except UsageError as error:
            sys.stderr.write(f"prfaas config check: {error}\n")
            status = EXIT_USAGE
        else:
            sys.stdout.write(f"{path}: {kind}, no fault found\n")
    return status
