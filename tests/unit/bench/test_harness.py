"""How engines are measured side by side, compared and judged: with engines that move nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prfaas.cli.main import main
from prfaas.config.run import read_run
from prfaas.model.errors import MachineError, UsageError
from prfaas_testbed.bench import checks, harness, host, latency, report, report_links, suite, table
from prfaas_testbed.bench.cell import NAMED_CELLS, Cell
from prfaas_testbed.bench.engines.base import Engine, Sample
from prfaas_testbed.bench.harness import engines_for, measure_cell, summary
from prfaas_testbed.bench.places import Loopback, Place
from prfaas_testbed.bench.record import Record
from prfaas_testbed.bench.worker import WorkerError

CELL = NAMED_CELLS["wan-clean"]


class Fake(Engine):
    """Answers figures from a list; "fail" raises."""

    def __init__(self, name: str, streams: int | None, figures: list[Any], log: list[str]) -> None:
        self.name, self.streams = name, streams
        self._figures, self._log = iter(figures), log
        self.closed = 0

    def start(self, place: Place, cell: Cell) -> None:
        pass

    def measure(self, limit_s: float) -> Sample:
        self._log.append(f"{self.name}{self.streams or ''}")
        figure = next(self._figures)
        if figure == "fail":
            raise WorkerError("it broke")
        return Sample(figure, 1_000_000_000, 1.0, cpu_s=2.0)

    def close(self) -> None:
        self.closed += 1


class NeverStarts(Fake):
    def start(self, place: Place, cell: Cell) -> None:
        raise WorkerError("no")


def measured(tmp_path: Path, engines: list[Engine], repetitions: int = 2, narrow: bool = False) -> list[Any]:
    return measure_cell(
        Loopback(tmp_path),
        CELL,
        engines,
        repetitions=repetitions,
        limit_s=1,
        progress=lambda _: None,
        narrow=narrow,
    )


def test_repetitions_of_engines_take_turns_in_a_changing_order(tmp_path: Path) -> None:
    log: list[str] = []
    engines: list[Engine] = [Fake("prfaas", None, [1, 2, 3], log), Fake("iperf3", 1, [4, 5, 6], log)]
    rows = measured(tmp_path, engines, 3)
    assert log == ["prfaas", "iperf31", "iperf31", "prfaas", "prfaas", "iperf31"]
    assert [row["goodput_mbps"] for row in rows] == [[1, 2, 3], [4, 5, 6]]
    assert rows[0]["samples"][0]["cpu_s_per_gb"] == 2.0
    assert rows[0]["rtt_ms"] == 40


def test_an_engine_that_fails_keeps_what_it_measured_and_all_are_closed(tmp_path: Path) -> None:
    log: list[str] = []
    engines = [Fake("prfaas", None, ["fail", 7], log), NeverStarts("mooncake", None, [], log)]
    rows = measured(tmp_path, list(engines))
    assert rows[0]["goodput_mbps"] == [7]
    assert rows[0]["errors"] == ["it broke"]
    assert rows[1]["goodput_mbps"] == []
    assert rows[1]["errors"] == ["no"]
    assert all(engine.closed for engine in engines)


def test_narrowed_only_the_best_iperf3_goes_on(tmp_path: Path) -> None:
    log: list[str] = []
    engines: list[Engine] = [
        Fake("prfaas", None, [1, 1, 1], log),
        *(Fake("iperf3", streams, [streams] * 3, log) for streams in (1, 8, 4)),
        Fake("nixl", None, [1, 1, 1], log),
    ]
    rows = measured(tmp_path, engines, 3, narrow=True)
    assert [len(row["goodput_mbps"]) for row in rows] == [3, 1, 3, 1, 1]


def test_narrowed_the_round_that_only_finds_the_best_iperf3_is_shorter(tmp_path: Path) -> None:
    limits: list[tuple[str, float]] = []

    class Noting(Fake):
        def measure(self, limit_s: float) -> Sample:
            limits.append((self.name, limit_s))
            return super().measure(limit_s)

    engines: list[Engine] = [Noting("prfaas", None, [1, 2], []), Noting("iperf3", 1, [4, 5], [])]
    measure_cell(
        Loopback(tmp_path), CELL, engines, repetitions=2, limit_s=6, progress=lambda _: None, narrow=True
    )
    assert limits == [("prfaas", 6), ("iperf3", harness.K_SCAN_S), ("iperf3", 6), ("prfaas", 6)]


def test_nixl_is_measured_over_two_links_and_wherever_there_is_none() -> None:
    peers = ["iperf3", "mooncake", "nixl"]
    assert suite.peers_for(NAMED_CELLS["wan-clean"], peers) == peers
    assert suite.peers_for(NAMED_CELLS["wan-loss"], peers) == peers[:2]
    assert sum("nixl" in suite.peers_for(cell, peers) for cell in NAMED_CELLS.values()) == 2


def row(engine: str, figures: list[float], streams: int | None = None, cell: Cell = CELL) -> dict[str, Any]:
    return {"engine": engine, "streams": streams, **cell.parameters(), "goodput_mbps": figures, "samples": []}


def test_the_summary_takes_the_best_iperf3_by_its_median() -> None:
    rows = [
        row("prfaas", [90]),
        row("iperf3", [50, 200, 51], 1),
        row("iperf3", [100, 99, 1], 8),
        row("mooncake", [45]),
    ]
    (found,) = summary(rows)
    assert (found["best_iperf3_streams"], found["best_iperf3_mbps"]) == (8, 99)
    assert found["to_best_iperf3"] == pytest.approx(90 / 99, abs=1e-4)
    assert found["to_mooncake"] == 2


def test_a_figure_above_what_the_link_carries_is_bounded_by_it() -> None:
    (found,) = summary([row("prfaas", [201]), row("iperf3", [250], 4)])
    assert found["best_iperf3_mbps"] == found["prfaas_mbps"] == pytest.approx(200 * 1448 / 1514)


@pytest.mark.parametrize(
    ("name", "ours", "outcome"),
    [("wan-clean", 95, "passed"), ("wan-clean", 94, "failed"), ("wan-loss", 94, "failed")],
)
def test_a_cell_passes_at_95_percent_of_the_best_iperf3(name: str, ours: float, outcome: str) -> None:
    cell = NAMED_CELLS[name]
    judged = checks.judge_wan(
        [row("prfaas", [ours], cell=cell), row("iperf3", [100], 1, cell), row("mooncake", [20], cell=cell)]
    )
    assert judged[0]["outcome"] == outcome


def test_a_cell_with_tls_is_held_against_the_same_without_and_against_no_peer() -> None:
    cell = NAMED_CELLS["wan-loss"]
    secure = cell.with_(tls=True, name=checks.with_tls(cell.name))
    rows = [
        row("prfaas", [180], cell=cell), row("iperf3", [100], 1, cell), row("mooncake", [20], cell=cell),
        row("prfaas", [80, 99, 120], cell=secure),
    ]  # fmt: skip
    judged = checks.judge_wan(rows)
    assert [one["name"] for one in judged] == [
        "wan/wan-loss/to_best_iperf3", "wan/wan-loss/to_mooncake", "wan/wan-loss/tls_to_plain",
    ]  # fmt: skip
    assert (judged[2]["value"], judged[2]["outcome"]) == (0.55, "passed")
    page = report_links.named({"rows": rows, "summary": summary(rows)}, [])
    assert "| wan-loss | 180.0 (180.0 to 180.0) | 99.0 (80.0 to 120.0) | 0.55 |" in page
    assert page.count("wan-loss") == 2


def test_mooncake_is_to_be_tripled_where_loss_is_high_and_only_cubic_allowed() -> None:
    wanted = {}
    for name in ("wan-clean", "wan-loss", "wan-loss-bbr", "wan-burst"):
        cell = NAMED_CELLS[name]
        judged = checks.judge_wan([row("prfaas", [50], cell=cell), row("mooncake", [20], cell=cell)])
        wanted[name] = judged[1]["wanted"]
    assert wanted == {
        "wan-clean": "at least 1",
        "wan-loss": "at least 3",
        "wan-loss-bbr": "at least 1",
        "wan-burst": "at least 1",
    }


def test_what_was_not_measured_fails_and_says_so() -> None:
    check = checks.at_least("x", None, 1.0)
    assert check["outcome"] == "failed"
    assert check["reason"] == "not measured"


def test_the_loop_is_judged_round_by_round_beside_its_own_quiet() -> None:
    rounds = {"engine": "prfaas", "end": "sender", "goodput_mbps": [1, 1, 1]}
    rounds |= {"quiet": [{"p99_ms": v} for v in (1, 5, 1)], "loaded": [{"p99_ms": v} for v in (1.5, 5.5, 9)]}
    assert host.added_ms(rounds) == pytest.approx(0.5)
    (check,) = host.judge([rounds])
    assert check["outcome"] == "passed"
    assert host.judge([{**rounds, "engine": "bystander"}]) == []


def test_what_the_loop_waited_for_a_core_is_judged_apart() -> None:
    rounds: dict[str, Any] = {"engine": "prfaas", "end": "receiver", "goodput_mbps": [1]}
    rounds |= {"quiet": [{"p99_ms": 2, "own_p99_ms": 1}], "loaded": [{"p99_ms": 20, "own_p99_ms": 1.4}]}
    assert [(check["outcome"], check["value"]) for check in host.judge([rounds])] == [
        ("failed", 18), ("passed", pytest.approx(0.4)),
    ]  # fmt: skip


def test_latency_is_judged_against_a_round_trip_and_the_bytes() -> None:
    rows = [{"size_bytes": 1_000_000, "rest_s": 0.0, "ideal_s": 0.1, "sender_s": [0.104, 0.2, 0.1]}]
    assert latency.judge(rows)[0]["outcome"] == "passed"
    rows[0]["sender_s"] = [0.2, 0.2, 0.1]
    assert latency.judge(rows)[0]["outcome"] == "failed"


def test_unknown_peers_are_refused_and_stream_counts_make_a_row_each() -> None:
    with pytest.raises(UsageError, match=r"found cake; known: iperf3"):
        engines_for(CELL, ["cake"])
    named = [(engine.name, engine.streams) for engine in engines_for(CELL, ["iperf3", "mooncake"])]
    assert named == [("prfaas", None), ("mooncake", None), *(("iperf3", n) for n in (1, 4, 8, 16, 32))]
    fixed = engines_for(CELL.with_(streams=2), ["iperf3"])
    assert [engine.streams for engine in fixed] == [2, 2]


def test_a_missing_peer_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match="apt-get install iperf3"):
        harness.require_tools(["iperf3"])


def test_a_record_is_a_run_that_reads_back(tmp_path: Path) -> None:
    record = Record(tmp_path)
    log: list[str] = []
    record.rows = measured(tmp_path, [Fake("prfaas", None, [1.5, 2.5], log)])
    record.checks = checks.judge_wan(record.rows)
    record.add_place({"emulation": "appliance"})
    record.finished("wan")
    run = read_run(record.folder)
    assert run.experiment == "bench"
    assert run.emulation == "appliance"
    assert [r.model_dump()["samples"][0]["seconds"] for r in run.repetitions] == [1.0, 1.0]
    assert run.model_dump()["rows"][0]["goodput_mbps"] == [1.5, 2.5]


def test_parts_are_added_to_a_record_and_what_is_measured_again_is_replaced(tmp_path: Path) -> None:
    first = Record(tmp_path)
    log: list[str] = []
    first.replace(measured(tmp_path, [Fake("prfaas", None, [1.5, 2.5], log)]))
    first.judged(checks.judge_wan(first.rows))
    first.add_place({"emulation": "appliance"})
    first.finished("wan")
    again = Record.again(first.folder)
    assert (again.rows, again.checks) == (first.rows, first.checks)
    again.measures["stages"] = [{"stage": "TLS", "cpu_s_per_gb": [0.5]}]
    again.finished("cost")
    other = [{**row, "cell": "another"} for row in measured(tmp_path, [Fake("prfaas", None, [7.0], log)], 1)]
    newer = measured(tmp_path, [Fake("prfaas", None, [3.0], log)], 1)
    last = Record.again(first.folder)
    last.replace(other)
    last.replace(newer)
    last.judged(checks.judge_wan(newer))
    last.finished("wan")
    run = read_run(first.folder).model_dump()
    assert run["emulation"] == "appliance"
    assert {row["cell"]: row["goodput_mbps"][0] for row in run["rows"]} == {
        "another": 7.0,
        newer[0]["cell"]: 3.0,
    }
    assert len(run["checks"]) == len(first.checks)
    assert run["measures"]["stages"]
    assert [one["part"] for one in run["made"]] == ["wan", "cost", "wan"]
    last.keep()
    last.cut_short("wan", 1.0)
    last.finished("wan", 9.0, whole=True)
    assert [(one["part"], one.get("took_s")) for one in last.made] == [("cost", None), ("wan", 9.0)]
    last.finished("matrix", 5.0)
    last.finished("matrix", 7.0)
    (told,) = re.findall(r"matrix .*? in 12 s", report.text(last.run().model_dump(), [], "stamp"))
    assert told.startswith("matrix in 2 goes at ")


def test_a_page_says_what_its_run_holds(tmp_path: Path) -> None:
    record = Record(tmp_path)
    log: list[str] = []
    fakes = [Fake("prfaas", None, [90.0, 91.0], log), Fake("mooncake", None, [30.0, 30.0], log)]
    fakes.append(Fake("nixl", None, [4.0, 4.2], log))
    record.replace(measured(tmp_path, [*fakes, Fake("iperf3", 8, [100.0, 100.0], log)]))
    record.judged(checks.judge_wan(record.rows))
    stages = [(name, 0.25) for name in ("copy out", "checksum", "socket", "TLS", "copy in")]
    record.measures = {
        "stages": [{"stage": name, "cpu_s_per_gb": [value]} for name, value in stages],
        "neighbour": {"running_mbps": [10.0], "stopped_mbps": [9.0], "to_stopped_mbps": [9.0], "kept": 0.9},
    }
    record.finished("wan", 61.2)
    assert main(["bench", "report", str(record.folder)]) == 0
    page, *figures = report.write(record.folder)
    text = page.read_text()
    assert page == tmp_path / "bench" / "README.md"
    assert {figure.suffix for figure in figures} == {".png", ".svg", ".csv"}
    assert "90.5 (90.0 to 91.0)" in text
    assert "in 61 s" in text
    assert "NIXL over UCX's TCP, once each: wan-clean 4.1 Mbit/s" in text
    assert "to_best_iperf3" in text  # it fell short, which the page says
    assert "| wan-clean * |" in text  # these samples don't say over what span
    for one in record.rows:
        for sample in one["samples"]:
            sample["over"] = "steady"
    record.finished("wan")
    assert "wan-clean *" not in report.write(record.folder)[0].read_text()
    assert "keeps 0.90 of the goodput" in text
    assert "| all but TLS | 1.000 |" in text


def test_tables_have_a_line_a_row() -> None:
    rows = [row("prfaas", [90, 80]), row("iperf3", [], 1)]
    assert len(table.rows_table(rows).splitlines()) == 3
    assert "85.0" in table.rows_table(rows)
    assert len(table.summary_table(summary(rows)).splitlines()) == 2
    assert "failed" in table.checks_table(checks.judge_wan(rows))
