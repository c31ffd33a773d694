"""results/claim/README.md and its figures, from the pieces' records and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prfaas.model.errors import UsageError
from prfaas_testbed.claim.answer import answer
from prfaas_testbed.claim.judge import Goal, Piece
from prfaas_testbed.claim.pieces import PIECES, read

K_WORLD = """\
## What was run, on what, and what it can't show

Unless a section says where else it ran, it ran in the project's simulator, at scale 1, on virtual time: the
policies, the link estimator, the ledger and the order of sending are the very objects that the router and the
pump run; instances, engines' queues and links are models. Prefill takes a profile's time and whole chunks,
decode a time a step by batch size, a link is a fluid with a round trip, a start-up, a ceiling by loss, a
mean wait for what is lost last, the queue that BBR's streams make when they fill it, and outages that are
waited for as TCP and the pumps do. The local cluster's profile and the decode batch are solved back from the
report's own table 6, so that the plan's agreement with the published throughput is partly circular; the
TTFTs, the shares and all that happens in queues are not.

What this can't show: packet-level behaviour (what a stream reaches at a given loss and round trip, head-of-
line blocking, retransmission), the CPU that 100 Gbit/s of sending, encrypting and checking costs, SGLang's
own scheduler and its interference between prefill and decode, memory limits of a real KV pool, failures
that are neither a dead link nor a dead server, and whether a served model's answers are right: those are
measured on real SGLang servers and emulated links (`make testbed-run`), at a small scale, where rates are
divided and round trips and loss are not. Whatever a scaled link shows of throughput holds only as far as
the CPU isn't the limit. Seeds vary arrivals and lengths; they don't vary profiles, so the intervals (95 %,
Student's t over repetitions) say nothing of a profile's error.

What ran on the testbed ran the product's own router, pumps and protocol in sites of their own over an
emulated WAN, with profiled instances where a policy is judged and with real SGLang servers where an answer
must be exact. Those are SGLang 0.5.23 on CPU with small models of random weights, all on one machine's few
cores, so that they show what becomes of a request, and not how fast a GPU would have served it: no GPU
memory, no RDMA, no tensor or pipeline parallelism is in any of it, sites have one server of each role,
trouble comes one kind at a time, and what is killed is killed whole. A load is some tens of requests: a fault
that strikes one request in a thousand can have gone unseen.
"""


K_STEPS_SINCE = "2026-11-29T20:34:11Z"
K_TERMS = (
    'The report is "Prefill-as-a-Service: KVCache of next-generation models could go cross-datacenter" '
    "(2026). Its policy sends what has more uncached tokens than a threshold to the other site; *ours* is "
    "the policy `prices`, served by deadline where nothing else is said."
)


def write_report(folder: Path) -> tuple[Path, list[Goal]]:
    """README.md and figures/ of all records in `folder`; the path, and every goal.

    Raises UsageError where there is no record.
    """
    records = [read(folder / f"{name}.json") for name in PIECES if (folder / f"{name}.json").is_file()]
    if not records:
        raise UsageError(f"{folder}: no record of a piece ({', '.join(f'{name}.json' for name in PIECES)})")
    sections, judged = [], []
    for record in records:
        piece = PIECES[record["piece"]]
        goals = piece.goals(record)
        judged += [(piece, goal) for goal in goals]
        pictures = "".join(
            f"![{piece.title}](figures/{name})\n\n" for name in piece.draw(record, folder / "figures")
        )
        sections.append(
            f"## {piece.title}\n\n{pictures}{_verdicts(goals)}\n{piece.tell(record)}\n{_made(record)}"
        )
    reached = sum(goal.reached for _, goal in judged)
    head = (
        "# The claim, put to the test\n\n"
        "Written from the records beside it by `prfaas-testbed claim report`; every value of every "
        "repetition is in them, a row each. A figure is made again by the command under its section; a "
        "commit with a + had changes that were not committed yet.\n\n"
        f"{K_TERMS}\n\n"
        + answer({record["piece"]: record for record in records})
        + f"\n## Goals\n\n{reached} of {len(judged)} goals are reached"
        + _listed(judged)
        + _unmeasured({record["piece"] for record in records})
    )
    path = folder / "README.md"
    path.write_text("\n".join([head, K_WORLD, *sections]).rstrip() + "\n", encoding="utf-8")
    return path, [goal for _, goal in judged]


def _listed(judged: list[tuple[Piece, Goal]]) -> str:
    """Those that are missed first; why is said in their sections."""
    lines = []
    for piece, goal in sorted(judged, key=lambda one: one[1].reached):
        anchor = re.sub(r"[^\w -]", "", piece.title.lower()).replace(" ", "-")
        verdict = "reached" if goal.reached else "**missed**"
        lines.append(f"- {verdict} ([{piece.title}](#{anchor})): {goal.text}: {goal.found}\n")
    return ":\n\n" + "".join(lines)


def _unmeasured(known: set[str]) -> str:
    """What has no record."""
    missing = [
        f"{piece.title} (`prfaas-testbed claim run {name}`)"
        for name, piece in PIECES.items()
        if name not in known
    ]
    return f"\nNot measured yet: {'; '.join(missing)}.\n" if missing else ""


def _made(record: dict[str, Any]) -> str:
    """How its figures are made again, and what they were made with."""
    name, cores = record["piece"], record["machine"].get("cores", "?")
    if record.get("world") != "testbed":
        return (
            f"Made again by `prfaas-testbed claim run {name}`: {record['repetitions']} repetitions, "
            f"{record['took_s']:.0f} s on {cores} cores, commit {_commits([record['commit']])}, "
            f"{record['started']}. {_files(record)}{_parts_before(record)}\n{_older(record)}"
        )
    runs = record["runs"]
    loads = sorted(f"{run['machine']['load_1min_before']:4.1f}" for run in runs if "machine" in run)
    ends = dict.fromkeys(one.strip() for one in (*loads[:1], *loads[-1:]))
    beside = f" at a load of {' to '.join(ends)} before" if ends else ""
    return (
        f"Made again by `nice -n -15 prfaas-testbed run claim-{name}`, then `prfaas-testbed claim add {name} "
        f"FOLDER`: {len(runs)} parts, {sum(run['wall_s'] for run in runs) / 60:.0f} minutes on {cores} cores"
        f"{beside}, commits {_commits([run['commit'] for run in runs])}, "
        f"{min(run['started'] for run in runs)} to {max(run['started'] for run in runs)}; the record, and "
        f"what is simulated in it, by {_commits([record['commit']])}.\n"
    )


def _files(record: dict[str, Any]) -> str:
    files = f"The experiments are `topologies/experiments/claim-{record['piece']}*.yaml`"
    simulated = record.get("world", "simulator") == "simulator"
    return f"{files}; `prfaas simulate` plays each alone." if simulated else f"{files}."


def _parts_before(record: dict[str, Any]) -> str:
    """Which parts of it were measured before the others (`claim run --only`)."""
    told = [
        f"{part} {_commits([one['commit']])}, {one['started']}"
        for part, one in record.get("older", {}).items()
    ]
    return f" Parts of it are of other commits: {'; '.join(told)}." if told else ""


def _older(record: dict[str, Any]) -> str:
    """Where the simulator has changed since in what this record shows."""
    if record.get("world") != "simulator" or record["started"] >= K_STEPS_SINCE:
        return ""
    return (
        "\nMade before the simulator's instances went on with a prompt that a step has cut before all "
        "others, as SGLang does (084cab3ea907): a long prompt holds its instance now, and what is served by "
        "deadline comes out lower. What is served as it comes hasn't changed.\n"
    )


def _commits(found: Iterable[str]) -> str:
    """Shortened, each once; a + where files had changed since."""
    short = {one.removesuffix("-dirty")[:12] + "+" * one.endswith("-dirty") for one in found}
    return ", ".join(f"`{one}`" for one in sorted(short))


def _verdicts(goals: list[Goal]) -> str:
    lines = ["| goal | found | |", "| --- | --- | --- |"]
    for goal in goals:
        verdict = "reached" if goal.reached else "**missed**" + (f": {goal.why}" if goal.why else "")
        lines.append(f"| {goal.text} | {goal.found} | {verdict} |")
    return "\n".join(lines) + "\n"
