"""Trouble on real servers: each request is told with the trouble it met, and recovery from its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas.config.run import Run, write_run
from prfaas_testbed.claim import faults, pieces, runs


def run_of(*requests: tuple[float, float, bool | None, str | None]) -> Run:
    """(sent, first token after, equal, error) of each request; each answer ends 0.1 s after its first."""
    rows: list[dict[str, Any]] = [
        {"id": f"r{i}", "model": "dense", "prompt_tokens": 100, "sent_s": sent_s, "ttft_s": ttft_s,
         "e2e_s": ttft_s + 0.1, "tokens_equal": equal, "error": error}
        for i, (sent_s, ttft_s, equal, error) in enumerate(requests)
    ]  # fmt: skip
    load = {"at_s": 0.0, "event": "load", "requests": len(rows)}
    return Run.model_validate(
        {"experiment": faults.K_EXPERIMENT, "commit": "0" * 40, "started": "2026-01-01T00:00:00Z",
         "versions": {}, "machine": {"cores": 2}, "emulation": "appliance",
         "repetitions": [{"index": 0, "requests": rows, "events": [load]}]}
    )  # fmt: skip


def test_a_request_counts_for_the_trouble_that_began_last_before_it_was_over(tmp_path: Path) -> None:
    # Calm: at most 0.2 s. Troubles: a cut at 6, the link down from 14 to 16, flaps from 24.
    run = run_of(
        (1.0, 0.2, True, None), (5.9, 0.3, True, None), (13.5, 4.0, True, None), (15.0, 0.3, True, None),
        (17.0, 0.3, True, None), (18.0, 2.0, None, "gone"), (25.0, 0.3, False, None),
    )  # fmt: skip
    write_run(run, tmp_path)
    data = pieces.gather("faults", [tmp_path], lambda line: None)
    found = {one.fault: one for one in faults.judged(data)}
    assert found["none, before the first"].requests == 1
    assert found["cut stream"].requests == 1
    down = found["link down 2 s"]
    assert (down.requests, down.equal, down.refused, down.slowest_s) == (4, 3, 1, 4.0)
    assert down.recovery_s == pytest.approx(18.0 + 2.1 - 16.0)
    assert found["flap, 2 s off, 2 times"].wrong == 1
    assert [goal.reached for goal in faults.goals(data)] == [False, True, True]
    assert "| link down 2 s | 4 | 3 | 1 | 0 | 4.00 | 4.1 |" in faults.tell(data)
    assert faults.draw(data, tmp_path / "figures") == ["faults.png"]


def test_a_service_that_stays_away_is_no_recovery_and_an_error_may_have_no_end(tmp_path: Path) -> None:
    run = run_of(
        (1.0, 0.2, True, None), (15.0, 86.0, None, "no whole answer within 90 s"), (26.0, 0.2, True, None)
    )
    run.repetitions[0].requests.append(run.repetitions[0].requests[1].model_copy(update={"e2e_s": None}))
    write_run(run, tmp_path)
    data = pieces.gather("faults", [tmp_path], lambda line: None)
    down = next(one for one in faults.judged(data) if one.fault == "link down 2 s")
    assert down.recovery_s == pytest.approx(15.0 + 86.1 - 16.0)
    assert not faults.goals(data)[2].reached


def test_every_trouble_of_the_file_has_a_name_of_its_own() -> None:
    ((_, experiment),) = runs.parts(faults.K_EXPERIMENT)
    names = [faults.name_of(event) for event in experiment.timeline]
    assert len(set(names)) == len(names) == 11
    assert {"1% loss", "bursty loss", "1% corruption", "2% reordering", "rate to 2 Mbit/s"} <= set(names)
    assert "prefill's pump frozen 3 s" in names
