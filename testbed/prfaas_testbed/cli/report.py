"""`prfaas-testbed report DIR`: figures (PNG, SVG, CSV) and page of a stored run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prfaas.model.errors import EXIT_OK


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("report", help="draw the figures and the page of a stored run")
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="a folder with run.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from prfaas_testbed.report.page import draw_run  # matplotlib takes its time: only who draws waits for it

    sys.stdout.write(f"{draw_run(args.run_dir)}\n")
    return EXIT_OK
