"""`prfaas-testbed …`: each module of this package with `register(subparsers)` is a command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import prfaas_testbed.cli
from prfaas.cli.main import K_STATUSES, command_modules, run_command

K_NOT_COMMANDS = ("bench",)  # bench is a command of `prfaas`, by its entry-point group


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of all commands, or of the one that `argv` names."""
    parser = argparse.ArgumentParser(
        prog="prfaas-testbed",
        description="Several data centres on one Linux machine, with real delay, loss and faults.",
        epilog=K_STATUSES,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in command_modules(prfaas_testbed.cli, argv, K_NOT_COMMANDS):
        importlib.import_module(f"prfaas_testbed.cli.{module}").register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return run_command("prfaas-testbed", build_parser, words)


if __name__ == "__main__":
    sys.exit(main())
