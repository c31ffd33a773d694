"""`prfaas-testbed run` around the running itself: one writer a folder, a record in every case, its status."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import prfaas_testbed.cli.run as run_module
import prfaas_testbed.network.opening as opening
from prfaas.config.run import CalibrationRow, EventRow, RequestRow, read_run
from prfaas.model.errors import MachineError, PrfaasError
from prfaas_testbed.cli.main import main
from prfaas_testbed.experiment.place import DiskFull, own
from prfaas_testbed.experiment.runner import Results


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What the next runs end with, in order; one that isn't told to fail fills its results."""
    errors: list[BaseException] = []

    class Fake:
        def __init__(self, experiment: Any, topology: Any, folder: Path, results: Results, *_: Any) -> None:
            self.results = results

        def run(self) -> None:
            row = {
                "link": "east<->west", "direction": "east->west", "wanted_rtt_ms": 20, "measured_rtt_ms": 20,
                "wanted_rate_mbps": 100, "measured_rate_mbps": 100, "wanted_loss": 0, "measured_loss": 0,
                "inside": True,
            }  # fmt: skip
            self.results.calibration.append(CalibrationRow.model_validate(row))
            one = {"id": "r0", "model": "toy", "prompt_tokens": 1, "ttft_s": 0.1, "e2e_s": 0.2}
            self.results.repetition(0).requests.append(RequestRow.model_validate(one))
            self.results.repetition(0).events.append(EventRow(at_s=0.0, event="load"))
            if errors:
                raise errors.pop(0)

    monkeypatch.setattr(run_module, "Runner", Fake)
    monkeypatch.setattr(opening, "check_machine", lambda: None)
    monkeypatch.setattr(run_module, "draw", lambda folder: None)
    return errors


def only(folder: Path) -> Path:
    (found,) = (folder / "hello").iterdir()
    return found


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (PrfaasError("a server died"), 1, "a server died"),
        (MachineError("machine too busy"), 3, "machine too busy"),
        (OSError(28, "No space left on device"), 3, "the disk is full"),
    ],
)
def test_a_run_that_is_stopped_says_why_once_and_keeps_what_it_has(
    failing: list[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    error: BaseException, status: int, said: str,
) -> None:  # fmt: skip
    failing.append(error)
    assert main(["run", "hello", "--out", str(tmp_path)]) == status
    err = capsys.readouterr().err
    assert said in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    record = read_run(only(tmp_path))
    assert len(record.repetitions[0].requests) == 1
    assert said in (record.model_extra or {})["stopped"]
    assert [path.name for path in only(tmp_path).iterdir()] == ["run.json"]


@pytest.mark.parametrize("experiment", ["hello", "matrix"])
def test_what_the_machine_lacks_is_said_once_before_anything_is_made(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["run", experiment, "--out", str(tmp_path / "out")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs root" in line
    assert not (tmp_path / "out").exists()


def test_a_set_is_gone_on_with_by_one_run_at_a_time(
    failing: list[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with own(tmp_path):
        assert main(["run", "matrix", "--parts", "metro-cut", "--resume", str(tmp_path)]) == 3
    assert "is writing to" in capsys.readouterr().err


def test_a_record_that_can_t_be_written_at_all_is_told_once(
    failing: list[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(*_: object) -> None:
        raise DiskFull("the disk is full: the record couldn't be written")

    monkeypatch.setattr("prfaas_testbed.experiment.place.Place.keep", refuse)
    assert main(["run", "hello", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("the record couldn't be written")


def test_a_dry_run_says_what_would_run_and_leaves_nothing(
    failing: list[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "hello", "--out", str(tmp_path / "out"), "--dry-run", "--repetitions", "3"]) == 0
    said = capsys.readouterr().out
    assert "3 times, toy on 2 servers, hello (2 sites, 2 links)" in said
    assert "nothing was started" in said
    assert not (tmp_path / "out").exists()
    assert main(["run", "hello", "--dry-run"]) == 0
    declared_s = float(capsys.readouterr().out.split(" s at most")[0].split()[-1])
    assert f"; {3 * declared_s:g} s at most" in said, "more repetitions have more time"
    assert main(["run", "matrix", "--parts", "metro-*", "--dry-run"]) == 0
    assert "metro at 1/200 (2 sites" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "calibrate", "likeness", "overlap", "refusal"])
@pytest.mark.parametrize("text", ["nan", "-1", "inf", "soon"])
def test_a_wait_that_is_no_time_is_bad_usage(
    command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, f"--wait={text}"])
    assert ended.value.code == 2
    assert (
        f"argument --wait/--wait-s: found '{text}'; 0 to 86400 seconds are allowed" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("experiment", "needs"), [("two-sites", "all"), ("hello", "network"), ("matrix", "network")]
)
def test_it_says_what_set_up_an_experiment_needs(
    experiment: str, needs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang's gigabytes are for experiments with real servers."""
    assert main(["run", experiment, "--needs"]) == 0
    assert capsys.readouterr().out == f"{needs}\n"


def test_an_empty_place_for_results_is_not_the_folder_that_one_stands_in(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "hello", "--out="])
    assert ended.value.code == 2
    assert "--out: found nothing" in capsys.readouterr().err
