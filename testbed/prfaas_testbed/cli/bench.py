"""`prfaas bench`: the engine beside its peers, over an emulated link of its own, or over loopback."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prfaas.cli._places import place
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, UsageError
from prfaas_testbed.bench import cell as cells
from prfaas_testbed.bench import harness, report, suite, table
from prfaas_testbed.bench.cell import Cell, Loss
from prfaas_testbed.bench.record import Record
from prfaas_testbed.cli import _bench_simulate
from prfaas_testbed.experiment.machine import K_RESULTS, commit, machine, versions

K_LIMIT_S = (
    8.0  # of a repetition: twelve runs and their set-up in a cell of two repetitions stay under 4 minutes
)
K_DAY_S = 86400.0


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("bench", help="measure the transfer engine beside iperf3 and Mooncake")
    actions = parser.add_subparsers(title="benches", metavar="BENCH", required=True)
    _register_transfer(actions)
    _register_all(actions)
    _register_report(actions)
    _bench_simulate.add(actions)


def _register_transfer(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    transfer = actions.add_parser("transfer", help="goodput over one link, or over named cells of the matrix")
    link = transfer.add_argument_group("the link")
    link.add_argument("--rtt-ms", type=float, default=40.0, help="round trip without load (%(default)g)")
    link.add_argument("--rate-mbps", type=float, default=200.0, help="each way (%(default)g)")
    link.add_argument("--loss", type=Loss.parse, default=Loss(0), help="as 0.5%%, 0.005 or 1%%:burst=8 (0)")
    link.add_argument(
        "--congestion-control", default="cubic", help="what may be used: cubic (default) or bbr too"
    )
    link.add_argument("--loopback", action="store_true", help="no link: both ends on this host")
    link.add_argument(
        "--cells",
        metavar="NAME,…",
        help=f"instead of one link: `named`, `matrix`, or some of {', '.join(cells.NAMED_CELLS)} and of the "
        "matrix, as 150ms-*-bbr",
    )
    load = transfer.add_argument_group("the transfer")
    load.add_argument("--streams", type=int, help="connections (default: iperf3 1,4,8,16,32; prfaas chooses)")
    load.add_argument("--segment-bytes", type=int, default=65536, help="of one piece of memory (%(default)d)")
    load.add_argument(
        "--total-bytes", type=int, help="of a repetition (default: 6 s of the link; 2 GB on loopback)"
    )
    load.add_argument("--contiguous", action="store_true", help="segments follow each other in memory")
    load.add_argument("--tls", action="store_true", help="mutual TLS (prfaas alone has it)")
    transfer.add_argument(
        "--peers",
        default=",".join(harness.K_DEFAULT_PEERS),
        help="beside prfaas (%(default)s); `none`; nixl where it is installed",
    )
    transfer.add_argument("--repetitions", type=int, default=2, help="of each engine (%(default)d)")
    transfer.add_argument(
        "--limit-s", type=float, default=K_LIMIT_S, help="most of one repetition (%(default)g)"
    )
    transfer.add_argument("--out", type=place, metavar="DIR", help="keep logs of the processes here")
    transfer.add_argument("--json", action="store_true", help="one object on standard output")
    transfer.set_defaults(run=run_transfer)


def _register_all(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    everything = actions.add_parser(
        "all", help="every bench and its checks, into results/bench/STAMP/run.json"
    )
    everything.add_argument(
        "--out", type=place, default=K_RESULTS, metavar="DIR", help="results folder (%(default)s)"
    )
    everything.add_argument("--repetitions", type=int, default=5, help="of the named cells (%(default)d)")
    everything.add_argument(
        "--smoke", action="store_true", help="a minute's worth: that all of it still runs"
    )
    everything.add_argument(
        "--matrix", action="store_true", help="the part matrix too, the whole WAN: 90 minutes more at most"
    )
    everything.add_argument("--parts", default="", help=f"only some of {', '.join(suite.PARTS)}")
    everything.add_argument(
        "--cells", metavar="NAME,…", default="", help="of parts wan and matrix: only these, as 150ms-*-bbr"
    )
    everything.add_argument(
        "--for", dest="for_s", type=float, metavar="S",
        help="begin no cell of part matrix after so long; with --into it goes on where it was left",
    )  # fmt: skip
    everything.add_argument(
        "--into",
        type=place,
        metavar="DIR",
        help="add to this run (or measure again) instead of beginning one",
    )
    everything.add_argument("--json", action="store_true", help="the run as one object on standard output")
    everything.set_defaults(run=run_all)


def _register_report(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = actions.add_parser("report", help="a run's page, README.md and figures, from its run.json alone")
    text.add_argument("run_folder", type=Path, metavar="DIR", help="results/bench/STAMP")
    text.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> int:
    """Write the page beside the run's folder, so that it is the one of all that are kept."""
    for file in report.write(args.run_folder):
        sys.stdout.write(f"{file}\n")
    return EXIT_OK


