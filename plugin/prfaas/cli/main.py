"""`prfaas …`: finds the command, runs it, turns every error into one line and an exit status.

A command is a module of this package with `register(subparsers)`, which adds a parser and sets its `run`
default to a function (args) -> exit status. Other packages add commands by the entry-point group
`prfaas.commands`.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from types import ModuleType

import prfaas.cli
from prfaas.model.errors import EXIT_INTERRUPTED, EXIT_MACHINE, EXIT_USAGE, PrfaasError
from prfaas.telemetry.log_lines import in_one_line
from prfaas.telemetry.package import K_PACKAGE_VERSION

K_FROM_TESTBED = ("bench",)
K_STATUSES = (
    "Exit status: 0 done and passed; 1 ran and fell short; 2 bad usage or a bad file; 3 this machine lacks "
    "something, and which; 130 interrupted."
)
# Of a file that was named: whose it is, or what it is, and no fault of ours either.
K_FILE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
# A disk that is full, over its quota, read-only or broken: no fault of ours, and nothing to trace.
K_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def command_modules(package: ModuleType, argv: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Names of the modules to load: the one command that `argv` begins with, or else all.

    Each command brings packages of its own; a command shouldn't wait for those of all the others. `others`
    are modules of the package that are no commands.
    """
    found = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    commands = [name for name in found if name not in ("main", *others) and not name.startswith("_")]
    return [argv[0]] if argv and argv[0] in commands else commands


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of all commands, or of the one that `argv` names."""
    parser = argparse.ArgumentParser(
        prog="prfaas",
        description="Cross-datacentre prefill for SGLang.",
        epilog=K_STATUSES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"prfaas {K_PACKAGE_VERSION}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    modules = command_modules(prfaas.cli, argv)
    for module in modules:
        importlib.import_module(f"prfaas.cli.{module}").register(subparsers)
    if argv and modules == [argv[0]]:
        return parser
    found = {entry.name: entry for entry in entry_points(group="prfaas.commands")}
    for name in K_FROM_TESTBED:
        try:
            found.pop(name).load().register(subparsers)
        except (KeyError, ImportError) as error:
            _register_missing(subparsers, name, error)
    for entry in found.values():
        entry.load().register(subparsers)
    return parser


def _register_missing(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, error: Exception
) -> None:
    command = subparsers.add_parser(name, help="needs the testbed: pip install 'prfaas[testbed]'")
    command.add_argument("rest", nargs=argparse.REMAINDER)

    def run(args: argparse.Namespace) -> int:
        sys.stderr.write(f"prfaas: {name} needs the testbed ({error}): pip install 'prfaas[testbed]'\n")
        return EXIT_MACHINE

    command.set_defaults(run=run)


def run_command(
    prog: str, build: Callable[[Sequence[str]], argparse.ArgumentParser], argv: Sequence[str]
) -> int:
    """Load, parse and run; the one place where an exception becomes a line on stderr and a status."""
    try:
        args = build(argv).parse_args(argv)
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except PrfaasError as error:
        sys.stderr.write(f"{prog}: {in_one_line(str(error))}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if _was_starting_a_program(error):
            what = f"{error.filename or 'a program'} can't be started here: {error.strerror}"
            remedy = "; install it, or put it on PATH" if error.errno == errno.ENOENT else ""
            sys.stderr.write(f"{prog}: {what}{remedy}\n")
            return EXIT_MACHINE
        if error.filename and error.errno in K_FILE_ERRORS:
            sys.stderr.write(f"{prog}: {error.filename}: {error.strerror}\n")
            return EXIT_USAGE
        if error.errno not in K_MACHINE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"{prog}: {where}{error.strerror}\n")
        return EXIT_MACHINE


def _was_starting_a_program(error: OSError) -> bool:
    """Whether it comes from fork and exec: its file name is then a program's, which nobody named to us."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals.get("__name__") == subprocess.__name__


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return run_command("prfaas", build_parser, words)


if __name__ == "__main__":
    sys.exit(main())
