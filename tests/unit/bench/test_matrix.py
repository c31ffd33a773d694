"""The whole matrix in pieces: what was measured stays, what is left is told, and the page shows both."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prfaas_testbed.bench import matrix, report
from prfaas_testbed.bench.cell import Cell, full_matrix
from prfaas_testbed.bench.record import Record

CELLS = full_matrix()[:8]


def rows_of(cell: Cell, ours: float = 90.0) -> list[dict[str, Any]]:
    engines = [("prfaas", None, ours), ("mooncake", None, 30.0)]
    engines += [("iperf3", count, 100.0) for count in matrix.K_STREAMS]
    sample = {"seconds": 1.0, "bytes": 1, "repetition": 0, "load_1min": 0.5}
    return [
        {
            "engine": name, "streams": streams, **cell.parameters(), "goodput_mbps": [mbps],
            "samples": [sample], "errors": [],
        }
        for name, streams, mbps in engines
    ]  # fmt: skip


class Clock:
    now = 0.0

    def __init__(self) -> None:
        self.asked: dict[str, float] = {}
        """The time limit of a repetition, by cell."""

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Each cell takes a minute, and a network is no real one."""
    clock = Clock()

    class Place:
        def describe(self) -> dict[str, Any]:
            return {"emulation": "appliance"}

        def shape(self, cell: Cell) -> None:
            pass

    @contextmanager
    def emulated(*_: Any):  # type: ignore[no-untyped-def]
        yield Place()

    def measure_cell(place: Any, cell: Cell, engines: Any, **asked: Any) -> list[dict[str, Any]]:
        clock.now += 60
        clock.asked[cell.label()] = asked["limit_s"]
        return rows_of(cell)

    monkeypatch.setattr(matrix, "time", clock)
    monkeypatch.setattr(matrix, "emulated", emulated)
    monkeypatch.setattr(matrix, "measure_cell", measure_cell)
    return clock


def piece(record: Record, tmp_path: Path, for_s: float | None) -> int:
    return len(matrix.measure(record, CELLS, tmp_path, limit_s=1, for_s=for_s, progress=lambda _: None))


def test_a_cell_where_bbr_is_allowed_is_measured_for_as_long_as_its_cycle_takes(
    tmp_path: Path, clock: Clock
) -> None:
    piece(Record(tmp_path), tmp_path, None)
    for cell in CELLS:
        steady_s = cell.steady_s(clock.asked[cell.label()])
        assert steady_s == (10.0 if cell.congestion_control == "bbr" else 2.0)


def test_pieces_measure_every_cell_once(tmp_path: Path, clock: Clock) -> None:
    record = Record(tmp_path)
    assert piece(record, tmp_path, 150) == 8 - 3
    record.finished("matrix")
    again = Record.again(record.folder)
    assert piece(again, tmp_path, 30) == 8 - 4
    assert clock.now == 240
    assert piece(Record.again(record.folder), tmp_path, None) == 0
    assert clock.now == 8 * 60
    whole = Record.again(record.folder)
    assert piece(whole, tmp_path, None) == 0
    assert clock.now == 8 * 60
    assert len(whole.rows) == 8 * 5
    assert len(whole.checks) == 8 * 2


def test_a_piece_that_is_killed_keeps_the_cells_before(tmp_path: Path, clock: Clock) -> None:
    record = Record(tmp_path)

    def killed(*_: Any, **__: Any) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    piece(record, tmp_path, 90)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "measure_cell", killed)
        with pytest.raises(KeyboardInterrupt):
            piece(record, tmp_path, None)
    assert len(matrix.left(Record.again(record.folder).rows, CELLS)) == 6


def test_a_cell_of_which_an_engine_is_missing_is_measured_again() -> None:
    first, second = full_matrix()[:2]
    rows = rows_of(first) + rows_of(second)[:-1]
    assert matrix.left(rows, [first, second]) == [second]
    rows[0]["goodput_mbps"], rows[0]["errors"] = [], ["it broke"]
    assert matrix.left(rows, [first]) == []


def test_the_page_has_the_matrix_as_a_table_of_its_own(tmp_path: Path, clock: Clock) -> None:
    record = Record(tmp_path)
    piece(record, tmp_path, 100)
    record.finished("matrix")
    text = report.write(record.folder)[0].read_text()
    assert "2 of 64 cells measured; 2 below 0.95 of iperf3, 0 below Mooncake" in text
    assert "| 100 | 0% | cubic | 90, 0.94, 3.0 | - | - | - |" in text
    assert "## Over a link" not in text
