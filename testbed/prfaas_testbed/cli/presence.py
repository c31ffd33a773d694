"""`prfaas-testbed presence`: what the plugin costs a server that has it and doesn't use it."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime

from prfaas.cli._places import place
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, UsageError
from prfaas_testbed.experiment import presence
from prfaas_testbed.experiment.machine import K_CHECKOUT, K_RESULTS, commit, machine, versions
from prfaas_testbed.experiment.place import own
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.instances.models import K_MODELS

K_MODEL = "dense"
K_BLOCKS = 3


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "presence", help="stock single-site SGLang with the plugin installed and without: is it slower?"
    )
    parser.add_argument(
        "--blocks", type=int, default=K_BLOCKS, metavar="N",
        help=f"starts of both servers (default {K_BLOCKS}), some 2 minutes each",
    )  # fmt: skip
    parser.add_argument(
        "--control", action="store_true", help="neither server has it: what two starts of one differ by"
    )
    parser.add_argument(
        "--out", type=place, default=K_RESULTS, metavar="DIR", help="where presence/STAMP/ goes"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.blocks < 1:
        raise UsageError(f"--blocks {args.blocks}: 1 or more")
    started = datetime.now(UTC)
    folder = args.out.resolve() / "presence" / started.strftime("%Y%m%dT%H%M%SZ")
    record = {
        "experiment": "presence", "commit": commit(), "started": started.isoformat(timespec="seconds"),
        "versions": versions(K_CHECKOUT / ".venv-sglang"), "machine": machine(), "model": K_MODEL,
        "control": args.control,
    }  # fmt: skip
    with own(folder) as place, place.watched():
        found = presence.measure(K_MODELS[K_MODEL], folder / "work", tell, args.blocks, args.control)
        rows = presence.checks(found)
        path = write_json(folder / "run.json", {**record, "checks": rows, **vars(found)})
    for row in rows:
        error = f" +- {row['error']:.3f}" if row.get("error") is not None else ""
        blocks = ", ".join(f"{value:.3f}" for value in row.get("by_block", ()))
        line = f"{row['name']:24} {row['value']:.3f}{error:9}  (wanted {row['wanted']}) {row['outcome']}"
        sys.stdout.write(f"{line}  {blocks}".rstrip() + "\n")
    failed = [row for row in rows if row["outcome"] == "failed"]
    sys.stdout.write(f"{len(rows) - len(failed)} of {len(rows)} checks passed; raw values: {path}\n")
    return EXIT_FELL_SHORT if failed else EXIT_OK


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
