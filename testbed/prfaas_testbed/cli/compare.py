"""`prfaas-testbed compare A B`: two stored runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prfaas.config.run import read_run
from prfaas.model.errors import EXIT_OK
from prfaas_testbed.report.compare import compare_lines


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("compare", help="two stored runs side by side")
    parser.add_argument("a", type=Path, metavar="A", help="a folder with run.json")
    parser.add_argument("b", type=Path, metavar="B")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    sys.stdout.write("\n".join(compare_lines(read_run(args.a), read_run(args.b))).rstrip() + "\n")
    return EXIT_OK
