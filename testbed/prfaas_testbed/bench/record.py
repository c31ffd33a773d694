"""The bench's run.json: one for each run, under RESULTS/bench/STAMP."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prfaas.config.run import CalibrationRow, CheckRow, Repetition, Run, stamp, write_run
from prfaas_testbed.bench.harness import Row, summary
from prfaas_testbed.experiment.machine import commit, machine, versions

K_EXPERIMENT = "bench"


class Record:
    """Rows and checks as they come, written after each part so that one cut short keeps what it measured."""

    def __init__(self, results: Path) -> None:
        self._started = datetime.now(UTC)
        self.folder = results / K_EXPERIMENT / stamp(self._started)
        self._machine = machine()
        self._commit = commit()
        self._places: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self.checks: list[Row] = []
        self.measures: dict[str, Any] = {}

    def add_place(self, place: dict[str, Any]) -> None:
        """What a place says of itself: its emulation, its calibration."""
        self._places.append(place)

    def write(self) -> Path:
        return write_run(self.run(), self.folder)

    def run(self) -> Run:
        """As run.json has it: repetitions hold their samples, `rows` has a row for each engine and cell."""
        emulations = [place["emulation"] for place in self._places if place["emulation"] != "none"]
        run = Run(
            experiment=K_EXPERIMENT,
            description="prfaas beside iperf3 and Mooncake's TCP transport",
            commit=self._commit,
            started=self._started.isoformat(timespec="seconds"),
            versions=versions(),
            machine=self._machine,
            # Loopback alone goes through the kernel as it is, which is what native says.
            emulation=emulations[0] if emulations else "native",
            calibration=[
                CalibrationRow.model_validate(row)
                for place in self._places
                for row in place.get("calibration", [])
            ],
            checks=[CheckRow.model_validate(check) for check in self.checks],
            repetitions=_by_repetition(self.rows),
            files={},
        )
        extra = {
            "rows": [_slim(row) for row in self.rows],
            "summary": summary(self.rows),
            "measures": self.measures,
        }
        return run.model_copy(update=extra)


def _slim(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "samples"}


def _by_repetition(rows: Sequence[Row]) -> list[Repetition]:
    count = max((len(row["goodput_mbps"]) for row in rows), default=0)
    found: list[Repetition] = []
    for index in range(count):
        samples = [
            {"cell": row["cell"], "engine": row["engine"], "streams": row["streams"], **sample}
            for row in rows
            for sample in row["samples"]
            if sample["repetition"] == index
        ]
        found.append(Repetition.model_validate({"index": index, "samples": samples}))
    return found
