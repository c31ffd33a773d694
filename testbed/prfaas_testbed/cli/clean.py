"""`prfaas-testbed clean`: remove what a killed run left: processes, namespaces, raised sysctls, folders."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from prfaas.model.errors import EXIT_OK, MachineError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "clean",
        help="remove what a killed run left",
        description="Removes only what a testbed run recorded as its own; a run that is alive is left alone.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from prfaas_testbed.network.state import Lock, clean_up, state_file

    paths = {state_file()}
    if os.geteuid() != 0:
        if not state_file().exists():
            sys.stderr.write("nothing to clean\n")
            return EXIT_OK
        raise MachineError("cleaning up after a run needs root: run it with sudo")
    lock = Lock("clean")
    try:
        if lock.previous_state:
            paths.add(Path(lock.previous_state))
        removed = [line for path in sorted(paths) for line in clean_up(path)]
    finally:
        lock.release()
    for line in removed:
        sys.stderr.write(f"removed {line}\n")
    sys.stderr.write("clean\n" if removed else "nothing to clean\n")
    return EXIT_OK
