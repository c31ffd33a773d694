"""What the bench measures is kept as it comes: a run that is cut short leaves what it had."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prfaas.model.errors import UsageError
from prfaas_testbed.bench import host, report, suite
from prfaas_testbed.bench.cell import NAMED_CELLS, Cell
from prfaas_testbed.bench.engines.base import Engine, Sample
from prfaas_testbed.bench.record import Record
from prfaas_testbed.bench.suite import Sizes

FIRST, SECOND = NAMED_CELLS["metro-clean"], NAMED_CELLS["wan-clean"]


class Fake(Engine):
    """Answers the next figure of a list; None: the user presses Ctrl-C."""

    def __init__(self, name: str, figures: list[float | None]) -> None:
        self.name, self.streams, self._figures = name, None, figures

    def start(self, place: Any, cell: Cell) -> None: ...

    def close(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {}

    def measure(self, limit_s: float) -> Sample:
        figure = self._figures.pop(0)
        if figure is None:
            raise KeyboardInterrupt
        return Sample(goodput_mbps=figure, bytes=1, seconds=1.0)


class Link:
    def shape(self, cell: Cell) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"emulation": "appliance"}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float | None]]:
    """By engine, cell after cell and round after round."""
    found: dict[str, list[float | None]] = {"prfaas": [], "iperf3": []}

    @contextmanager
    def emulated(*_: object):
        yield Link()

    monkeypatch.setattr(suite, "emulated", emulated)
    monkeypatch.setattr(suite, "installed_peers", lambda: ["iperf3"])
    monkeypatch.setattr(suite, "engines_for", lambda *_: [Fake(name, found[name]) for name in found])
    return found


def run(record: Record, part: str = "wan", cells: tuple[Cell, ...] = (FIRST, SECOND)) -> None:
    suite.run_parts([part], record, Sizes.full(2, cells=cells), lambda text: None)


def goodput(record: Record) -> dict[tuple[str, str], list[float]]:
    return {(row["cell"], row["engine"]): row["goodput_mbps"] for row in record.rows}


def test_what_was_measured_before_an_interrupt_is_kept_with_its_checks(tmp_path: Path, figures) -> None:
    figures["prfaas"] += [90.0, 91.0, 92.0, None]
    figures["iperf3"] += [100.0, 101.0, 102.0, 103.0]
    record = Record(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(record)
    again = Record.again(record.folder)
    assert goodput(again) == {
        (FIRST.name, "prfaas"): [90.0, 91.0], (FIRST.name, "iperf3"): [100.0, 101.0],
        (SECOND.name, "prfaas"): [92.0], (SECOND.name, "iperf3"): [102.0, 103.0],
    }  # fmt: skip
    assert {check["name"] for check in again.checks} >= {"wan/wan-clean/to_best_iperf3"}
    assert again.run().emulation == "appliance"
    assert [made["part"] for made in again.made] == ["wan (cut short)"]


def test_an_interrupt_before_the_first_round_leaves_the_record_as_it_was(tmp_path: Path, figures) -> None:
    figures["prfaas"] += [90.0, 91.0]
    figures["iperf3"] += [100.0, 101.0]
    record = Record(tmp_path)
    run(record, cells=(FIRST,))
    before = (record.folder / "run.json").read_text()
    figures["prfaas"] += [None]
    with pytest.raises(KeyboardInterrupt):
        run(Record.again(record.folder), cells=(FIRST,))
    assert (record.folder / "run.json").read_text() == before


def test_rows_of_a_measure_take_the_place_of_their_own_kind_only(tmp_path: Path, monkeypatch) -> None:
    def row(engine: str, ms: float) -> dict[str, Any]:
        return {
            "engine": engine, "end": "sender", "quiet": [{"p99_ms": 1.0}], "loaded": [{"p99_ms": ms}],
            "goodput_mbps": [1.0],
        }  # fmt: skip

    def measure(rows: list[dict[str, Any]], cut: bool):
        def measured(workdir: Path, seconds: float, repetitions: int, progress: object, keep: Any) -> None:
            for n in range(len(rows)):
                keep(rows[: n + 1])
            if cut:
                raise KeyboardInterrupt

        return measured

    monkeypatch.setattr(host, "measure", measure([row("prfaas", 1.5), row("mooncake", 9.0)], False))
    record = Record(tmp_path)
    run(record, "host")
    monkeypatch.setattr(host, "measure", measure([row("prfaas", 3.0)], True))
    with pytest.raises(KeyboardInterrupt):
        run(Record.again(record.folder), "host")
    again = Record.again(record.folder)
    found = {one["engine"]: one["loaded"][0]["p99_ms"] for one in again.measures["host"]}
    assert found == {"prfaas": 3.0, "mooncake": 9.0}
    checks = {check["name"]: check["outcome"] for check in again.checks}
    assert checks["host/prfaas/sender/added_p99_ms"] == "failed"


@pytest.mark.parametrize("use", [Record.again, report.write])
def test_a_record_of_another_kind_is_refused_and_left_as_it_was(tmp_path: Path, figures, use) -> None:
    figures["prfaas"] += [90.0, 91.0]
    figures["iperf3"] += [100.0, 101.0]
    record = Record(tmp_path)
    run(record, cells=(FIRST,))
    file = record.folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"experiment": "two-sites"}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="a record of 'two-sites', not of `prfaas bench all`"):
        use(record.folder)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
