"""The bench of the simulator: what it counts, and what it judges."""

from __future__ import annotations

import json

import pytest

from prfaas.cli.main import main
from prfaas_testbed.bench import simulate


def row(requests: int, us_per_event: float, cpu_s: float = 1.0, peak_mib: float = 100.0) -> simulate.Row:
    return {"requests": requests, "us_per_event": us_per_event, "cpu_s": cpu_s, "peak_mib": peak_mib}


def outcomes(*rows: simulate.Row) -> dict[str, str]:
    return {check.name: check.outcome for check in simulate.judge(rows)}


def test_a_length_alone_is_not_judged_by_length_and_a_short_one_not_by_its_time() -> None:
    assert outcomes(row(1000, 10)) == {}


def test_an_event_may_not_cost_more_in_a_longer_run() -> None:
    assert outcomes(row(10, 10), row(100, 12)) == {"an event costs alike": "passed"}
    assert outcomes(row(10, 10), row(100, 13)) == {"an event costs alike": "failed"}


@pytest.mark.parametrize(
    ("cpu_s", "peak_mib", "time", "memory"),
    [(300, 4096, "passed", "passed"), (301, 100, "failed", "passed"), (1, 5000, "passed", "failed")],
)
def test_a_million_requests_are_held_to_what_is_promised(
    cpu_s: float, peak_mib: float, time: str, memory: str
) -> None:
    assert outcomes(row(10**6, 10, cpu_s, peak_mib)) == {"CPU time": time, "memory": memory}


def test_a_measurement_counts_what_was_simulated() -> None:
    found = simulate.measure(simulate.loaded("one-t"), 60)
    assert found["requests"] == 60
    assert found["failed"] == 0
    assert found["events"] > 60 * 3
    assert 0 < found["cpu_s"] < 60
    assert found["peak_mib"] > 10
    assert found["us_per_event_by_part"]
    assert found["simulated_s"] > 10


def test_the_command_measures_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "simulate", "--experiment", "one-t", "--requests", "10", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [one["requests"] for one in rows] == [10]


def test_wrong_lengths_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "simulate", "--requests", "1e6"]) == 2
    assert "--requests: found '1e6'" in capsys.readouterr().err
