"""A set's record grows part by part, and an interrupted set goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from prfaas.config.experiment import Experiment, ExperimentSet, load_experiment, parts_of
from prfaas.config.run import CheckRow, EventRow, RequestRow, read_run, write_run
from prfaas.model.errors import MachineError, PrfaasError, UsageError
from prfaas_testbed.cli.main import main
from prfaas_testbed.cli.run import with_parts
from prfaas_testbed.experiment.checks import exit_status, judge
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.place import DiskFull
from prfaas_testbed.experiment.runner import CalibrationMissed, Results
from prfaas_testbed.experiment.sets import SetRun, by_machine, joined_order

K_PARTS = "metro-flap,metro-cut,two-sites-cut"  # in the file's order


class Conductor:
    """Says which parts were run, and fails those it is told to."""

    def __init__(self, failing: dict[str, BaseException] | None = None) -> None:
        self.ran: list[str] = []
        self.failing = failing or {}

    def __call__(self, name: str, experiment: Experiment, results: Results) -> None:
        self.ran.append(name)
        if name in self.failing:
            raise self.failing[name]
        row = {"id": "r0", "model": "toy", "prompt_tokens": 1, "run": len(self.ran)}
        results.repetition(0).requests.append(RequestRow.model_validate(row))
        results.repetition(0).events.append(EventRow(at_s=0.0, event="load"))


def a_set(folder: Path, parts: str = K_PARTS, resume: bool = False, again: Sequence[str] = ()) -> SetRun:
    matrix = load_experiment("matrix", K_TOPOLOGIES)
    assert isinstance(matrix, ExperimentSet)
    chosen = with_parts(matrix, parts)
    found = SetRun(chosen, list(parts_of(chosen, K_TOPOLOGIES)), folder, lambda line: None, again)
    if resume:
        found.resume()
    return found


def test_a_record_holds_every_part_that_ended_even_when_the_run_was_interrupted(tmp_path: Path) -> None:
    interrupted = Conductor({"metro-cut": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        a_set(tmp_path).go(interrupted)
    record = read_run(tmp_path)
    assert record.parts == ["metro-flap"]
    missing = {row.name: row.reason for row in judge(record) if row.name.endswith("/ran")}
    assert missing == {"metro-cut/ran": "not run yet", "two-sites-cut/ran": "not run yet"}
    again = Conductor()
    a_set(tmp_path, resume=True).go(again)
    assert again.ran == ["metro-cut", "two-sites-cut"]
    record = read_run(tmp_path)
    assert record.parts == ["metro-flap", "metro-cut", "two-sites-cut"]
    assert len(record.repetitions) == 1
    assert [row.model_extra["part"] for row in record.repetitions[0].requests] == record.parts  # type: ignore[index]


def test_what_the_machine_stopped_runs_again_and_what_the_system_failed_stands(tmp_path: Path) -> None:
    first = Conductor(
        {
            "metro-flap": MachineError("too busy"),
            "metro-cut": PrfaasError("a server died"),
            "two-sites-cut": CalibrationMissed("rate"),
        }
    )
    a_set(tmp_path).go(first)
    assert first.ran == ["metro-flap", "metro-cut", "two-sites-cut"]
    again = Conductor()
    a_set(tmp_path, resume=True).go(again)
    assert again.ran == ["metro-flap", "two-sites-cut"]
    extra = read_run(tmp_path).model_extra
    assert extra is not None
    assert extra["stopped_parts"] == {"metro-cut": "a server died"}
    (before,) = extra["part_runs"]["metro-flap"]["attempts_before"]
    assert before["stopped"] == "too busy"
    assert {"started", "commit", "machine", "wall_s"} <= extra["part_runs"]["metro-flap"].keys()


def test_a_fault_of_the_testbed_s_own_stops_one_part_which_runs_again(tmp_path: Path) -> None:
    first = Conductor({"metro-flap": ValueError("a torn line")})
    record = a_set(tmp_path).go(first)
    assert first.ran == K_PARTS.split(",")
    extra = record.model_extra or {}
    assert extra["stopped_parts"] == {"metro-flap": "ValueError: a torn line"}
    again = Conductor()
    a_set(tmp_path, resume=True).go(again)
    assert again.ran == ["metro-flap"]


def test_a_part_whose_definition_changed_runs_again_and_its_old_rows_go(tmp_path: Path) -> None:
    a_set(tmp_path).go(Conductor())
    record = read_run(tmp_path)
    record.definition["parts"]["metro-cut"]["seed"] = 7
    write_run(record, tmp_path)
    again = Conductor()
    a_set(tmp_path, resume=True).go(again)
    assert again.ran == ["metro-cut"]
    rows = read_run(tmp_path).repetitions[0].requests
    assert sorted(str(row.model_extra["part"]) for row in rows) == sorted(K_PARTS.split(","))  # type: ignore[index]


def test_more_time_runs_again_only_what_was_stopped(tmp_path: Path) -> None:
    a_set(tmp_path).go(Conductor({"metro-flap": PrfaasError("it has taken its declared time")}))
    record = read_run(tmp_path)
    for part in K_PARTS.split(","):
        record.definition["parts"][part]["wall_time_s"] = 1.0
    write_run(record, tmp_path)
    again = Conductor()
    a_set(tmp_path, resume=True).go(again)
    assert again.ran == ["metro-flap"]


def test_rows_stay_where_the_machine_lets_the_next_attempt_give_none(tmp_path: Path) -> None:
    a_set(tmp_path).go(Conductor())
    record = read_run(tmp_path)
    for part in record.parts:
        record.definition["parts"][part]["description"] = "as it was told before"
    write_run(record, tmp_path)
    busy = Conductor(dict.fromkeys(K_PARTS.split(","), MachineError("another run holds the network")))
    kept = a_set(tmp_path, resume=True)
    kept.go(busy)
    record = read_run(tmp_path)
    assert len(record.repetitions[0].requests) == 3
    extra = record.model_extra or {}
    assert extra["stopped_parts"] == {}
    assert all(run["attempts_before"][0]["stopped"] for run in extra["part_runs"].values())
    assert kept.stopped_now == K_PARTS.split(",")
    again = Conductor()
    a_set(tmp_path, resume=True).go(again)
    assert again.ran == K_PARTS.split(",")


def test_a_part_that_ended_runs_anew_when_it_is_asked_for_and_the_record_says_so(tmp_path: Path) -> None:
    a_set(tmp_path).go(Conductor({"metro-cut": PrfaasError("a fault of ours")}))
    again = Conductor()
    a_set(tmp_path, resume=True, again=["*-cut"]).go(again)
    assert again.ran == ["metro-cut", "two-sites-cut"]
    extra = read_run(tmp_path).model_extra or {}
    assert extra["stopped_parts"] == {}
    assert extra["part_runs"]["metro-cut"]["attempts_before"][0]["stopped"] == "a fault of ours"


def test_no_part_begins_when_the_time_is_over_and_more_parts_may_join_later(tmp_path: Path) -> None:
    first = Conductor()
    with pytest.raises(UsageError, match="nothing was run"):
        a_set(tmp_path).go(first, budget_s=-1)
    assert first.ran == []
    a_set(tmp_path, "metro-flap").go(first)
    again = Conductor()
    whole = a_set(tmp_path, "metro-flap,two-sites-cut", resume=True)
    whole.go(again)
    assert again.ran == ["two-sites-cut"]
    assert read_run(tmp_path).parts == ["metro-flap", "two-sites-cut"]


def test_a_part_runs_again_when_a_file_that_it_names_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_set(tmp_path).go(Conductor())
    again = Conductor()
    a_set(tmp_path, resume=True).go(again)
    assert again.ran == []
    record = read_run(tmp_path)
    own = (record.model_extra or {})["part_runs"]
    assert sorted(own["two-sites-cut"]["inputs"]) == ["networks/two-sites.yaml", "profiles/toy.yaml"]
    own["two-sites-cut"]["inputs"]["networks/two-sites.yaml"] = "another"
    own["metro-cut"]["inputs"]["profiles/toy-dense.yaml"] = "another"
    write_run(record, tmp_path)
    said: list[str] = []
    whole = a_set(tmp_path, resume=True)
    monkeypatch.setattr(whole, "_tell", said.append)
    whole.go(again)
    assert again.ran == ["metro-cut", "two-sites-cut"]
    assert any("what it reads has changed: profiles/toy-dense.yaml" in line for line in said)


def test_a_record_that_names_no_files_is_held_against_the_network_it_holds(tmp_path: Path) -> None:
    a_set(tmp_path).go(Conductor())
    record = read_run(tmp_path)
    for own in (record.model_extra or {})["part_runs"].values():
        del own["inputs"]
    (record.model_extra or {})["part_runs"]["two-sites-cut"]["topology"]["links"][0]["delay_ms"] = 7
    write_run(record, tmp_path)
    again = Conductor()
    a_set(tmp_path, resume=True).go(again)
    assert again.ran == ["two-sites-cut"]


def test_the_machine_s_fault_ends_with_3_and_a_failed_check_beside_it_with_1(tmp_path: Path) -> None:
    parts = "metro-flap,metro-cut"
    a_set(tmp_path, parts).go(Conductor({"metro-cut": MachineError("a port is taken")}))
    record = read_run(tmp_path)
    rows = [row for row in judge(record) if row.name.startswith("metro-cut/")]
    assert {row.name for row in rows if row.outcome == "failed"} >= {"metro-cut/ran"}
    good = CheckRow(name="metro-flap/lost", outcome="passed", value=0, wanted="<= 0")
    bad = CheckRow(name="metro-flap/lost", outcome="failed", value=1, wanted="<= 0")
    assert exit_status([good, *rows], record) == 3
    assert exit_status([bad, *rows], record) == 1
    missed = tmp_path / "missed"
    a_set(missed, parts).go(Conductor({"metro-cut": CalibrationMissed("rate")}))
    record = read_run(missed)
    rows = [row for row in judge(record) if row.name.startswith("metro-cut/")]
    assert exit_status([good, *rows], record) == 1


def test_parts_that_wait_for_another_time_don_t_hide_that_the_machine_stopped_one(tmp_path: Path) -> None:
    busy = Conductor({"metro-flap": MachineError("too busy"), "metro-cut": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        a_set(tmp_path, "metro-flap,metro-cut").go(busy)
    record = read_run(tmp_path)
    assert record.parts == ["metro-flap"]
    assert exit_status(judge(record), record) == 3


def test_a_full_disk_ends_the_set_and_keeps_what_was_measured(tmp_path: Path) -> None:
    full = Conductor({"metro-cut": DiskFull("the disk is full")})
    with pytest.raises(DiskFull):
        a_set(tmp_path).go(full)
    assert full.ran == ["metro-flap", "metro-cut"]
    record = read_run(tmp_path)
    assert len(record.repetitions[0].requests) == 1
    assert (record.model_extra or {})["part_runs"]["metro-cut"]["stopped_by"] == "machine"
    again = Conductor()
    a_set(tmp_path, resume=True).go(again)
    assert again.ran == ["metro-cut", "two-sites-cut"]


def test_another_run_can_t_be_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run"):
        a_set(tmp_path, resume=True)
    a_set(tmp_path).go(Conductor())
    record = read_run(tmp_path)
    record.experiment = "other"
    write_run(record, tmp_path)
    with pytest.raises(UsageError, match="holds a run of other"):
        a_set(tmp_path, resume=True)


def test_resume_is_for_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "hello", "--resume", str(tmp_path)]) == 2
    assert "hello is a single experiment" in capsys.readouterr().err


def test_a_missed_calibration_is_the_machine_s_fault_and_a_dead_server_isn_t() -> None:
    assert by_machine(CalibrationMissed("rate"))
    assert by_machine(MachineError("a port is taken"))
    assert not by_machine(PrfaasError("a server died"))


@pytest.mark.parametrize(
    ("known", "order", "joined"),
    [
        ("abcdef", "be", "abcdef"),  # some parts of a run anew
        ("ad", "abcd", "abcd"),
        ("ad", "bc", "bcad"),  # the file's place of neither is told
        ("ad", "abc", "abcd"),
        ("fedcba", "abcdef", "abcdef"),
        ("axd", "abd", "abxd"),  # x is no longer in the file
    ],
)
def test_parts_keep_the_file_s_order_whatever_was_run_when(known: str, order: str, joined: str) -> None:
    assert "".join(joined_order(known, order)) == joined


def test_some_parts_that_run_anew_do_not_come_first_for_it(tmp_path: Path) -> None:
    a_set(tmp_path).go(Conductor())
    a_set(tmp_path, "metro-cut,two-sites-cut", resume=True, again=["two-sites-cut"]).go(Conductor())
    record = read_run(tmp_path)
    assert record.parts == K_PARTS.split(",")
    assert (record.model_extra or {})["parts_planned"] == K_PARTS.split(",")
