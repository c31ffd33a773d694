"""What is asked of every engine over a link: goodput while there is always more to send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prfaas_testbed.bench import steady
from prfaas_testbed.bench.cell import NAMED_CELLS, Cell, full_matrix
from prfaas_testbed.bench.engines.pool_worker import Pool
from prfaas_testbed.bench.harness import K_LEAST_RTTS
from prfaas_testbed.bench.layout import Layout

LIMIT_S = 3.0


class Receiver:
    """Answers counts from a list."""

    def __init__(self, counts: list[tuple[float, int]]) -> None:
        self._counts = iter(counts)

    def call(self, method: str, **parameters: Any) -> tuple[float, int]:
        assert method == "count"
        assert parameters["value"] == 7
        return next(self._counts)


class Sender:
    """Is done at a time; notes how long it was waited for."""

    def __init__(self, ended_s: float) -> None:
        self.now_s, self._ended_s = 100.0, ended_s
        self.waits: list[float] = []

    def has_answered(self, wait_s: float) -> bool:
        self.waits.append(wait_s)
        self.now_s = min(self.now_s + wait_s, max(self.now_s, self._ended_s))
        return self.now_s >= self._ended_s


def repetition(
    counts: list[tuple[float, int]], ended_s: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], steady.Counted | None, list[float]]:
    """One over wan-clean that begins at 100 s and whose engine is done at `ended_s`; how long it was waited
    for comes third.
    """
    asked: dict[str, Any] = {}
    sender = Sender(ended_s)
    monkeypatch.setattr(steady.time, "perf_counter", lambda: sender.now_s)

    def move(
        *, total_bytes: int, limit_s: float, meanwhile: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        asked.update(total_bytes=total_bytes, limit_s=limit_s)
        if meanwhile is not None:
            meanwhile()
        return {"ended_s": ended_s}

    cell = NAMED_CELLS["wan-clean"]
    ends: Any = {"sender": sender, "receiver": Receiver(counts)}
    _, counted = steady.move_and_count(move, ends, cell, Layout.of(cell), 7, LIMIT_S)
    return asked, counted, sender.waits


def test_goodput_is_what_came_between_the_end_of_the_warm_up_and_the_end_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, counted, waits = repetition([(101.0, 20_000_000), (104.0, 80_000_000)], 104.7, monkeypatch)
    assert waits == [1.0, 3.0]
    assert asked["limit_s"] == 4.0
    assert counted is not None
    assert counted.mbps == pytest.approx(160)
    found = steady.columns(150_000_000, 6.0, counted)
    assert found["over"] == "steady"
    assert found["whole_mbps"] == 200
    assert found["steady_s"] == 3.0


def test_an_engine_that_ran_out_of_bytes_within_the_time_is_measured_to_its_last_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for ended_s in (100.5, 103.9):
        _, counted, _ = repetition([(101.0, 20_000_000)], ended_s, monkeypatch)
        assert counted is None
    _, counted, _ = repetition([(101.0, 20_000_000), (104.1, 80_000_000)], 104.05, monkeypatch)
    assert counted is None
    assert steady.columns(150_000_000, 6.0, counted) == {"goodput_mbps": 200, "over": "whole"}


@pytest.mark.parametrize("cell", [*NAMED_CELLS.values(), *full_matrix()], ids=Cell.label)
def test_no_cell_runs_out_of_bytes_even_at_all_that_its_link_carries(cell: Cell) -> None:
    limit_s = max(LIMIT_S, K_LEAST_RTTS * cell.rtt_s)
    span = steady.span_of(cell, Layout.of(cell), limit_s)
    assert span is not None
    assert span.warm_s >= 20 * cell.rtt_s
    assert Layout.of(cell).total_bytes > 1.02 * span.end_s * (cell.ceiling_mbps or 0) * 1e6 / 8


@pytest.mark.parametrize("cell", [*NAMED_CELLS.values(), *full_matrix()], ids=Cell.label)
def test_no_more_is_handed_over_than_keeps_the_link_busy_for_a_moment_beyond_the_time(cell: Cell) -> None:
    assert cell.ceiling_mbps is not None
    for seconds in (2.0, 4.0):
        lasts_s = steady.bytes_for(cell, seconds, 1 << 40) * 8e-6 / cell.ceiling_mbps
        assert seconds + cell.rtt_s + 0.2 < lasts_s < seconds + cell.rtt_s + 1
    assert steady.bytes_for(cell, 2.0, 1000) == 1000


def test_where_pages_would_be_written_again_or_there_is_no_link_the_whole_counts() -> None:
    fast = Cell(rtt_ms=1, rate_mbps=10_000, total_bytes=1 << 33)
    assert steady.span_of(fast, Layout.of(fast), LIMIT_S) is None
    assert steady.span_of(Cell(), Layout.of(Cell()), LIMIT_S) is None


def test_a_segment_that_is_there_in_part_counts_in_part() -> None:
    pool = Pool(4 * 20_000)
    pool.view[:20_000] = 7
    pool.view[40_000:49_000] = 7  # two pieces of 4 KiB and some more
    pool.view[79_999] = 7  # the last and shorter piece of the segment at 60,000, whatever lies before it
    assert pool.count([0, 20_000, 40_000, 60_000], 20_000, 7)[1] == 20_000 + 2 * 4096 + 20_000 - 4 * 4096


def test_segments_smaller_than_a_piece_count_whole() -> None:
    pool = Pool(4096)
    pool.view[0:512] = 7
    pool.view[1024:1100] = 7
    assert pool.count([0, 1024, 2048], 512, 7)[1] == 512
