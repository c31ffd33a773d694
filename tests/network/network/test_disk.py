"""A run's small disk is given back without losing a file, whatever comes between."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from prfaas.model.errors import MachineError
from prfaas_testbed.network.disk import fill_disk, give_back_disk, is_disk, kept_of, mount_disk

K_BIG_BYTES = 6 << 20


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 4 MiB."""
    place = tmp_path / "narrow"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "somebody", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-R", str(place)], check=True)


def test_where_its_files_have_no_room_the_disk_stays_and_later_goes_with_all_of_them(narrow: Path) -> None:
    folder = narrow / "work"
    mount_disk(folder)
    (folder / "digests").mkdir()
    (folder / "digests" / "rows").write_bytes(b"x" * K_BIG_BYTES)
    with pytest.raises(MachineError, match=r"No space left.*Make room"):
        give_back_disk(folder)
    assert is_disk(folder)
    assert (folder / "digests" / "rows").stat().st_size == K_BIG_BYTES
    assert not kept_of(folder).exists()
    subprocess.run(["mount", "-o", "remount,size=16M", str(narrow)], check=True)
    give_back_disk(folder)
    assert not folder.is_mount()
    assert (folder / "digests" / "rows").read_bytes() == b"x" * K_BIG_BYTES


def test_what_was_cut_off_after_the_disk_had_gone_is_done_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    kept_of(folder).mkdir()
    (kept_of(folder) / "log").write_text("all of it")
    give_back_disk(folder)
    assert (folder / "log").read_text() == "all of it"
    assert not kept_of(folder).exists()


def test_a_copy_that_was_cut_off_is_made_again_and_nothing_of_the_filling_stays(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    mount_disk(folder)
    (folder / "log").write_text("all of it")
    kept_of(folder).mkdir()
    (kept_of(folder) / "log").write_text("all o")
    fill_disk(folder)
    give_back_disk(folder)
    assert not folder.is_mount()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"log": "all of it"}


def test_somebody_elses_mount_is_no_disk_of_ours_and_stays(narrow: Path) -> None:
    (narrow / "theirs").write_text("theirs")
    assert not is_disk(narrow)
    with pytest.raises(MachineError, match="no disk of its own"):
        fill_disk(narrow)
    kept_of(narrow).mkdir()
    with pytest.raises(MachineError, match="something else is mounted"):
        give_back_disk(narrow)
    assert (narrow / "theirs").read_text() == "theirs"
