"""What a machine can suffer besides its network, its disk and its processes: a clock that is stepped."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

from prfaas.model.errors import MachineError

K_SOURCE = Path(__file__).with_name("clock.c")
K_CLOCK = "PRFAAS_TESTBED_CLOCK"


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
