"""`prfaas-testbed refusal`: how soon what a link has no place for is refused, over an emulated network."""

from __future__ import annotations

import argparse
import statistics
import sys
from datetime import UTC, datetime

from prfaas.cli._places import place
from prfaas.config.loading import load
from prfaas.config.topology import Topology
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, UsageError
from prfaas_testbed.cli._waiting import add_wait
from prfaas_testbed.experiment import refusal
from prfaas_testbed.experiment.machine import K_CHECKOUT, K_RESULTS, K_TOPOLOGIES, commit, machine, versions
from prfaas_testbed.experiment.place import own
from prfaas_testbed.experiment.sites import write_json

K_ROUNDS = 10


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("refusal", help="how soon what a link has no place for is refused")
    parser.add_argument(
        "--rounds", type=int, default=K_ROUNDS, metavar="N",
        help=f"requests of each length (default {K_ROUNDS})",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=place, default=K_RESULTS, metavar="DIR", help="where refusal/STAMP/ goes"
    )
    add_wait(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise UsageError(f"--rounds {args.rounds}: 1 or more")
    topology = load(K_TOPOLOGIES / "networks" / "overlap.yaml", Topology)
    started = datetime.now(UTC)
    folder = args.out.resolve() / "refusal" / started.strftime("%Y%m%dT%H%M%SZ")
    record = {
        "experiment": "refusal", "commit": commit(), "started": started.isoformat(timespec="seconds"),
        "versions": versions(K_CHECKOUT / ".venv-sglang"), "machine": machine(),
        "topology": topology.model_dump(mode="json", exclude_defaults=True, by_alias=True),
        "model": refusal.K_MODEL, "within_s": refusal.K_WITHIN_S,
    }  # fmt: skip
    with own(folder) as place, place.watched():
        found = refusal.measure(topology, folder, tell, args.rounds, wait_s=args.wait_s)
        [delay_ms] = {link.delay_ms for link in topology.links}
        rows = refusal.checks(found, 2 * (delay_ms or 0.0) / 1e3)
        path = write_json(folder / "run.json", {**record, "checks": rows, **vars(found)})
    for row in rows:
        sys.stdout.write(f"{row['name']:32} {row['value']:.3f}  (wanted {row['wanted']}) {row['outcome']}\n")
    slowest = max(row["seconds"] for row in found.rows)
    middle = statistics.median(row["seconds"] for row in found.rows)
    sys.stdout.write(f"of all {len(found.rows)} answers: median {middle:.3f} s, slowest {slowest:.3f} s\n")
    failed = [row for row in rows if row["outcome"] == "failed"]
    sys.stdout.write(f"{len(rows) - len(failed)} of {len(rows)} checks passed; raw values: {path}\n")
    return EXIT_FELL_SHORT if failed else EXIT_OK


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
