import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prfaas_testbed.network.state import K_TMP_PREFIX, Record, boot_id, clean_up, start_ticks


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_cleaning_ends_recorded_processes_and_removes_folders(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    state, folder = tmp_path / "state.json", tmp_path / f"{K_TMP_PREFIX}x"
    folder.mkdir()
    record = Record(state)
    record.process(sleeper.pid)
    record.folder(folder)
    done = clean_up(state)
    assert sleeper.wait(timeout=10) == -9
    assert not folder.exists()
    assert not state.exists()
    assert len(done) == 2


def test_a_process_id_that_was_reused_is_left_alone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    state = tmp_path / "state.json"
    Record(state).process(sleeper.pid)
    data = json.loads(state.read_text())
    data["processes"][0]["start_ticks"] -= 1
    state.write_text(json.dumps(data))
    assert clean_up(state) == []
    assert sleeper.poll() is None


def test_after_a_restart_of_the_machine_only_folders_are_left_to_remove(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    state, folder = tmp_path / "state.json", tmp_path / f"{K_TMP_PREFIX}y"
    folder.mkdir()
    record = Record(state)
    record.process(sleeper.pid)
    record.folder(folder)
    data = json.loads(state.read_text())
    data["boot_id"] = "another"
    state.write_text(json.dumps(data))
    assert clean_up(state) == [f"folder {folder}"]
    assert sleeper.poll() is None


def test_a_folder_that_is_not_ours_by_name_is_never_removed(tmp_path: Path) -> None:
    state, folder = tmp_path / "state.json", tmp_path / "precious"
    folder.mkdir()
    Record(state).folder(folder)
    assert clean_up(state) == []
    assert folder.exists()


def test_nothing_recorded_is_nothing_to_clean_and_rubbish_is_removed(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    assert clean_up(state) == []
    state.write_text("{half")
    assert "not readable" in clean_up(state)[0]
    assert not state.exists()


def test_a_process_that_is_gone_has_no_start(sleeper: subprocess.Popen[bytes]) -> None:
    assert start_ticks(sleeper.pid) is not None
    sleeper.kill()
    sleeper.wait()
    assert start_ticks(sleeper.pid) is None
    assert len(boot_id()) == 36
