"""`prfaas pump --config F`: run a node's pump in the foreground."""

from __future__ import annotations

import argparse

from prfaas.config.backend import load_pump_config
from prfaas.pump.__main__ import run as run_pump
from prfaas.telemetry.log_lines import K_LOG_LEVELS


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "pump",
        help="move bytes between sites for a node's servers",
        description="Runs in the foreground until SIGTERM. New certificates are taken when their files "
        "change; any other change of the file wants a restart, which servers and peers outlive: what is "
        "under way is sent again.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="F",
        help="YAML: site, listen, tls, … (`prfaas config fields pump` tells them), or the servers' file with "
        "these under pump:",
    )
    parser.add_argument(
        "--log-level", default="info", choices=K_LOG_LEVELS, help="of the log on stderr (info)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return run_pump(load_pump_config(args.config), persistent=True, log_level=args.log_level)
