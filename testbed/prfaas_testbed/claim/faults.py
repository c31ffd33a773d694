"""Piece `faults`: one trouble after the other on real servers under load; what became of each request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prfaas.config.run import EventRow, RequestRow
from prfaas.figures import new_figure, save
from prfaas_testbed.claim.gathering import Gathered, by_hand, gathered
from prfaas_testbed.claim.judge import Goal, Piece, table
from prfaas_testbed.claim.runs import parts
from prfaas_testbed.experiment.view import field, number

K_EXPERIMENT = "claim-faults"
K_CALM = "calm"
K_ROUTER = "router killed"
K_DISTURBED = 2.0  # times the slowest first token of the calm round
K_RECOVER_S = 30.0
K_FREE_S = 30.0
K_WANTED = 5  # repetitions
K_MODELS = ("dense", "hybrid")

# How the load generator words what isn't an answer and isn't a server's word either.
K_LATE = ("no whole answer within", "the load generator told nothing")
K_RESET = (
    "ServerDisconnectedError", "ClientOSError", "ClientPayloadError", "ClientConnector",
    "the stream ended before the answer did", "ConnectionResetError",
)  # fmt: skip


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Raises UsageError: it takes a network and real servers."""
    raise by_hand("faults", K_EXPERIMENT)


def gather(folders: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """The record of runs: a row a request, and of every round when its trouble was and what it left. Each
    run and part is a repetition of its rounds. Raises UsageError.
    """
    rows: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    taken = gathered(folders, K_EXPERIMENT)
    for one in taken:
        for repetition in one.run.repetitions:
            events = [row for row in repetition.events if one.view.ours(row)]
            name = next((field(row, "round") for row in events if row.event == "round"), None)
            if name is None:
                continue
            place = len(rounds)
            rounds.append(_round(one, str(name), events))
            rows += [_request(row, place, str(name)) for row in repetition.requests if one.view.ours(row)]
    data = {"rows": rows, "rounds": rounds, "runs": [one.brief for one in taken]}
    for found in judged(data):
        say(
            f"{found.fault}, {found.model}: {found.requests} requests, {found.equal} equal, "
            f"{found.refused} refused, {found.lost} lost, {found.wrong} wrong, {found.recovery_s:.1f} s"
        )
    return data


def further(before: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """Both as one record; the later rounds come after those before."""
    first = len(before["rounds"])
    rows = [
        {**row, "round": row["round"] + first, "repetition": row["repetition"] + first}
        for row in fresh["rows"]
    ]
    return {
        "rows": before["rows"] + rows,
        "rounds": before["rounds"] + fresh["rounds"],
        "runs": before["runs"] + fresh["runs"],
    }


def _request(row: RequestRow, place: int, name: str) -> dict[str, Any]:
    return {
        "round": place, "fault": name, "model": row.model, "repetition": place, "sent_s": row.sent_s,
        "ttft_s": row.ttft_s, "e2e_s": row.e2e_s, "prompt_tokens": row.prompt_tokens,
        "equal": row.tokens_equal, "error": row.error,
    }  # fmt: skip


def _round(one: Gathered, name: str, events: Sequence[EventRow]) -> dict[str, Any]:
    """One round's trouble and the reckoning after it."""
    steps = [row for row in events if field(row, "planned_s") is not None]
    probes = [row for row in events if row.event == "probe"]
    good = next((row for row in probes if field(row, "good")), None)
    settled = [row for row in events if row.event == "settled"]
    frees_s = [number(row, "free_s") for row in settled]
    own = next(row for row in events if row.event == "round")
    return {
        "fault": name,
        "part": one.part,
        "model": str(field(own, "model")),
        "commit": one.brief.get("commit"),
        "planned": sum(int(number(row, "requests") or 0) for row in events if row.event == "load"),
        "at_s": min((row.at_s for row in steps), default=0.0),
        # A program that is started again is back when it says that it serves.
        "until_s": max((row.at_s + (number(row, "ready_s") or 0.0) for row in steps), default=0.0),
        "missed": [row.event for row in steps if field(row, "failed") or field(row, "skipped")],
        "free_s": None if None in frees_s or not frees_s else max(s for s in frees_s if s is not None),
        "held": [field(row, "held") or field(row, "error") for row in settled],
        "probes_failed": [field(row, "error") for row in probes if not field(row, "good")],
        "whole_at_s": good.at_s + (number(good, "e2e_s") or 0.0) if good is not None else None,
        "lagged": field(own, "lagged"),
    }


@dataclass(frozen=True)
class Judged:
    """What became of the requests of one fault on one model, over all its rounds."""

    fault: str
    model: str
    rounds: int
    requests: int
    equal: int
    refused: int
    wrong: int
    lost: int
    """No whole answer and no error within the deadline, or a connection that just ended where no router was
    killed."""
    recovery_s: float
    """From the trouble's end until the last request was over that had an error, or a first token later than
    twice the slowest of its own run's calm; or until a probe was answered rightly, where one hadn't been. The
    longest of the rounds; infinite where no probe was."""
    free_s: float
    """From the load's end until no page, lease, request or transfer was held; infinite where some still
    was."""
    missed: int
    """Rounds whose trouble didn't happen as planned."""


def fate(row: dict[str, Any]) -> str:
    """equal, wrong, refused or lost. An answer that can't be compared isn't shown to be right."""
    error = row["error"]
    if error is None:
        return "equal" if row["equal"] else "wrong"
    if error.startswith(K_LATE):
        return "lost"
    if any(word in error for word in K_RESET) and row["fault"] != K_ROUTER:
        return "lost"
    return "refused"


def _groups(data: dict[str, Any]) -> Iterable[tuple[str, str, list[int]]]:
    """(fault, model, places of its rounds), a model after the other, in order of appearance."""
    keys = dict.fromkeys((one["fault"], one["model"]) for one in data["rounds"])
    for fault, model in sorted(keys, key=lambda key: key[1]):
        places = [
            place for place, one in enumerate(data["rounds"])
            if (one["fault"], one["model"]) == (fault, model)
        ]  # fmt: skip
        yield fault, model, places


def _limits_s(data: dict[str, Any]) -> list[float]:
    """By round, the first token that counts as disturbed: by the calm that its own run began with."""
    slowest_s: dict[int, float] = {}
    for row in data["rows"]:
        if row["fault"] == K_CALM and row["ttft_s"] and not row["error"]:
            slowest_s[row["round"]] = max(slowest_s.get(row["round"], 0.0), row["ttft_s"])
    last_s: dict[str, float] = {}
    found = []
    for place, one in enumerate(data["rounds"]):
        if one["fault"] == K_CALM:
            last_s[one["part"]] = slowest_s.get(place, float("inf"))
        found.append(K_DISTURBED * last_s.get(one["part"], float("inf")))
    return found


def _recovery_s(one: dict[str, Any], rows: Sequence[dict[str, Any]], limit_s: float) -> float:
    ends_s = [one["until_s"]]
    for row in rows:
        if row["error"]:
            ends_s.append(row["sent_s"] + (row["e2e_s"] or 0.0))
        elif (row["ttft_s"] or 0.0) > limit_s:
            ends_s.append(row["sent_s"] + row["ttft_s"])
    if one["whole_at_s"] is None:
        return float("inf")
    if one["probes_failed"]:
        ends_s.append(one["whole_at_s"])
    return float(max(ends_s) - one["until_s"])


def judged(data: dict[str, Any]) -> list[Judged]:
    """A row a fault and model."""
    limits_s = _limits_s(data)
    by_round: dict[int, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        by_round.setdefault(row["round"], []).append(row)
    found = []
    for fault, model, places in _groups(data):
        rounds = [data["rounds"][place] for place in places]
        fates = [fate(row) for place in places for row in by_round.get(place, [])]
        unknown = sum(one["planned"] for one in rounds) - len(fates)
        recoveries_s = [
            _recovery_s(data["rounds"][place], by_round.get(place, []), limits_s[place]) for place in places
        ]
        frees_s = [float("inf") if one["free_s"] is None else one["free_s"] for one in rounds]
        found.append(
            Judged(
                fault, model, len(places), len(fates) + unknown, fates.count("equal"),
                fates.count("refused"), fates.count("wrong"), fates.count("lost") + unknown,
                max(recoveries_s), max(frees_s), sum(bool(one["missed"]) for one in rounds),
            )
        )  # fmt: skip
    return found


def goals(data: dict[str, Any]) -> list[Goal]:
    """Every answer right or a clear error, none lost, and service whole again soon."""
    found = judged(data)
    faults = [one for one in found if one.fault != K_CALM]
    kinds = list(dict.fromkeys(one.fault for one in faults))
    slowest = max(faults, key=lambda one: one.recovery_s)
    freed = max(found, key=lambda one: one.free_s)
    fewest = min(faults, key=lambda one: one.rounds)
    models = sorted({one.model for one in found})
    whole = set(models) >= set(K_MODELS) and fewest.rounds >= K_WANTED
    whole = whole and len(faults) == len(kinds) * len(K_MODELS) and not any(one.missed for one in faults)
    lost = {f"{one.fault} ({one.model})": one.lost for one in found if one.lost}
    return [
        Goal(
            f"real servers, {len(kinds)} kinds of trouble: every answer equal to the plain server's or an "
            "error",
            f"{sum(one.equal for one in found)} equal, {sum(one.refused for one in found)} refused, "
            f"{sum(one.wrong for one in found)} wrong",
            not any(one.wrong for one in found),
        ),
        Goal(
            "none lost",
            f"{sum(lost.values())} of {sum(one.requests for one in found)}"
            + (f": {', '.join(f'{name} {count}' for name, count in lost.items())}" if lost else ""),
            not lost,
        ),
        Goal(
            f"pages and leases back to zero within {K_FREE_S:g} s of each load's end",
            f"slowest: {freed.fault} ({freed.model}), {freed.free_s:.1f} s",
            freed.free_s <= K_FREE_S,
        ),
        Goal(
            f"service whole again within {K_RECOVER_S:g} s of each trouble's end",
            f"slowest: {slowest.fault} ({slowest.model}), {slowest.recovery_s:.1f} s",
            slowest.recovery_s <= K_RECOVER_S,
        ),
        Goal(
            f"each kind of trouble {K_WANTED} times on a dense and on a hybrid model",
            f"{len(kinds)} kinds on {' and '.join(models)}; least often {fewest.fault} ({fewest.model}): "
            f"{fewest.rounds}",
            whole,
        ),
    ]


def tell(data: dict[str, Any]) -> str:
    """The table of faults."""
    lines = [
        [
            f"{one.fault}, {one.model}", f"{one.rounds}", f"{one.requests}", f"{one.equal}",
            f"{one.refused}", f"{one.wrong}", f"{one.lost}", f"{one.recovery_s:.1f}", f"{one.free_s:.1f}",
        ]
        for one in judged(data)
    ]  # fmt: skip
    head = [
        "fault, model", "times", "requests", "equal", "refused", "wrong", "lost", "recovery, s",
        "nothing held after, s",
    ]  # fmt: skip
    lagged = sum(bool(one["lagged"]) for one in data["rounds"])
    told = K_TOLD.format(lagged=lagged, rounds=len(data["rounds"]))
    missing = _not_run(data)
    return (
        table(head, lines)
        + told
        + _to_come(data)
        + (f"\n**Not run yet**: {'; '.join(missing)}.\n" if missing else "")
    )


def _to_come(data: dict[str, Any]) -> str:
    """A paragraph on what a repetition takes, and how many are to come; empty where none is."""
    took_s = {run["part"]: float(run["wall_s"]) for run in data["runs"]}
    times = Counter((one["fault"], one["part"]) for one in data["rounds"] if one["fault"] != K_CALM)
    left, minutes, told = 0, 0.0, []
    for part, wall_s in sorted(took_s.items()):
        found = [count for (_, where), count in times.items() if where == part]
        lacking = max(0, K_WANTED - min(found, default=0))
        left, minutes = left + lacking, minutes + lacking * wall_s / 60
        told.append(f"{part} {wall_s / 60:.1f} minutes for {len(found)} kinds, {lacking} to come")
    if not left:
        return ""
    return (
        f"\nA repetition takes: {'; '.join(told)}: {minutes:.0f} minutes in all. `prfaas-testbed claim more "
        f"faults` runs the one that is due next and adds it, {left} times.\n"
    )


def _not_run(data: dict[str, Any]) -> list[str]:
    """What the experiment's file has and the record hasn't, by model."""
    known = {(one["fault"], one["model"]) for one in data["rounds"]}
    found: dict[str, list[str]] = {}
    for _, experiment in parts(K_EXPERIMENT):
        for model in experiment.models:
            names = [one.name for one in experiment.rounds if (one.name, model.name) not in known]
            found.setdefault(model.name, []).extend(name for name in names if name != K_CALM)
    return [f"on the {model} model {', '.join(names)}" for model, names in found.items() if names]


K_TOLD = """
Real SGLang servers on CPU, prefill in east alone, decode, the router and the plain server in west, 40 ms and
200 Mbit/s with 0.1% loss between them. Each row's rounds played the same 36 requests (Poisson, 2.5 a second;
the 30 s of a dead link over 42 s), the trouble 4 s after the first. *Refused*: an error in the server's or
the router's own words; where the router was killed, a reset as well. *Lost*: neither an answer nor an error
within 60 s, or a connection that just ended. *Recovery*: the longest of the rounds, from the trouble's end
until the last request that had an error, or a first token later than twice the slowest of its own run's calm,
was over, or until a probe was answered rightly; a program that was killed is back when its next process says
so, which for a server takes most of a minute more. *Nothing held*: after the load's last answer and the
trouble's end, until servers had no page and no request and pumps no lease and no transfer, caches dropped. A
pump that was killed was started again by the servers that missed it; prefill, decode and router by the
testbed, a second after, as a supervisor would. SGLang's bootstrap is part of the prefill server's process, so
that the two were restarted together. The disk was a small one of the servers' own, filled to the last byte
for 4 s; the clock that of all programs of the prefill site (a preloaded library: the kernel's timers weren't
touched). In {lagged} of {rounds} rounds the emulator held packets up for longer than it may because the
machine was busy: what was answered stands, its times are less sure.
"""


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """Recovery by fault and model."""
    found = [one for one in judged(data) if one.fault != K_CALM]
    faults = list(dict.fromkeys(one.fault for one in found))[::-1]
    figure, (panel,) = new_figure(1, 1, width=7.0, height=0.6 + 0.24 * len(faults))
    drawn: list[list[Any]] = []
    for model, colour, shift in zip(K_MODELS, ("#0072B2", "#E69F00"), (0.12, -0.12), strict=True):
        ours = [one for one in found if one.model == model and one.recovery_s != float("inf")]
        panel.plot(
            [one.recovery_s for one in ours], [faults.index(one.fault) + shift for one in ours], "o",
            color=colour, label=model,
        )  # fmt: skip
        drawn += [[one.fault, model, round(one.recovery_s, 3), one.refused] for one in ours]
    panel.axvline(K_RECOVER_S, color="black", linestyle="--", linewidth=0.8)
    panel.set_yticks(range(len(faults)), faults)
    panel.set(xlabel="Recovery, s", xlim=(-1, None))
    panel.legend(loc="lower right")
    paths = save(figure, folder, "faults", ["fault", "model", "recovery, s", "refused"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece("faults", "Trouble on real servers", measure, goals, draw, tell, gather, further=further)
