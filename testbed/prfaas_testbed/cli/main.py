"""`prfaas-testbed …`: each module of this package with `register(subparsers)` is a command."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import prfaas_testbed.cli
from prfaas.cli.main import run_command

K_NOT_COMMANDS = ("main", "bench")  # bench is a command of `prfaas`, by its entry-point group


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prfaas-testbed",
        description="Several data centres on one Linux machine, with real delay, loss and faults.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in sorted(info.name for info in pkgutil.iter_modules(prfaas_testbed.cli.__path__)):
        if module not in K_NOT_COMMANDS and not module.startswith("_"):
            importlib.import_module(f"prfaas_testbed.cli.{module}").register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("prfaas-testbed", build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
