"""`prfaas-testbed claim run|add|more|resimulate|report`: the claim's pieces and their report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prfaas.cli._places import place
from prfaas.config.places import checkout
from prfaas.model.errors import EXIT_OK, UsageError

K_FOLDER = checkout() / "results" / "claim"
K_REPETITIONS = 5
K_MORE_S = 480.0


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("claim", help="measure the claim's pieces, write the report")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    measure = commands.add_parser(
        "run", help="measure pieces, in the simulator or on the testbed; a JSON record each"
    )
    measure.add_argument("pieces", nargs="*", metavar="PIECE", help="all simulated ones where none is named")
    measure.add_argument("--repetitions", type=int, default=K_REPETITIONS, help="seeds a figure (5)")
    measure.add_argument("--out", type=place, default=K_FOLDER, metavar="DIR", help="results/claim otherwise")
    measure.add_argument(
        "--only", metavar="PART[,PART]",
        help="of one piece these parts alone; what the record has of the others stays in it",
    )  # fmt: skip
    measure.set_defaults(run=run)
    add = commands.add_parser("add", help="a piece's record from its runs on the testbed")
    add.add_argument("piece", metavar="PIECE")
    add.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that hold a run.json")
    add.add_argument("--out", type=place, default=K_FOLDER, metavar="DIR", help="results/claim otherwise")
    also = add.add_mutually_exclusive_group()
    also.add_argument(
        "--keep", action="store_true", help="parts that these runs don't have stay in the record as they are"
    )
    also.add_argument(
        "--further", action="store_true", help="all that is in the record stays: these are repetitions of it"
    )
    add.set_defaults(run=gather)
    more = commands.add_parser(
        "more", help="run on the testbed what a piece's record has least often, or longest ago; and add it"
    )
    more.add_argument("piece", metavar="PIECE")
    more.add_argument(
        "--for", dest="for_s", type=float, default=K_MORE_S, metavar="S",
        help="as many parts as took no longer the last time (480)",
    )  # fmt: skip
    more.add_argument("--out", type=place, default=K_FOLDER, metavar="DIR", help="results/claim otherwise")
    more.set_defaults(run=run_more)
    again = commands.add_parser("resimulate", help="the simulator's side of a record of runs, made anew")
    again.add_argument("piece", metavar="PIECE")
    again.add_argument("--out", type=place, default=K_FOLDER, metavar="DIR", help="results/claim otherwise")
    again.set_defaults(run=resimulate)
    report = commands.add_parser("report", help="README.md and figures from the records")
    report.add_argument("folder", type=Path, nargs="?", default=K_FOLDER, metavar="DIR")
    report.set_defaults(run=write)


def run(args: argparse.Namespace) -> int:
    from prfaas_testbed.claim import pieces  # numpy, matplotlib: a second that other commands needn't wait

    if args.repetitions < 1:
        raise UsageError(f"--repetitions: found {args.repetitions}; at least 1")
    names = args.pieces or list(pieces.SIMULATED)
    for name in names:
        pieces.piece(name)
    only = [part for part in (args.only or "").split(",") if part]
    if args.only is not None and not only:
        raise UsageError(f"--only {args.only!r}: names no part")
    if only and len(names) != 1:
        raise UsageError("--only: parts of one piece; name it")
    pieces.check_folder(args.out)
    before = pieces.read(args.out / f"{names[0]}.json") if only else None
    for name in names:
        if pieces.piece(name).gather is not None:
            _run_and_gather(name, args.out)
            continue
        record = pieces.measure(name, args.repetitions, lambda line: _say(f"  {line}\n"), only)
        record = record if before is None else pieces.partly(record, before)
        _say(f"{name}: {record['took_s']:.0f} s, {pieces.write(record, args.out)}\n")
    return EXIT_OK


def _run_and_gather(name: str, out: Path) -> None:
    """A piece of the testbed: its experiment's run goes to OUT/runs, its record to OUT."""
    folder = _run(name, out, [])
    gather(argparse.Namespace(piece=name, runs=[folder], out=out, keep=False, further=False))


def _run(name: str, out: Path, options: list[str]) -> Path:
    """The folder of the piece's experiment, run anew."""
    from prfaas_testbed.cli import run as testbed_run

    parser = argparse.ArgumentParser()
    testbed_run.register(parser.add_subparsers())
    asked = parser.parse_args(["run", f"claim-{name}", "--out", str(out / "runs"), *options])
    # A check that fell short is told by the run, and shows in the record.
    asked.run(asked)
    return max((out / "runs" / f"claim-{name}").iterdir())


def run_more(args: argparse.Namespace) -> int:
    """A record grows in as many goes as it takes, each no longer than an idle machine is to be had for."""
    from prfaas_testbed.claim import pieces, runs

    found = pieces.piece(args.piece)
    if found.gather is None:
        raise UsageError(f"{args.piece} isn't made of runs: `prfaas-testbed claim run {args.piece}`")
    if not args.for_s > 0:
        raise UsageError(f"--for {args.for_s:g}: seconds, above 0")
    pieces.check_folder(args.out)
    path = args.out / f"{args.piece}.json"
    known = pieces.read(path)["runs"] if path.exists() else []
    parts = [part for part, _ in runs.parts(f"claim-{args.piece}")]
    chosen = pieces.due(known, parts, args.for_s)
    _say(f"{args.piece}: {', '.join(chosen)}\n")
    folder = _run(args.piece, args.out, ["--parts", ",".join(chosen)])
    again = found.further is not None
    kept = {"keep": bool(known) and not again, "further": bool(known) and again}
    return gather(argparse.Namespace(piece=args.piece, runs=[folder], out=args.out, **kept))


def gather(args: argparse.Namespace) -> int:
    from prfaas_testbed.claim import pieces

    pieces.check_folder(args.out)
    record = pieces.gather(args.piece, args.runs, lambda line: _say(f"  {line}\n"))
    if args.keep or args.further:
        join = pieces.kept if args.keep else pieces.further
        record = join(record, pieces.read(args.out / f"{args.piece}.json"))
    _say(f"{args.piece}: {pieces.write(record, args.out)}\n")
    return EXIT_OK


def resimulate(args: argparse.Namespace) -> int:
    from prfaas_testbed.claim import pieces

    record = pieces.read(args.out / f"{args.piece}.json")
    record = pieces.resimulated(record, lambda line: _say(f"  {line}\n"))
    _say(f"{args.piece}: {pieces.write(record, args.out)}\n")
    return EXIT_OK


def write(args: argparse.Namespace) -> int:
    from prfaas_testbed.claim.report import write_report

    path, goals = write_report(args.folder)
    for goal in goals:
        sys.stdout.write(f"{'reached' if goal.reached else 'missed '} {goal.text}: {goal.found}\n")
    sys.stdout.write(f"{path}\n")
    return EXIT_OK


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
