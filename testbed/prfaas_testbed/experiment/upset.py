"""What a machine can suffer besides its network and its processes: a disk that is full, a clock that is
stepped.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prfaas.model.errors import MachineError

K_DISK_BYTES = 256 << 20
K_FULL = "nothing-left"
K_SOURCE = Path(__file__).with_name("clock.c")
K_CLOCK = "PRFAAS_TESTBED_CLOCK"
_PIECE = b"\0" * (1 << 20)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """`folder` on a disk of its own, of 256 MiB, so that filling it harms nobody else; what was written stays
    in `folder` afterwards. Sites see it if they are made inside. Raises MachineError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _checked(["mount", "-t", "tmpfs", "-o", f"size={K_DISK_BYTES}", "tmpfs", str(folder)])
    kept = folder.with_name(f"{folder.name}.kept")
    try:
        yield
    finally:
        empty_disk(folder)
        try:
            shutil.copytree(folder, kept, dirs_exist_ok=True)
        finally:
            # Lazily: a server that is still ending may have its log open.
            _checked(["umount", "-l", str(folder)])
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        shutil.rmtree(kept)


def fill_disk(folder: Path) -> int:
    """Write until nothing more fits; how many bytes that took. Raises MachineError where `folder` has no
    small disk of its own.
    """
    if not os.path.ismount(folder):
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


class Clocks:
    """The time of day of each site's programs, which are started with `environment`."""

    def __init__(self, folder: Path) -> None:
        """Raises MachineError without a C compiler."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._library = folder / "clock.so"
        compiler = shutil.which("cc")
        if compiler is None:
            raise MachineError("stepping a clock takes a C compiler, `cc`: install gcc")
        _checked([compiler, "-O2", "-shared", "-fPIC", "-o", str(self._library), str(K_SOURCE), "-ldl"])

    def environment(self, site: str) -> dict[str, str]:
        """What to set for a program of the site."""
        path = self._path(site)
        if not path.exists():
            self.step(site, 0)
        before = os.environ.get("LD_PRELOAD", "")
        preloaded = f"{self._library}:{before}" if before else str(self._library)
        return {"LD_PRELOAD": preloaded, K_CLOCK: str(path)}

    def step(self, site: str, seconds: int) -> None:
        """From now on this much later than it is."""
        fd = os.open(self._path(site), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, struct.pack("=q", seconds), 0)
        finally:
            os.close(fd)

    def _path(self, site: str) -> Path:
        return self._folder / f"clock-{site}"


def _checked(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"{argv[0]} failed: {done.stderr.strip() or done.returncode}")
