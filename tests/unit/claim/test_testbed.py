"""The claim on the testbed: a run's rows beside the same requests simulated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prfaas.config.experiment import Experiment
from prfaas.config.run import Run, write_run
from prfaas.model.errors import UsageError
from prfaas_testbed.claim import pieces, runs, testbed, worlds
from prfaas_testbed.claim.gathering import unbelieved
from prfaas_testbed.claim.report import write_report

K_RECORD = Path(__file__).parents[3] / "results" / "claim"
K_PARTS = ("homogeneous-1.2", "paper-1.2")


def short() -> dict[str, Experiment]:
    """A half of the load: these tests are about what is made of it."""
    return {
        part: one.model_copy(update={"workload": one.workload.model_copy(update={"duration_s": 30})})
        for part, one in runs.parts(testbed.K_EXPERIMENT)
    }


def run_of(stretch: float, names: tuple[str, ...] = K_PARTS) -> Run:
    """A testbed's record whose answers are the simulator's, with first tokens `stretch` times as late."""
    rows, costs, part_runs, definitions = [], [], {}, {}
    for part, experiment in short().items():
        if part in names:
            played = worlds.simulated(experiment, worlds.requests_of_testbed(experiment))
            for place in range(len(played)):
                one = {name: float(values[place]) for name, values in played.columns.items()}
                rows.append(
                    {"part": part, "id": f"r{place}", "model": "m",
                     "prompt_tokens": int(one["prompt_tokens"]), "sent_s": one["sent_s"] + 0.001,
                     "lateness_s": 0.001, "ttft_s": one["ttft_s"] * stretch,
                     "e2e_s": one["e2e_s"], "site": played.sites[place], "kv_bytes": one["wan_bytes"] / 500,
                     "transfer": "wan" if one["wan_bytes"] else "local"}
                )  # fmt: skip
            costs.append({"at_s": 9.0, "event": "cost", "part": part, "name": "router", "role": "router",
                          "cpu_s": 2.0, "wall_s": 10.0})  # fmt: skip
            definitions[part] = experiment.model_dump(mode="json", exclude_defaults=True)
            part_runs[part] = {"commit": "0" * 40, "started": "2026-01-01T00:00:00Z", "wall_s": 60.0}
    for row in rows:
        row["kv_bytes"] = round(row["kv_bytes"])
    return Run.model_validate(
        {"experiment": testbed.K_EXPERIMENT, "commit": "0" * 40, "started": "2026-01-01T00:00:00Z",
         "versions": {}, "machine": {"cores": 2}, "emulation": "appliance", "scale": 500,
         "parts": list(names), "part_runs": part_runs, "definition": {"parts": definitions},
         "repetitions": [{"index": 0, "requests": rows, "events": costs}]}
    )  # fmt: skip


def test_equal_answers_agree_and_later_ones_do_not(tmp_path: Path) -> None:
    write_run(run_of(1.0), tmp_path / "same")
    write_run(run_of(1.2), tmp_path / "late")
    same = pieces.gather("testbed", [tmp_path / "same"], lambda line: None)
    agree = [goal for goal in testbed.goals(same) if "agree" in goal.text]
    assert len(agree) == len(testbed.K_COMPARED)
    assert all(goal.reached for goal in agree), agree
    # What is added later stands in place of what was there.
    late = pieces.gather("testbed", [tmp_path / "same", tmp_path / "late"], lambda line: None)
    missed = [goal.text for goal in testbed.goals(late) if "agree" in goal.text and not goal.reached]
    assert [text.rpartition(" TTFT")[1] for text in missed] == [" TTFT"] * 3
    row = next(row for row in late["rows"] if row["part"] == "paper-1.2" and row["world"] == "testbed")
    assert row["cores"]["router"] == pytest.approx(0.2)
    assert (row["failed"], row["time_scale"]) == (0, 2.0)


def test_parts_of_older_code_are_told() -> None:
    old, new = {"part": "a", "started": "2026-11-24T18:15:52+00:00"}, {"part": "b", "started": "2026-11-25"}
    assert unbelieved([new]) == ""
    assert "it had sent them itself: a. In the other parts" in unbelieved([old, new])
    assert unbelieved([old]).endswith("itself: a.\n\n")


def test_its_section_is_made_of_the_record_alone(tmp_path: Path) -> None:
    write_run(run_of(1.05), tmp_path / "run")
    pieces.write(pieces.gather("testbed", [tmp_path / "run"], lambda line: None), tmp_path)
    path, goals = write_report(tmp_path)
    text = path.read_text()
    assert (tmp_path / "figures" / "testbed.png").stat().st_size > 10_000
    assert "claim add testbed FOLDER" in text
    assert "| paper-1.2 | 20 |" in text
    assert "**Not run yet**: two-sites-0.9, two-sites-1.2, paper-0.9, prices-0.9" in text
    assert "Each part ran once" in text
    assert "Not measured yet: The 1T case at capacity (`prfaas-testbed claim run capacity`)" in text
    ratio = next(goal.found for goal in goals if "published ratio 1.54" in goal.text)
    assert 1.3 < float(ratio.split()[0]) < 1.7


def test_what_a_later_run_has_no_part_of_can_be_kept(tmp_path: Path) -> None:
    write_run(run_of(1.0), tmp_path / "both")
    write_run(run_of(1.2, K_PARTS[1:]), tmp_path / "one")
    before = pieces.gather("testbed", [tmp_path / "both"], lambda line: None)
    fresh = pieces.gather("testbed", [tmp_path / "one"], lambda line: None)
    whole = pieces.kept(fresh, before)
    assert {run["part"] for run in whole["runs"]} == set(K_PARTS)
    each = 1 + testbed.K_SIMULATED
    assert [row["part"] for row in whole["rows"]] == [part for part in K_PARTS for _ in range(each)]
    assert whole["rows"][each:] == fresh["rows"]
    with pytest.raises(UsageError, match="no parts to keep"):
        pieces.kept({"piece": "x", "rows": [{"a": 1}], "runs": []}, before)


def test_requests_are_sent_some_milliseconds_late_another_way_each_time_and_stay_the_same() -> None:
    requests = worlds.requests_of_testbed(short()[K_PARTS[0]])
    assert worlds.sent_late(requests, 0) == requests
    first, again, other = (worlds.sent_late(requests, index) for index in (1, 1, 2))
    assert first == again != other
    assert [one.arrival_s for one in first] == sorted(one.arrival_s for one in first)
    by_index = {one.index: one for one in first}
    assert len(by_index) == len(requests)
    for one in requests:
        late = by_index[one.index]
        assert 0 <= late.arrival_s - one.arrival_s <= worlds.K_LATE_S
        assert replace(late, arrival_s=one.arrival_s) == one


def test_most_of_the_testbed_s_requests_are_sent_as_late_as_the_simulator_takes_them_to_be() -> None:
    rows = json.loads((K_RECORD / "testbed.json").read_text())["rows"]
    planned = {
        row["part"]: row["requests_rows"]["sent_s"]
        for row in rows
        if row["world"] == "simulator" and row["repetition"] == 0  # the one that is on time
    }
    late_s = np.concatenate(
        [
            np.subtract(row["requests_rows"]["sent_s"], planned[row["part"]])
            for row in rows
            if row["world"] == "testbed" and "requests_rows" in row
        ]
    )
    assert late_s.size > 1000
    assert late_s.min() >= 0
    assert 0.8 < np.mean(late_s <= worlds.K_LATE_S) < 0.95
    assert worlds.K_LATE_S / 6 < np.median(late_s) < worlds.K_LATE_S * 5 / 6


def test_the_simulator_s_side_is_made_anew_where_the_file_still_draws_the_same_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(run_of(1.2), tmp_path / "run")
    fresh = pieces.gather("testbed", [tmp_path / "run"], lambda line: None)
    old = {**fresh, "commit": "old"}
    old["rows"] = [
        {**row, "ttft_p50_s": 99.0} if row["world"] == "simulator" else row for row in fresh["rows"]
    ]
    said: list[str] = []
    # The file's own loads are longer than the run's: other requests.
    assert pieces.resimulated(old, said.append)["rows"] == old["rows"]
    assert all("other requests by now" in line for line in said)
    monkeypatch.setattr(testbed, "parts", lambda name: list(short().items()))
    again = pieces.resimulated(old, said.append)
    assert again["rows"] == fresh["rows"]
    assert (again["commit"], again["runs"]) != ("old", [])
    with pytest.raises(UsageError, match="doesn't hold runs against the simulator"):
        pieces.resimulated({"piece": "memory", "world": "loopback"}, said.append)


def test_columns_come_back_as_they_were_written() -> None:
    (_, experiment), *_ = [one for one in runs.parts(testbed.K_EXPERIMENT) if one[0] == "two-sites-0.9"]
    requests = worlds.requests_of_testbed(experiment)[:30]
    assert not any(one.block_ids for one in requests)  # its prompts are independent
    played = worlds.simulated(experiment, requests)
    again = worlds.Played.of_plain(played.plain())
    assert again.sites == played.sites
    assert np.allclose(again["ttft_s"], played["ttft_s"], atol=1e-4)
    found: Any = again.figures(np.full(30, 1e9))
    assert (found["requests"], found["within_slo"], found["offloaded_share"]) == (30, 1.0, 1.0)


def test_only_the_piece_s_own_runs_are_taken(tmp_path: Path) -> None:
    other = run_of(1.0, K_PARTS[:1]).model_copy(update={"experiment": "hello"})
    write_run(other, tmp_path)
    with pytest.raises(UsageError, match="a run of hello"):
        pieces.gather("testbed", [tmp_path], lambda line: None)
    with pytest.raises(UsageError, match="isn't made of runs"):
        pieces.gather("links", [tmp_path], lambda line: None)
    with pytest.raises(UsageError, match="claim add testbed"):
        pieces.measure("testbed", 1, lambda line: None)
