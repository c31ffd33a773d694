"""`prfaas-testbed overlap`: what distance adds to the first token, by when a prefill server sends KV."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime

from prfaas.cli._places import place
from prfaas.config.loading import load
from prfaas.config.topology import Topology
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, UsageError
from prfaas_testbed.cli._waiting import add_wait
from prfaas_testbed.experiment import overlap
from prfaas_testbed.experiment.machine import K_CHECKOUT, K_RESULTS, K_TOPOLOGIES, commit, machine, versions
from prfaas_testbed.experiment.place import own
from prfaas_testbed.experiment.sites import write_json

K_ROUNDS = 5


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "overlap", help="what distance adds to the first token, with KV sent by layer, by chunk, at the end"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=K_ROUNDS,
        metavar="N",
        help=f"requests of each kind (default {K_ROUNDS})",
    )
    parser.add_argument(
        "--modes", default=",".join(overlap.K_MODES), metavar="A,B",
        help=f"some of {', '.join(overlap.K_MODES)}, in this order",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=place, default=K_RESULTS, metavar="DIR", help="where overlap/STAMP/ goes"
    )
    add_wait(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    modes = args.modes.split(",")
    if not modes or not set(modes) <= set(overlap.K_MODES):
        raise UsageError(f"--modes {args.modes}: some of {', '.join(overlap.K_MODES)}")
    if args.rounds < 1:
        raise UsageError(f"--rounds {args.rounds}: 1 or more")
    topology = load(K_TOPOLOGIES / "networks" / "overlap.yaml", Topology)
    started = datetime.now(UTC)
    folder = args.out.resolve() / "overlap" / started.strftime("%Y%m%dT%H%M%SZ")
    record = {
        "experiment": "overlap", "commit": commit(), "started": started.isoformat(timespec="seconds"),
        "versions": versions(K_CHECKOUT / ".venv-sglang"), "machine": machine(),
        "topology": topology.model_dump(mode="json", exclude_defaults=True, by_alias=True),
        "model": overlap.K_MODEL, "chunk_tokens": overlap.K_CHUNK_TOKENS,
    }  # fmt: skip
    with own(folder) as place, place.watched():
        found = overlap.measure(topology, folder, tell, args.rounds, modes, wait_s=args.wait_s)
        [link] = {(link.delay_ms, link.rate_mbps) for link in topology.links}
        judged = overlap.verdicts(found.rows, 2 * (link[0] or 0.0) / 1e3, (link[1] or 0.0) * 1e6)
        rows = overlap.checks(judged)
        record |= {"checks": rows, "verdicts": overlap.as_rows(judged), **vars(found)}
        path = write_json(folder / "run.json", record)
    out = sys.stdout
    out.write("overlap  tokens  one site  two sites    added    bound     tail    bound  wire/first token\n")
    for one in judged:
        out.write(
            f"{one.overlap:7}  {one.tokens:6}  {one.near_s * 1e3:5.0f} ms  {one.far_s * 1e3:6.0f} ms  "
            f"{one.added_s * 1e3:4.0f} ms  {one.bound_s * 1e3:4.0f} ms  {one.tail_s * 1e3:4.0f} ms  "
            f"{one.tail_bound_s * 1e3:4.0f} ms  {one.wire_share:.2f}\n"
        )
    failed = [row for row in rows if row["outcome"] == "failed"]
    out.write(f"{len(rows) - len(failed)} of {len(rows)} checks passed; raw values: {path}\n")
    return EXIT_FELL_SHORT if failed else EXIT_OK


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