def run_transfer(args: argparse.Namespace) -> int:
    """Exit 0 whenever it measured; 1 when prfaas itself measured nothing."""
    chosen, peers = _cells(args), _peers(args.peers)
    _check_repetitions(args.repetitions)
    if not 1 <= args.limit_s <= 120:
        raise UsageError(f"limit-s: found {args.limit_s:g}; 1 to 120 are allowed")
    harness.require_tools(peers)
    started = datetime.now(UTC)
    with ExitStack() as stack:
        workdir = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prfaas-bench-")))
        workdir.mkdir(parents=True, exist_ok=True)
        rows, places = suite.measure_cells(
            chosen, peers, workdir, repetitions=args.repetitions, limit_s=args.limit_s, progress=_progress
        )
    if args.json:
        result: dict[str, Any] = {
            "rows": rows,
            "summary": harness.summary(rows),
            "places": places,
            "started": started.isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(),
            "machine": machine(),
        }
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write(table.rows_table(rows) + "\n" + table.summary_table(harness.summary(rows)))
    measured = any(row["goodput_mbps"] for row in rows if row["engine"] == "prfaas")
    return EXIT_OK if measured else EXIT_FELL_SHORT


def run_all(args: argparse.Namespace) -> int:
    """Exit 0 when every check passed, 1 when one fell short."""
    _check_repetitions(args.repetitions)
    parts = [part for part in args.parts.split(",") if part]
    if not parts:
        parts = [part for part in suite.PARTS if args.matrix or part not in suite.K_HOUR_LONG]
    unknown = [part for part in parts if part not in suite.PARTS]
    if unknown:
        raise UsageError(f"parts: found {', '.join(unknown)}; known: {', '.join(suite.PARTS)}")
    if args.for_s is not None and not 0 < args.for_s <= K_DAY_S:
        raise UsageError(
            f"for: found {args.for_s:g}; more than 0 and at most {K_DAY_S:g} seconds are allowed"
        )
    chosen = cells.choose(args.cells) if args.cells else []
    if args.smoke:
        sizes = suite.Sizes.smoke()
    else:
        sizes = suite.Sizes.full(args.repetitions, cells=chosen, matrix_for_s=args.for_s)
    record = Record.again(args.into) if args.into else Record(args.out)
    harness.require_tools(harness.K_DEFAULT_PEERS)
    suite.run_parts(parts, record, sizes, _progress)
    if args.json:
        sys.stdout.write(json.dumps(record.run().model_dump(mode="json")) + "\n")
    else:
        wan = [row for row in record.rows if row["rtt_ms"] is not None]
        sys.stdout.write(
            table.rows_table(record.rows) + "\n" + table.summary_table(harness.summary(wan)) + "\n"
        )
        sys.stdout.write(table.checks_table(record.checks) + f"\n{record.folder / 'run.json'}\n")
    failed = any(check["outcome"] == "failed" for check in record.checks)
    return EXIT_FELL_SHORT if failed else EXIT_OK


def _check_repetitions(repetitions: int) -> None:
    if not 1 <= repetitions <= 100:
        raise UsageError(f"repetitions: found {repetitions}; 1 to 100 are allowed")


def _cells(args: argparse.Namespace) -> list[Cell]:
    if args.cells:
        if args.loopback:
            raise UsageError("--cells and --loopback exclude each other")
        return [cell.with_(streams=args.streams, tls=args.tls) for cell in cells.choose(args.cells)]
    shape = {
        "streams": args.streams,
        "segment_bytes": args.segment_bytes,
        "contiguous": args.contiguous,
        "tls": args.tls,
        "congestion_control": args.congestion_control,
    }
    if args.loopback:
        return [Cell(total_bytes=args.total_bytes or 2_000_000_000, **shape)]
    if not math.isfinite(args.rate_mbps):
        raise UsageError(f"rate-mbps: found {args.rate_mbps:g}; a number is expected")
    total_bytes = args.total_bytes or max(args.segment_bytes, int(args.rate_mbps * 1e6 / 8 * 6))
    return [
        Cell(rtt_ms=args.rtt_ms, rate_mbps=args.rate_mbps, loss=args.loss, total_bytes=total_bytes, **shape)
    ]


def _peers(text: str) -> list[str]:
    peers = [] if text in ("", "none") else text.split(",")
    unknown = [peer for peer in peers if peer not in harness.PEERS]
    if unknown:
        raise UsageError(f"peers: found {', '.join(unknown)}; known: {', '.join(harness.PEERS)}, none")
    return peers


def _progress(text: str) -> None:
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()
