"""`prfaas-testbed prefixes`: do predictions of reused tokens hold while a real cache overflows?"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime

from prfaas.cli._places import place
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, UsageError
from prfaas_testbed.experiment import prefixes
from prfaas_testbed.experiment.machine import K_CHECKOUT, K_RESULTS, commit, machine, versions
from prfaas_testbed.experiment.place import own
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.instances.models import K_MODELS

K_DEFAULT = ("dense", "hybrid")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "prefixes", help="predicted and actual reuse of prefixes on real servers, with evictions"
    )
    parser.add_argument(
        "--model", action="append", metavar="NAME",
        help=f"may be given again (default {' and '.join(K_DEFAULT)}), some 3 minutes each",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=place, default=K_RESULTS, metavar="DIR", help="where prefixes/STAMP/ goes"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    names = args.model or K_DEFAULT
    for name in names:
        if name not in K_MODELS:
            raise UsageError(f"no model {name!r}; known: {', '.join(K_MODELS)}")
    started = datetime.now(UTC)
    folder = args.out.resolve() / "prefixes" / started.strftime("%Y%m%dT%H%M%SZ")
    record = {
        "experiment": "prefixes", "commit": commit(), "started": started.isoformat(timespec="seconds"),
        "versions": versions(K_CHECKOUT / ".venv-sglang"), "machine": machine(),
        "pool_tokens": prefixes.K_POOL_TOKENS, "states": prefixes.K_STATES, "talking": prefixes.K_TALKING,
    }  # fmt: skip
    with own(folder) as place, place.watched():
        founds = [prefixes.measure(K_MODELS[name], folder / "work" / name, tell) for name in names]
        checks = prefixes.checks(founds)
        rows = [{"model": found.model, **row} for found in founds for row in found.rows]
        path = write_json(folder / "run.json", {**record, "checks": checks, "rows": rows})
    for row in checks:
        sys.stdout.write(f"{row['name']:24} {row['value']:g}  (wanted {row['wanted']:g}) {row['outcome']}\n")
    failed = [row for row in checks if row["outcome"] == "failed"]
    sys.stdout.write(f"{len(checks) - len(failed)} of {len(checks)} checks passed; raw values: {path}\n")
    return EXIT_FELL_SHORT if failed else EXIT_OK


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
