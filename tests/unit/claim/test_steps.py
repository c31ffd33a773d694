"""Bandwidth steps on the testbed: judged beyond the grace, against the best fixed threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prfaas.config.experiment import Experiment
from prfaas.config.run import Run, write_run
from prfaas_testbed.claim import pieces, runs, steps, worlds


def short(part: str) -> Experiment:
    """A quarter of the load: these tests are about what is made of it."""
    whole = dict(runs.parts(steps.K_EXPERIMENT))[part]
    return whole.model_copy(update={"workload": whole.workload.model_copy(update={"duration_s": 60})})


def run_of(part: str, share: float) -> Run:
    """A testbed's record of one step: what the simulator answered, a share of it with an error."""
    experiment = short(part)
    played = worlds.simulated(experiment, worlds.requests_of_testbed(experiment))
    kept = np.arange(len(played)) * share % 1 < share
    rows = [
        {"part": part, "id": f"r{i}", "model": "m", "site": played.sites[i],
         "prompt_tokens": int(played["prompt_tokens"][i]),
         "sent_s": played["sent_s"][i], "ttft_s": played["ttft_s"][i], "e2e_s": played["e2e_s"][i],
         "error": None if kept[i] else "lost"}
        for i in range(len(played))
    ]  # fmt: skip
    return Run.model_validate(
        {"experiment": steps.K_EXPERIMENT, "commit": "0" * 40, "started": "2026-01-01T00:00:00Z",
         "versions": {}, "machine": {"cores": 2}, "emulation": "appliance", "scale": 500, "parts": [part],
         "definition": {"parts": {part: experiment.model_dump(mode="json", exclude_defaults=True)}},
         "repetitions": [{"index": 0, "requests": rows}],
         "part_runs": {part: {"commit": "0" * 40, "started": "2026", "wall_s": 60.0}}}
    )  # fmt: skip


def test_a_step_is_judged_against_the_best_threshold_and_the_simulator(tmp_path: Path) -> None:
    write_run(run_of("5", 1.0), tmp_path)
    data = pieces.gather("steps", [tmp_path], lambda line: None)
    assert [row["world"] for row in data["rows"]] == ["testbed", "simulator", steps.K_BEST]
    assert data["rows"][0]["planned_rps"] == pytest.approx(1.77, abs=0.02)
    carried, alike, enough, kept = steps.goals(data)
    # A minute is too short to say more of the policy itself.
    assert 0.8 < float(carried.found.rpartition(" ")[2]) < 1.2
    assert carried.reached == (float(carried.found.rpartition(" ")[2]) >= 0.95)
    assert (alike.reached, enough.reached, kept.reached) == (True, False, True)
    assert steps._rate(data["rows"][0]).count == steps.K_BATCHES
    assert "| 5 Gbit/s, testbed | 1.77 |" in steps.tell(data)
    assert steps.draw(data, tmp_path / "figures") == ["steps.png"]


def test_what_is_lost_carries_nothing(tmp_path: Path) -> None:
    write_run(run_of("5", 0.7), tmp_path)
    data = pieces.gather("steps", [tmp_path], lambda line: None)
    assert [goal.reached for goal in steps.goals(data)] == [False, False, False, False]


def test_the_simulators_side_can_be_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(run_of("5", 1.0), tmp_path)
    data = pieces.gather("steps", [tmp_path], lambda line: None)
    old = {**data, "rows": [data["rows"][0], *({**row, "requests_rows": {}} for row in data["rows"][1:])]}
    said: list[str] = []
    # The file's own load is longer than the run's: other requests.
    assert steps.resimulated(old, said.append)["rows"] == old["rows"]
    assert "5 Gbit/s: the file has other requests by now" in said[0]
    monkeypatch.setattr(steps, "parts", lambda name: [("5", short("5"))])
    assert steps.resimulated(old, said.append)["rows"] == data["rows"]


def test_the_best_threshold_is_the_testbeds_own_where_it_ran_and_plays_the_same_requests(
    tmp_path: Path,
) -> None:
    folders = []
    for part, share in (("5", 1.0), ("5-best", 0.5)):
        folders.append(tmp_path / part)
        write_run(run_of(part, share), folders[-1])
    data = pieces.gather("steps", folders, lambda line: None)
    assert [row["world"] for row in data["rows"]] == [
        "testbed", "simulator", steps.K_BEST, steps.K_BEST_REAL
    ]  # fmt: skip
    real, _, _, best = (row["requests_rows"] for row in data["rows"])
    assert real["prompt_tokens"] == best["prompt_tokens"]
    # Half of what the threshold had is taken away here, so ours carries twice as much as is left.
    carried, *_, kept = steps.goals(data)
    assert float(carried.found.rpartition(" ")[2]) > 1.5
    assert not kept.reached
    assert "| 5 Gbit/s, best threshold, testbed | 1.77 |" in steps.tell(data)


def test_the_file_has_each_step_by_the_threshold_that_its_plan_says() -> None:
    played = dict(runs.parts(steps.K_EXPERIMENT))
    for part in ("10", "5"):
        best, ours = played[part + steps.K_BEST_PART], played[part]
        _, told = steps._label(part, ours)
        assert best.router is not None
        assert best.router.policy.threshold_tokens == pytest.approx(told.threshold_tokens, abs=0.1)
        assert (best.workload, best.timeline) == (ours.workload, ours.timeline)
