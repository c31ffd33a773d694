"""A folder on a small disk of its own, so that filling it harms nobody else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from prfaas.model.errors import MachineError

K_DISK_BYTES = 256 << 20
K_SOURCE = "prfaas-testbed"  # as mountinfo names it: what else is mounted there isn't ours
K_FULL = "nothing-left"
_PIECE = b"\0" * (1 << 20)


def mount_disk(folder: Path) -> None:
    """`folder`, made if missing, becomes a disk of 256 MiB, in place of what it held. Sites that are made
    later see it. Raises MachineError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _checked(["mount", "-t", "tmpfs", "-o", f"size={K_DISK_BYTES}", K_SOURCE, str(folder)])


def is_disk(folder: Path) -> bool:
    found = subprocess.run(
        ["findmnt", "--noheadings", "--output", "SOURCE", "--mountpoint", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return K_SOURCE in found.stdout.split()


def kept_of(folder: Path) -> Path:
    """Where a disk's files wait until it is gone."""
    return folder.with_name(f"{folder.name}.kept")


def give_back_disk(folder: Path) -> None:
    """The disk goes, what was written stays in `folder`; goes on where it was cut off before.

    Raises MachineError where there is no room for the files: the disk and all on it stay as they are.
    """
    kept = kept_of(folder)
    if is_disk(folder):
        empty_disk(folder)
        # What is there already is of a copy that didn't end.
        shutil.rmtree(kept, ignore_errors=True)
        try:
            kept.mkdir()
            _checked(["cp", "-a", f"{folder}/.", str(kept)])
        except (MachineError, OSError) as error:
            shutil.rmtree(kept, ignore_errors=True)
            raise MachineError(
                f"{folder} is still the small disk of a run: its files couldn't be copied ({error}). Make "
                "room, then `prfaas-testbed clean`"
            ) from None
        # Lazily: a server that is still ending may have its log open.
        _checked(["umount", "-l", str(folder)])
    if kept.exists():
        if folder.is_mount():
            raise MachineError(f"{folder}: something else is mounted there; unmount it, then clean again")
        # What lay under the disk is of an attempt before.
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)


def fill_disk(folder: Path) -> int:
    """Write until nothing more fits; how many bytes that took. Raises MachineError where `folder` has no
    small disk of its own.
    """
    if not is_disk(folder):
        raise MachineError(f"{folder} has no disk of its own: it isn't filled")
    written = 0
    with (folder / K_FULL).open("wb", buffering=0) as out:
        piece = _PIECE
        while piece:
            try:
                written += out.write(piece)
            except OSError:
                # The last bytes in ever smaller pieces: a log line is short.
                piece = piece[: len(piece) // 2]
    return written


def empty_disk(folder: Path) -> None:
    (folder / K_FULL).unlink(missing_ok=True)


def _checked(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [str(done.returncode)]
        raise MachineError(f"{argv[0]} failed: {said[0]}")
