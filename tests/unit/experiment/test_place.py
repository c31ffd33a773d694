"""A run's folder: one writer, and room for the record where the disk fills."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prfaas_testbed.experiment.place as place_module
from prfaas.config.run import Run, read_run
from prfaas.model.errors import MachineError, PrfaasError, UsageError
from prfaas_testbed.experiment.place import DiskFull, own

K_HOLD = """
import sys
from pathlib import Path
from prfaas_testbed.experiment.place import own
with own(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def a_run(name: str = "t") -> Run:
    return Run(experiment=name, commit="c", started="s", versions={}, machine={}, emulation="native")


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_second_to_write_to_a_folder_is_told_who_does(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", K_HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(MachineError, match=f"another run, process {first.pid}, is writing to"),
            own(tmp_path),
        ):
            pytest.fail("two runs write to one folder")
        first.kill()
    with own(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_that_nothing_came_of_are_gone_and_one_with_a_record_or_there_before_stays(
    tmp_path: Path,
) -> None:
    with pytest.raises(PrfaasError, match="nothing was run"), own(tmp_path / "a" / "b"):
        raise PrfaasError("nothing was run")
    assert not (tmp_path / "a").exists()
    (tmp_path / "d").mkdir()
    with pytest.raises(PrfaasError, match="nothing was run"), own(tmp_path / "d" / "b"):
        raise PrfaasError("nothing was run")
    assert (tmp_path / "d").exists()
    with own(tmp_path / "c") as place:
        place.keep(a_run())
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["run.json"]


def test_a_folder_that_can_t_be_made_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be made: Not a directory"), own(tmp_path / "file" / "run"):
        pass


def test_a_disk_with_too_little_room_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place_module, "K_WORK_BYTES", 1 << 60)
    with pytest.raises(DiskFull, match="MB are free on its disk, a run needs"), own(tmp_path / "run"):
        pytest.fail("it began")
    assert not (tmp_path / "run").exists()


def test_a_record_that_no_longer_fits_is_written_to_what_was_held_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own(tmp_path) as place:
        written = place_module.write_run

        def once(run: Run, folder: Path) -> Path:
            monkeypatch.setattr(place_module, "write_run", written)
            refuse()
            raise AssertionError

        monkeypatch.setattr(place_module, "write_run", once)
        with pytest.raises(DiskFull, match="what was measured is in"):
            place.keep(a_run("kept"))
    assert read_run(tmp_path).experiment == "kept"


def test_where_not_even_that_is_enough_the_former_record_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own(tmp_path) as place:
        place.keep(a_run("former"))
        monkeypatch.setattr(place_module, "write_run", refuse)
        with pytest.raises(DiskFull, match="couldn't be written"):
            place.keep(a_run("new"))
    assert read_run(tmp_path).experiment == "former"


def test_what_fails_on_a_full_disk_fails_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own(tmp_path) as place:
        with pytest.raises(DiskFull), place.watched():
            refuse()
        with pytest.raises(PrfaasError, match="a server died") as seen, place.watched():
            raise PrfaasError("a server died")
        assert not isinstance(seen.value, DiskFull)
        monkeypatch.setattr(place_module, "is_full", lambda folder: True)
        with pytest.raises(DiskFull), place.watched():
            raise PrfaasError("a server died")
