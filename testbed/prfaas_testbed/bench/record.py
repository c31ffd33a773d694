"""The bench's run.json: one for each run, under RESULTS/bench/STAMP. Parts may be added to it later.

What a part measures is kept as it comes, so that one that is cut short leaves what it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prfaas.config.run import CalibrationRow, CheckRow, Repetition, Run, read_run, stamp, write_run
from prfaas.model.errors import UsageError
from prfaas_testbed.bench.harness import Row, summary
from prfaas_testbed.experiment.machine import commit, machine, versions

K_EXPERIMENT = "bench"


def read_record(folder: Path) -> Run:
    """A run of the bench's. Raises UsageError when there is none, or it is another kind's: written to it
    would be lost.
    """
    run = read_run(folder)
    if run.experiment != K_EXPERIMENT:
        raise UsageError(f"{folder}: a record of {run.experiment!r}, not of `prfaas bench all`")
    return run


class Record:
    """Rows and checks as they come."""

    def __init__(self, results: Path) -> None:
        self._started = datetime.now(UTC)
        self.folder = results / K_EXPERIMENT / stamp(self._started)
        self._machine = machine()
        self._commit = commit()
        self._emulations: list[str] = []
        self._calibration: list[CalibrationRow] = []
        self.rows: list[Row] = []
        self.checks: list[Row] = []
        self.measures: dict[str, Any] = {}
        self.made: list[dict[str, Any]] = []
        """Which parts were measured when, on which commit, and how long that took."""
        self._kept = False

    @classmethod
    def again(cls, folder: Path) -> Record:
        """One that is there, to add to. Raises UsageError when there is none."""
        run = read_record(folder)
        data = run.model_dump()
        record = cls(folder.parent.parent)
        record.folder, record._started = folder, datetime.fromisoformat(run.started)
        record._commit = run.commit
        record._calibration = list(run.calibration)
        record._emulations = [] if run.emulation == "native" else [run.emulation]
        samples = [sample for one in data["repetitions"] for sample in one["samples"]]
        record.rows = [{**row, "samples": _of(row, samples)} for row in data["rows"]]
        record.checks, record.measures = data["checks"], data["measures"]
        record.made = data.get("made", [])
        return record

    def replace(self, rows: Sequence[Row]) -> None:
        """Rows of cells; what was known of these cells is forgotten."""
        new = {row["cell"] for row in rows}
        self.rows = [row for row in self.rows if row["cell"] not in new] + list(rows)

    def keep(self, checks: Sequence[Row] = ()) -> None:
        """Write what there is, with these checks of it: a part goes on, and may be cut short."""
        self.judged(checks)
        self._kept = True
        self.write()

    def keep_measures(
        self, name: str, rows: Sequence[Row], same: Sequence[str], checks: Sequence[Row]
    ) -> None:
        """Rows of a measure as far as they are known, with their checks. Those known before that are the
        `same` as one of them are forgotten.
        """
        new = [[row[key] for key in same] for row in rows]
        before = [row for row in self.measures.get(name, ()) if [row.get(key) for key in same] not in new]
        self.measures[name] = before + list(rows)
        self.keep(checks)

    def judged(self, checks: Sequence[Row]) -> None:
        """Checks; what was known under their names is forgotten."""
        new = {check["name"] for check in checks}
        self.checks = [check for check in self.checks if check["name"] not in new] + list(checks)

    def cut_short(self, part: str, took_s: float) -> None:
        """A part didn't come to its end: note it if it left anything."""
        if self._kept:
            self.finished(f"{part} (cut short)", took_s)

    def finished(self, part: str, took_s: float | None = None, *, whole: bool = False) -> Path:
        """A part is measured: note it, and write what there is. `whole`: all of it is new, so that what was
        noted of it before is no more true.
        """
        self._kept = False
        if whole:
            self.made = [one for one in self.made if one["part"].partition(" (")[0] != part]
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        note: dict[str, Any] = {"part": part, "commit": commit(), "ended": ended}
        self.made.append(note if took_s is None else {**note, "took_s": round(took_s, 1)})
        return self.write()

    def write(self) -> Path:
        """What there is by now."""
        return write_run(self.run(), self.folder)

    def add_place(self, place: dict[str, Any]) -> None:
        """What a place says of itself: its emulation, its calibration."""
        if place["emulation"] not in ("none", *self._emulations):
            self._emulations.append(place["emulation"])
        self._calibration += [CalibrationRow.model_validate(row) for row in place.get("calibration", [])]

    def run(self) -> Run:
        """As run.json has it: repetitions hold their samples, `rows` has a row for each engine and cell."""
        run = Run(
            experiment=K_EXPERIMENT,
            description="prfaas beside iperf3 and Mooncake's TCP transport",
            commit=self._commit,
            started=self._started.isoformat(timespec="seconds"),
            versions=versions(),
            machine=self._machine,
            # Loopback alone goes through the kernel as it is, which is what native says.
            emulation=self._emulations[0] if self._emulations else "native",  # type: ignore[arg-type]
            calibration=self._calibration,
            checks=[CheckRow.model_validate(check) for check in self.checks],
            repetitions=_by_repetition(self.rows),
            files={},
        )
        extra = {
            "rows": [_slim(row) for row in self.rows],
            "summary": summary(self.rows),
            "measures": self.measures,
            "made": self.made,
        }
        return run.model_copy(update=extra)


K_SAME = ("cell", "engine", "streams", "segment_bytes")


def _of(row: Row, samples: Sequence[Row]) -> list[Row]:
    """A row's own samples, without what makes them its own."""
    mine = [one for one in samples if all(one.get(name) == row[name] for name in K_SAME)]
    return [{name: value for name, value in one.items() if name not in K_SAME} for one in mine]


def _slim(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "samples"}


def _by_repetition(rows: Sequence[Row]) -> list[Repetition]:
    count = max((len(row["goodput_mbps"]) for row in rows), default=0)
    found: list[Repetition] = []
    for index in range(count):
        samples = [
            {**{name: row[name] for name in K_SAME}, **sample}
            for row in rows
            for sample in row["samples"]
            if sample["repetition"] == index
        ]
        found.append(Repetition.model_validate({"index": index, "samples": samples}))
    return found
