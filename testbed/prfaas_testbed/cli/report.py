"""`prfaas-testbed report DIR`: figures (PNG, SVG, CSV) and page of a stored run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prfaas.model.errors import EXIT_OK
from prfaas_testbed.report import draw_run


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("report", help="draw the figures and the page of a stored run")
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="a folder with run.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    sys.stdout.write(f"{draw_run(args.run_dir)}\n")
    return EXIT_OK
