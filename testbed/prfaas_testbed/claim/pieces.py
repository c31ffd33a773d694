"""The claim's pieces by name, and the record that each leaves: all values of all repetitions."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prfaas.model.errors import MachineError, UsageError
from prfaas_testbed.claim import (
    bandwidth,
    baselines,
    bursts,
    capacity,
    faults,
    handover,
    links,
    memory,
    steps,
    testbed,
    traces,
)
from prfaas_testbed.claim.judge import Piece
from prfaas_testbed.experiment.machine import commit, machine, versions

PIECES: dict[str, Piece] = {
    piece.name: piece
    for piece in (
        capacity.PIECE,
        bursts.PIECE,
        traces.PIECE,
        bandwidth.PIECE,
        links.PIECE,
        testbed.PIECE,
        steps.PIECE,
        handover.PIECE,
        faults.PIECE,
        baselines.PIECE,
        memory.PIECE,
    )
}
SIMULATED = tuple(
    name for name, piece in PIECES.items() if piece.gather is None and piece.world == "simulator"
)


def piece(name: str) -> Piece:
    """Raises UsageError for a name that isn't one."""
    found = PIECES.get(name)
    if found is None:
        raise UsageError(f"no piece {name!r}; there are: {', '.join(PIECES)}")
    return found


def measure(
    name: str, repetitions: int, say: Callable[[str], None], only: Collection[str] = ()
) -> dict[str, Any]:
    """Run a piece in the simulator, or `only` some of its parts; its record. `say` hears of progress. Raises
    UsageError for an unknown piece or part, and for one that runs on the testbed.
    """
    found, begun = piece(name), time.monotonic()

    def make() -> dict[str, Any]:
        if not only:
            return found.measure(repetitions, say)
        if found.measure_some is None:
            raise UsageError(f"{name} is measured whole; --only isn't for it")
        return found.measure_some(repetitions, say, only)

    return _record(name, found.world, repetitions, begun, make)


def partly(record: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The record of some parts, with what one before has of the others, and of which commit that is."""
    fresh = set(record["plans"])
    kept = [part for part in before["plans"] if part not in fresh]
    older = {part: one for part, one in before.get("older", {}).items() if part in kept}
    told = {name: before[name] for name in ("commit", "started")}
    return {
        **record,
        "older": {part: older.get(part, told) for part in kept},
        "plans": {**before["plans"], **record["plans"]},
        "rows": [row for row in before["rows"] if row["part"] in kept] + record["rows"],
    }


def kept(record: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The record with what one before has of parts that it hasn't. Raises UsageError where a piece's rows
    don't say of which part they are.
    """
    if not all("part" in row for one in (record, before) for row in (*one["rows"], *one["runs"])):
        raise UsageError(f"{record['piece']}: its rows have no parts to keep; add all runs at once")
    fresh = {run["part"] for run in record["runs"]}
    return {
        **record,
        **{name: [one for one in before[name] if one["part"] not in fresh] + record[name]
           for name in ("rows", "runs")},
    }  # fmt: skip


def further(record: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The record with all that one before has: its runs are repetitions. Raises UsageError where a piece
    takes one run of a part, or a run is there already.
    """
    join = piece(record["piece"]).further
    if join is None:
        raise UsageError(f"{record['piece']}: takes the last run of each part; --keep keeps the others")
    known = {(run["part"], run["started"]) for run in before["runs"]}
    twice = sorted({run["part"] for run in record["runs"] if (run["part"], run["started"]) in known})
    if twice:
        raise UsageError(f"{record['piece']}: this run of {', '.join(twice)} is in the record already")
    return {**record, **join(before, record)}


def due(runs: Sequence[Mapping[str, Any]], parts: Sequence[str], for_s: float) -> list[str]:
    """Parts to run next, so that they end within for_s if they take as long as the last time: those that ran
    least often, and of them those that ran longest ago. At least one.
    """
    last: dict[str, Mapping[str, Any]] = {}
    for run in sorted(runs, key=lambda run: str(run["started"])):
        last[run["part"]] = run
    took_s = {part: float(run.get("wall_s") or 0.0) for part, run in last.items()}
    times = Counter(run["part"] for run in runs)
    order = sorted(parts, key=lambda part: (times[part], str(last[part]["started"]) if part in last else ""))
    found, left_s = order[:1], for_s - took_s.get(order[0], for_s)
    for part in order[1:]:
        # One that never ran may take all there is.
        if took_s.get(part, for_s) <= left_s:
            found.append(part)
            left_s -= took_s.get(part, for_s)
    return found


def resimulated(record: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The record with what the simulator says now in place of what it said then. Raises UsageError."""
    again = piece(record["piece"]).resimulated
    if again is None:
        raise UsageError(f"{record['piece']} doesn't hold runs against the simulator")
    fresh = _record(record["piece"], record["world"], record["repetitions"], time.monotonic(), dict)
    return {
        **again(record, say),
        **{name: fresh[name] for name in ("commit", "started", "machine", "versions")},
    }


def gather(name: str, folders: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """A piece's record of its runs on the testbed. Raises UsageError for other runs, and other pieces."""
    found = piece(name).gather
    if found is None:
        raise UsageError(f"{name} isn't made of runs: `prfaas-testbed claim run {name}` measures it")
    return _record(name, "testbed", 1, time.monotonic(), lambda: found(folders, say))


def _record(
    name: str, world: str, repetitions: int, begun: float, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    started = datetime.now(UTC)
    made = make()
    return {
        "piece": name,
        "world": world,
        "commit": commit(),
        "started": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "took_s": round(time.monotonic() - begun, 1),
        "repetitions": repetitions,
        "machine": machine(),
        "versions": versions(),
        **made,
    }


def check_folder(folder: Path) -> None:
    """Before minutes are spent on what couldn't be kept. Raises UsageError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--out {folder}: can't be written to: {error.strerror}") from None


def write(record: dict[str, Any], folder: Path) -> Path:
    """FOLDER/PIECE.json: a line a row, so that a change of one changes one line. The record before stays
    until this one is whole. Raises MachineError where it can't be written (a full disk).
    """
    head = {name: value for name, value in record.items() if name != "rows"}
    rows = ",\n".join("  " + json.dumps(_rounded(row)) for row in record["rows"])
    text = json.dumps(_rounded(head), indent=1)
    path = folder / f"{record['piece']}.json"
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(f'{text[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MachineError(f"{path}: can't be written: {error.strerror}") from None
    return path


def read(path: Path) -> dict[str, Any]:
    """A record that `write` wrote. Raises UsageError where it isn't one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: can't be read: {error}") from None
    if not isinstance(found, dict) or found.get("piece") not in PIECES or "rows" not in found:
        raise UsageError(f"{path}: not a record of the claim's pieces ({', '.join(PIECES)})")
    return found


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any of these figures has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value
