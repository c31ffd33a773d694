"""Piece `faults`: one trouble after the other on real servers under load; what became of each request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prfaas.config.experiment import Event, Flap, Kill, LinkDown, SetLink
from prfaas.config.run import read_run
from prfaas.figures import new_figure, save
from prfaas.model.errors import UsageError
from prfaas_testbed.claim.judge import Goal, Piece, table
from prfaas_testbed.claim.runs import parts
from prfaas_testbed.experiment.view import View, number

K_EXPERIMENT = "claim-faults"
K_DISTURBED = 2.0  # times the slowest first token of the calm before the first trouble
K_RECOVER_S = 30.0


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Raises UsageError: it takes a network and real servers."""
    raise UsageError(
        f"faults: `prfaas-testbed run {K_EXPERIMENT}` measures it, `prfaas-testbed claim add faults DIR` "
        "makes its record"
    )


def gather(folders: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """The record of runs, one repetition a run and model. Raises UsageError."""
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    ((_, experiment),) = parts(K_EXPERIMENT)
    for run in map(read_run, folders):
        if run.experiment != K_EXPERIMENT:
            raise UsageError(f"a run of {run.experiment}; this piece is made of {K_EXPERIMENT}")
        planned = sum(int(number(row, "requests") or 0) for row in View(run).events("load"))
        for row in View(run).requests():
            rows.append(
                {
                    "run": len(runs), "repetition": len(runs), "model": row.model, "sent_s": row.sent_s,
                    "ttft_s": row.ttft_s, "e2e_s": row.e2e_s, "prompt_tokens": row.prompt_tokens,
                    "equal": row.tokens_equal, "error": row.error,
                }
            )  # fmt: skip
        wall_s = float((run.model_extra or {}).get("wall_s", 0.0))
        runs.append(
            {"commit": run.commit, "started": run.started, "machine": run.machine, "wall_s": wall_s,
             "planned": planned}
        )  # fmt: skip
    troubles = [
        {"fault": name_of(event), "at_s": event.at_s, "until_s": event.at_s + _length_s(event)}
        for event in experiment.timeline
    ]
    data = {"rows": rows, "runs": runs, "troubles": troubles}
    for found in judged(data):
        say(f"{found.fault}: {found.requests} requests, {found.equal} equal, {found.refused} refused")
    return data


def name_of(event: Event) -> str:
    """What it is, in a few words."""
    if isinstance(event, SetLink):
        change = event.set
        if change.bursty_loss is not None:
            return "bursty loss"
        if change.rate_mbps is not None:
            return f"rate to {change.rate_mbps:g} Mbit/s"
        for field, word in (("loss", "loss"), ("corrupt", "corruption"), ("reorder", "reordering")):
            percent = getattr(change, f"{field}_percent")
            if percent is not None:
                return f"{percent:g}% {word}"
    if isinstance(event, LinkDown):
        return f"link down {event.for_s:g} s"
    if isinstance(event, Flap):
        return f"flap, {event.off_s:g} s off, {event.times} times"
    if isinstance(event, Kill):
        done = "frozen" if event.signal == "freeze" else "killed"
        what = f"{event.instance}'s pump" if event.what == "pump" else event.instance
        return f"{what} {done}" + (f" {event.restart_after_s:g} s" if event.restart_after_s else "")
    return str(event.do).replace("_", " ")


def _length_s(event: Event) -> float:
    if isinstance(event, Flap):
        return event.times * (event.on_s + event.off_s)
    return float(getattr(event, "for_s", None) or getattr(event, "restart_after_s", None) or 0.0)


@dataclass(frozen=True)
class Judged:
    """What became of the requests that were open at a trouble's beginning, or came before the next one."""

    fault: str
    requests: int
    equal: int
    refused: int
    wrong: int
    slowest_s: float
    recovery_s: float
    """From the trouble's end until the last request that it delayed or failed was over, of those sent before
    the next trouble; 0: none was."""


def _end_s(row: dict[str, Any]) -> float:
    """When a request was over, or answered so far that its trouble was."""
    return float(row["sent_s"] + ((row["e2e_s"] if row["error"] else row["ttft_s"]) or 0.0))


def judged(data: dict[str, Any]) -> list[Judged]:
    """A row a trouble, over all runs; the calm before the first is the measure and has its own row."""
    troubles = [{"fault": "none, before the first", "at_s": float("-inf"), "until_s": 0.0}, *data["troubles"]]
    groups: list[list[dict[str, Any]]] = [[] for _ in troubles]
    for row in data["rows"]:
        over_s = row["sent_s"] + (row["e2e_s"] or 0.0)
        place = max(i for i, one in enumerate(troubles) if one["at_s"] <= over_s)
        groups[place].append(row)
    calm = [row["ttft_s"] for row in groups[0] if row["ttft_s"] is not None and row["error"] is None]
    limit_s = K_DISTURBED * max(calm, default=float("inf"))
    found = []
    late = [row for row in data["rows"] if row["error"] or (row["ttft_s"] or 0.0) > limit_s]
    nexts_s = [*(one["at_s"] for one in troubles[1:]), float("inf")]
    for trouble, rows, next_s in zip(troubles, groups, nexts_s, strict=True):
        # However long it took: a service that stays away isn't the next trouble's.
        ends_s = [
            end_s for row in late if row["sent_s"] < next_s and (end_s := _end_s(row)) >= trouble["at_s"]
        ]
        found.append(
            Judged(
                trouble["fault"], len(rows), sum(row["equal"] is True for row in rows),
                sum(bool(row["error"]) for row in rows), sum(row["equal"] is False for row in rows),
                max((row["ttft_s"] for row in rows if row["ttft_s"] is not None), default=0.0),
                max([0.0, *(end_s - trouble["until_s"] for end_s in ends_s)]),
            )
        )  # fmt: skip
    return found


def goals(data: dict[str, Any]) -> list[Goal]:
    """Every answer right or a clear error, none lost, and service whole again soon."""
    found = judged(data)
    planned = sum(run["planned"] for run in data["runs"])
    known = sum(row["error"] is not None or row["e2e_s"] is not None for row in data["rows"])
    slowest = max(found[1:], key=lambda one: one.recovery_s)
    return [
        Goal(
            "real servers, eleven kinds of trouble: every answer equal to the plain server's or an error",
            f"{sum(one.equal for one in found)} equal, {sum(one.refused for one in found)} refused, "
            f"{sum(one.wrong for one in found)} wrong",
            not any(one.wrong for one in found),
        ),
        Goal("none lost", f"{planned - known} of {planned}", planned == known),
        Goal(
            f"service whole again within {K_RECOVER_S:g} s of each trouble's end",
            f"slowest: {slowest.fault}, {slowest.recovery_s:.1f} s",
            slowest.recovery_s <= K_RECOVER_S,
        ),
    ]


def tell(data: dict[str, Any]) -> str:
    """The table of troubles."""
    lines = [
        [
            one.fault, f"{one.requests}", f"{one.equal}", f"{one.refused}", f"{one.wrong}",
            f"{one.slowest_s:.2f}", f"{one.recovery_s:.1f}",
        ]
        for one in judged(data)
    ]  # fmt: skip
    head = ["trouble", "requests", "equal", "refused", "wrong", "slowest first token, s", "recovery, s"]
    return table(head, lines) + K_TOLD


K_TOLD = """
Real SGLang servers on CPU with the dense test model, prefill in east alone, the router and the plain
server in west, two requests a second all along. A request counts for the trouble that began last before
it was over. *Recovery*: from the trouble's end until the last request that had an error, or a first
token later than twice the slowest of the calm, was over. Not tried here: prefill, decode or router
killed, the hybrid model, a full disk, a stepped clock, a wrong certificate; and each trouble once where
five times are wanted.
"""


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """First tokens over time, troubles shaded."""
    figure, (panel,) = new_figure(1, 1, width=8.0, height=3.0)
    good = [row for row in data["rows"] if row["error"] is None and row["ttft_s"] is not None]
    bad = [row for row in data["rows"] if row["error"] is not None]
    panel.plot([row["sent_s"] for row in good], [row["ttft_s"] for row in good], ".", label="answered")
    panel.plot([row["sent_s"] for row in bad], [0.0] * len(bad), "rx", label="refused")
    for trouble in data["troubles"]:
        end_s = max(trouble["until_s"], trouble["at_s"] + 0.5)
        panel.axvspan(trouble["at_s"], end_s, color="#dddddd", zorder=0)
    panel.set(xlabel="Sent, s", ylabel="TTFT, s", ylim=(0, None))
    panel.legend(loc="upper left")
    drawn = [[row["sent_s"], row["ttft_s"], row["error"] or ""] for row in data["rows"]]
    paths = save(figure, folder, "faults", ["sent, s", "TTFT, s", "error"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece("faults", "Trouble on real servers", measure, goals, draw, tell, gather)
