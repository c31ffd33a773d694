"""The claim's report: written from records alone, by rules that are the same for every system."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prfaas.config.experiment import Experiment
from prfaas.model.errors import MachineError, UsageError
from prfaas.workload.requests import TimedRequest
from prfaas_testbed.claim import bandwidth, bursts, capacity, pieces, runs
from prfaas_testbed.claim.answer import answer
from prfaas_testbed.claim.judge import column, mean, ratios, table
from prfaas_testbed.claim.report import write_report


def small(**workload: object) -> Experiment:
    """The 1T case with few and short requests."""
    ((_, found),) = runs.parts("one-t")
    return found.model_copy(
        update={"workload": found.workload.model_copy(update={"requests": 40, **workload})}
    )


def test_a_mean_has_its_interval_and_unknown_values_are_left_out() -> None:
    found = mean([1.0, 2.0, 3.0, None, math.nan])
    assert (found.value, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.30 / math.sqrt(3), rel=1e-3)
    assert found.text(1) == "2.0 ± 2.5"
    assert mean([0.5]).text(0, percent=True) == "50 %"
    assert mean([]).text() == "–"
    assert ratios([2.0, 3.0], [1.0, 0.0]).value == 2.0


def test_rows_are_paired_by_repetition() -> None:
    rows = [{"repetition": i, "policy": "a", "x": 10 - i} for i in (2, 0, 1)]
    assert column(rows, "x", policy="a") == [10, 9, 8]
    assert table(["a", "b"], [["x", "1"]]).splitlines()[1] == "| --- | ---: |"


def test_what_earlier_prompts_hold_counts_as_cached_for_the_deadline() -> None:
    profile = runs.local_profile(small())
    blocks = tuple(range(64))
    first = TimedRequest(0, 0.0, 4096, 10, blocks, 64)
    longer = TimedRequest(1, 1.0, 8192, 10, (*blocks, *range(100, 164)), 64)
    fresh = runs.uncached_tokens([first, longer], profile)
    assert fresh.tolist() == [4096, 4096]
    allowed_s = runs.allowances_s([first, longer], fresh, profile)
    assert allowed_s[0] == pytest.approx(2 + 2 * profile.prefill_s(4096))
    assert allowed_s[1] == pytest.approx(2 + 2 * profile.prefill_s(8192, 4096))


def test_a_run_tells_of_every_request_and_repeats_itself() -> None:
    once, again = (runs.play(small(), 0) for _ in range(2))
    figures = once.figures()
    assert figures == again.figures()
    assert (figures["requests"], figures["lost"], figures["failed"]) == (40, 0, 0)
    assert 0 < figures["within_slo"] <= 1
    assert once.in_time.sum() == figures["within_slo"] * 40
    assert np.all(once.tpot_s > 0)


@pytest.mark.parametrize("process", ["poisson", "on_off"])
def test_a_workload_at_another_rate_keeps_its_shape(process: str) -> None:
    ((_, found),) = runs.parts("claim-bursts-on-off" if process == "on_off" else "one-t")
    arrivals: Any = runs.at_rate(found, 2.0).workload
    if process == "poisson":
        assert arrivals.arrivals.rate_rps == 2.0
    else:
        assert (arrivals.arrivals.on_rps + arrivals.arrivals.off_rps) / 2 == pytest.approx(2.0)
        assert arrivals.arrivals.on_rps / arrivals.arrivals.off_rps == pytest.approx(3.25)


def test_arrivals_are_stretched_to_the_mean_rate() -> None:
    requests = [TimedRequest(i, 5.0 + i * i, 100, 10) for i in range(10)]
    found = bursts.at_mean_rate(requests, 2.0)
    assert found[0].arrival_s == 0
    assert found[-1].arrival_s == pytest.approx(10 / 2.0)
    assert [one.index for one in found] == list(range(10))


def capacity_record() -> dict[str, Any]:
    rates = dict(zip(capacity.K_SYSTEMS, (1.0, 2.1, 2.4, 3.2, 3.3, 3.4), strict=True))
    rows = []
    for system, rate_rps in rates.items():
        for repetition in range(2):
            base = {"system": system, "repetition": repetition, "completion_rps": rate_rps + repetition / 100,
                    "offloaded_share": 0.5, "egress_gbps": 12.0, "ttft_mean_s": 2.0, "ttft_p90_s": 4.0,
                    "tpot_p90_s": 0.025}  # fmt: skip
            rows.append({**base, "mode": "saturated"})
            rows.append({**base, "mode": "slo", "rate_rps": rate_rps * 0.9})
            rows.append({**base, "mode": "common", "rate_rps": 1.2})
    one = {"throughput_rps": 2.1}
    plan = {"throughput_rps": 3.2, "offloaded_share": 0.49, "egress_gbps": 11.9, "homogeneous": one,
            "naive": {"throughput_rps": 2.5}, "collocated": {"throughput_rps": 1.4}}  # fmt: skip
    return record("capacity", rows) | {"plan": plan}


def record(piece: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"piece": piece, "commit": "0" * 40, "started": "2026-01-01T00:00:00Z", "took_s": 1.0,
            "repetitions": 2, "machine": {"cores": 2}, "rows": rows}  # fmt: skip


def bursts_record(ours: float) -> dict[str, Any]:
    shares = {"paper": 0.5, "paper-deadline": 0.6, "prices-arrival": 0.6, "prices": ours, "clairvoyant": 1.0}
    rows = [
        {"part": "gamma", "load": load, "policy": name, "repetition": repetition, "within_slo": share}
        for load in bursts.K_LOADS
        for name, share in shares.items()
        for repetition in range(2)
    ]
    plan = {"capacity_rps": 3.2, "threshold_tokens": 2e4, "prefill": 3, "decode": 5, "offloaded_share": 0.5}
    return record("bursts", rows) | {"plans": {"gamma": plan}}


def test_some_workloads_can_be_measured_anew(tmp_path: Path) -> None:
    before = bursts_record(0.9)
    for row in list(before["rows"]):
        before["rows"].append({**row, "part": "code"})
    before["plans"]["code"] = before["plans"]["gamma"]
    fresh = {**bursts_record(0.7), "commit": "1" * 40}
    joined = pieces.partly(fresh, before)
    assert list(joined["plans"]) == ["gamma", "code"]
    assert joined["older"] == {"code": {"commit": "0" * 40, "started": "2026-01-01T00:00:00Z"}}
    shown = {
        part: {
            row["within_slo"] for row in joined["rows"] if (row["part"], row["policy"]) == (part, "prices")
        }
        for part in ("gamma", "code")
    }
    assert shown == {"gamma": {0.7}, "code": {0.9}}
    pieces.write(joined, tmp_path)
    path, _ = write_report(tmp_path)
    assert "Parts of it are of other commits: code `000000000000`," in path.read_text()
    # Of a part that was kept before, the commit is still its own; of one that is measured now, none.
    third = pieces.partly({**fresh, "plans": {"new": {}}, "rows": [{"part": "new"}]}, joined)
    assert (third["older"]["code"]["commit"], third["older"]["gamma"]["commit"]) == ("0" * 40, "1" * 40)
    assert pieces.partly(fresh, {**third, "plans": {"gamma": {}}})["older"] == {}
    with pytest.raises(UsageError, match="bursts has no nonsense; there are: gamma, on-off"):
        bursts.measure_some(1, lambda line: None, ["nonsense"])
    with pytest.raises(UsageError, match="links is measured whole"):
        pieces.measure("links", 1, lambda line: None, ["flaps"])


def bandwidth_record(ours_rps: float) -> dict[str, Any]:
    step = {
        "step": 0,
        "gbps": 10.0,
        "for_s": 100.0,
        "planned_rps": 2.8,
        "optimum_rps": 3.0,
        "optimum_prefill": 4,
    }
    rates = {
        "paper": 2.0,
        "best threshold": 2.5,
        "prices-arrival": ours_rps,
        "prices": 2.6,
        "best split": 3.0,
    }
    steps = [step, {**step, "step": 1, "planned_rps": 0.7}]
    rows = [
        {"step": place, "gbps": 10.0, "policy": name, "repetition": repetition, "first_tokens_rps": rate,
         "first_tokens": 1100, "ttft_p90_s": 9.0, "lost": 0, "failed": 0}
        for place in (0, 1) for name, rate in rates.items() for repetition in range(2)
    ]  # fmt: skip
    return record("bandwidth", rows) | {"steps": steps}


def test_the_report_is_made_of_the_records_alone_and_says_what_was_missed(tmp_path: Path) -> None:
    for made in (capacity_record(), bursts_record(0.9), bandwidth_record(2.5)):
        pieces.write(made, tmp_path)
    path, goals = write_report(tmp_path)
    assert all(goal.reached for goal in goals), [goal for goal in goals if not goal.reached]
    text = path.read_text()
    assert f"{len(goals)} of {len(goals)} goals are reached" in text
    assert text.index("## Does the 1.54 hold?") < text.index("## Goals")
    assert "- reached ([The 1T case at capacity](#the-1t-case-at-capacity)): the published ratio 1.54" in text
    for name in ("capacity", "bursts", "bandwidth"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
        assert f"figures/{name}.png" in text
    for made in (bursts_record(0.7), bandwidth_record(2.3)):
        pieces.write(made, tmp_path)
    _, goals = write_report(tmp_path)
    missed = [goal.text for goal in goals if not goal.reached]
    assert len(missed) == 2
    shown = path.read_text().partition("goals are reached:")[2].splitlines()
    assert [line.startswith("- **missed**") for line in shown[2:5]] == [True, True, False]
    assert "at least 60 %" in missed[0]
    assert "0.95 of the best threshold" in missed[1]


def test_the_answer_is_no_where_the_ratio_is_off_and_none_where_nothing_was_measured() -> None:
    found = capacity_record()
    records = {"capacity": found, "bandwidth": bandwidth_record(2.5)}
    assert "**Yes, as a throughput.**" in answer(records)
    assert f"it is {3.0 / found['plan']['homogeneous']['throughput_rps']:.2f} at 10 Gbit/s" in answer(records)
    assert "On the testbed" not in answer(records)
    for row in found["rows"]:
        if row["system"] == "paper":
            row["completion_rps"] *= 0.9
    assert "**No.**" in answer(records)
    assert answer({"bandwidth": bandwidth_record(2.5)}) == ""


def test_a_policy_below_the_reports_is_told(tmp_path: Path) -> None:
    goals = bursts.goals(bursts_record(0.45))
    assert [goal.reached for goal in goals] == [False, False]
    assert "-5.0%" in goals[1].found


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = bursts_record(0.123456789)
    path = pieces.write(made, tmp_path)
    found = pieces.read(path)
    assert found["rows"][-3]["within_slo"] in (0.123457, 0.6, 1.0)
    assert len(found["rows"]) == len(made["rows"])
    assert len(path.read_text().splitlines()) > len(made["rows"])
    (tmp_path / "bad.json").write_text(json.dumps({"piece": "none"}))
    with pytest.raises(UsageError, match="not a record"):
        pieces.read(tmp_path / "bad.json")
    with pytest.raises(UsageError, match="no record"):
        write_report(tmp_path / "empty")
    with pytest.raises(UsageError, match="no piece"):
        pieces.piece("nothing")


def test_a_folder_that_cant_be_written_to_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written to"):
        pieces.check_folder(tmp_path / "file" / "claim")
    pieces.check_folder(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_record_that_cant_be_written_is_one_error_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    (tmp_path / "links.json").mkdir()
    with pytest.raises(MachineError, match=r"links\.json"):
        pieces.write({"piece": "links", "rows": []}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["links.json"]


def test_the_steps_know_their_plans_and_their_requests_come_in_order() -> None:
    ((_, experiment),) = runs.parts("claim-bandwidth")
    step = {"step": 2, "gbps": 5.0, "before_gbps": 10.0, "before_rps": 2.0, "planned_rps": 1.0, "for_s": 50.0}
    requests = bandwidth._requests(experiment, step, 0)
    arrivals = [one.arrival_s for one in requests]
    assert arrivals == sorted(arrivals)
    assert [one.index for one in requests] == list(range(len(requests)))
    assert arrivals[0] < bandwidth.K_BEFORE_S < arrivals[-1] < bandwidth.K_BEFORE_S + 50
    down = bandwidth._timeline({**step, "gbps": 0.0})[1]
    assert down.set.down
