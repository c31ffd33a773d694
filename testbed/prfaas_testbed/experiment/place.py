"""A run's folder while it runs: nobody else writes there, and its record has room even where the disk fills.

Servers and captures write beside the record. When they have filled the disk, what was measured until then is
still to be kept: so a run holds back some space from the start, and gives it up for its record.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prfaas.config.run import Run, write_run
from prfaas.model.errors import MachineError, PrfaasError, UsageError

K_RESERVE_BYTES = 24_000_000  # a record with its rows outside is a few MB
K_WORK_BYTES = 24_000_000  # logs, prompts and answers of a small run
K_FULL_BYTES = 65_536  # less than this is none: files take whole pages
K_RESERVE = ".room-for-the-record"
K_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(MachineError):
    """No space is left where the run writes."""


def is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < K_FULL_BYTES


def require_space(folder: Path) -> None:
    """Raises DiskFull: what was just done may have failed for that, whatever else it says."""
    if is_full(folder):
        raise DiskFull(f"the disk is full: nothing more can be written to {folder}")


class Place:
    """Made by `own`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reserve: int | None = None

    def keep(self, run: Run) -> None:
        """Write the record. Raises DiskFull: with what was held back it is written all the same, or, where
        even that is too little, the former one stays."""
        try:
            write_run(run, self.folder)
            return
        except OSError as error:
            if error.errno not in K_FULL_ERRORS:
                raise
        self.give_up()
        try:
            write_run(run, self.folder)
        except OSError as error:
            if error.errno not in K_FULL_ERRORS:
                raise
            raise DiskFull(f"the disk is full: the record in {self.folder} couldn't be written") from None
        raise DiskFull(f"the disk is full: what was measured is in {self.folder}, and nothing more fits")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Whatever fails inside on a full disk fails for that."""
        try:
            yield
        except DiskFull:
            raise
        except (PrfaasError, OSError) as error:
            if (isinstance(error, OSError) and error.errno in K_FULL_ERRORS) or is_full(self.folder):
                raise DiskFull(f"the disk is full: nothing more can be written to {self.folder}") from error
            raise

    def hold_back(self) -> None:
        """Raises DiskFull where there is too little for a run."""
        free = shutil.disk_usage(self.folder).free
        wanted = K_RESERVE_BYTES + K_WORK_BYTES
        if free < wanted:
            raise DiskFull(
                f"{self.folder}: {free / 1e6:.0f} MB are free on its disk, a run needs {wanted / 1e6:.0f} MB"
            )
        # Without a name: it is gone with this process, however that ends.
        path = self.folder / K_RESERVE
        self._reserve = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        path.unlink()
        try:
            os.posix_fallocate(self._reserve, 0, K_RESERVE_BYTES)
        except OSError as error:
            # A file system that can't hold space back: the run goes on without.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def give_up(self) -> None:
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None


@contextmanager
def own(folder: Path) -> Iterator[Place]:
    """The folder, made if missing, for this process alone. Raises MachineError where another run writes there
    or the disk has no room, UsageError where it can't be made."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in K_FULL_ERRORS:
            raise DiskFull(f"{folder} can't be made: {error.strerror}") from None
        raise UsageError(f"{folder} can't be made: {error.strerror}") from None
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    place = Place(folder)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(
                f"another run{_holder(fd)} is writing to {folder}: wait for it, or end it"
            ) from None
        try:
            place.hold_back()
            yield place
        finally:
            place.give_up()
            # Where nothing came of it: rmdir leaves what isn't empty.
            with suppress(OSError):
                for one in made:
                    one.rmdir()
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    """Which process holds the lock of an open folder, by the kernel's list; empty where that doesn't say."""
    here = os.fstat(fd)
    exact = f"{os.major(here.st_dev):02x}:{os.minor(here.st_dev):02x}:{here.st_ino}"
    alike = ""
    with suppress(OSError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            # "1: FLOCK  ADVISORY  WRITE 4711 fe:00:123456 0 EOF"; a waiter's line has "->" in it
            words = line.split()
            if words[1] != "FLOCK":
                continue
            if words[5] == exact:
                return f", process {words[4]},"
            # Layered file systems list another device than they tell.
            if words[5].rpartition(":")[2] == str(here.st_ino):
                alike = f", process {words[4]},"
    return alike
