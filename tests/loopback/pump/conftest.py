"""Real pumps, each a process of its own, and clients in this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from prfaas.config.pump import PumpConfig
from prfaas.pump.server import Pump
from prfaas.pump_client import LocalPumpClient
from prfaas.pump_client.launch import connect

K_NURSERY = """
import os, signal, sys
from prfaas.pump.__main__ import main
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    config, log = line.split()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for fd in (1, 2):
            os.dup2(out, fd)
        os.close(0)
        status = 70
        try:
            status = main(["--config", config])
        finally:
            os._exit(status)
    print(pid, flush=True)
"""


class Nursery:
    """Forks pumps from a process that has imported all they need: each is ready in milliseconds."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", K_NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, config: Path, log: Path) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{config} {log}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> None:
        with self._process as process:
            assert process.stdin
            process.stdin.close()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.end()


class Pumps:
    """Starts pumps and clients, and ends them all."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self.folder, self._nursery = folder, nursery
        self._pids: dict[str, int] = {}
        self._clients: list[LocalPumpClient] = []
        self._arrays: list[np.ndarray] = []

    def config(self, name: str, **fields: object) -> PumpConfig:
        return PumpConfig.model_validate(
            {"site": name, "control_socket": self.folder / f"{name}.sock", **fields}
        )

    def start(self, name: str, **fields: object) -> PumpConfig:
        """A pump of site `name`, ready to serve."""
        config = self.config(name, **fields)
        file = self.folder / f"{name}.yaml"
        file.write_text(config.model_dump_json(exclude_none=True))
        self._pids[name] = self._nursery.start(file, self.folder / f"{name}.log")
        for _ in range(1000):
            sock = connect(config.control_path)
            if sock is not None:
                sock.close()
                return config
            assert alive(self._pids[name]), self.log(name)
            time.sleep(0.02)
        raise AssertionError(f"the pump {name} didn't start")

    @contextmanager
    def here(self, name: str, **fields: object) -> Iterator[Pump]:
        """A pump of site `name` in this process, for a test that looks into it."""
        pump = Pump(self.config(name, **fields))
        thread = threading.Thread(target=pump.run)
        thread.start()
        try:
            yield pump
        finally:
            pump.stop()
            thread.join()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def pid(self, name: str) -> int:
        return self._pids[name]

    def kill(self, name: str) -> None:
        pid = self._pids.pop(name)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid))

    def client(self, config: PumpConfig, **fields: object) -> LocalPumpClient:
        client = LocalPumpClient.open(config, start=bool(fields.get("start", False)))
        self._clients.append(client)
        return client

    @staticmethod
    def until(condition: Callable[[], bool]) -> None:
        wait_for(condition)

    def memory(self, client: LocalPumpClient, size_bytes: int, fill: int | None = None) -> np.ndarray:
        """Registered memory: random, or all `fill`."""
        array = np.random.default_rng(size_bytes).integers(0, 256, size_bytes, dtype=np.uint8)
        if fill is not None:
            array[:] = fill
        client.register([(array.ctypes.data, size_bytes)])
        self._arrays.append(array)
        return array

    def end(self) -> None:
        for client in self._clients:
            client.close()
        for pid in self._pids.values():
            if alive(pid):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGTERM)
        for pid in self._pids.values():
            wait_for(lambda pid=pid: not alive(pid))


@pytest.fixture
def pumps(tmp_path: Path, nursery: Nursery) -> Iterator[Pumps]:
    pumps = Pumps(tmp_path, nursery)
    yield pumps
    pumps.end()


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> Iterator[tuple[Pumps, LocalPumpClient, LocalPumpClient]]:
    """Two sites that last for a module: (pumps, client in the east, client in the west)."""
    pumps = Pumps(tmp_path_factory.mktemp("pair"), nursery)
    east, west = pumps.start("east"), pumps.start("west")
    yield pumps, pumps.client(east), pumps.client(west)
    pumps.end()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
