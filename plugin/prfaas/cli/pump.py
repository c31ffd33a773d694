"""`prfaas pump --config F`: run a node's pump in the foreground."""

from __future__ import annotations

import argparse

from prfaas.config.backend import load_pump_config
from prfaas.pump.__main__ import run as run_pump


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "pump", help="move bytes between sites for a node's servers", allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="F",
        help="YAML: site, listen, tls, ... (config/pump.py), or the servers' file with these under pump:",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return run_pump(load_pump_config(args.config), persistent=True)
