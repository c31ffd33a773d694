"""`prfaas config`: what files may say, and whether those that people wrote are right; nothing is run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prfaas.cli import _kinds
from prfaas.config.fields import field_lines
from prfaas.model.errors import EXIT_OK, EXIT_USAGE, UsageError

K_OPERATED = ("pump", "plugin", "router")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("config", help="the fields of every file, and whether a file is right")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="say of each file which kind it is, or its first fault")
    check.add_argument("--kind", help="check as this kind, instead of telling it from the fields")
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    check.set_defaults(run=run_check)
    fields = actions.add_parser(
        "fields",
        help="every field that a kind of file can have: its type, bounds, default and meaning",
        description=f"Kinds: {', '.join(kind.name for kind in _kinds.KINDS)}. `plugin` is the file that "
        "PRFAAS_CONFIG names; a pump's fields stand under `pump:` there.",
    )
    fields.add_argument("kinds", nargs="*", metavar="KIND", help="of these alone (pump plugin router)")
    fields.set_defaults(run=run_fields)


def run_fields(args: argparse.Namespace) -> int:
    found = {name: _kinds.named(name)[1] for name in args.kinds or K_OPERATED}
    sys.stdout.write("".join(f"{line}\n" for line in field_lines(found)))
    return EXIT_OK


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
