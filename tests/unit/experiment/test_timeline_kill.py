"""A killed pump comes back: by the timeline, or by a server that missed it sooner."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prfaas.config.experiment import Kill
from prfaas.model.errors import PrfaasError
from prfaas_testbed.experiment import timeline as module
from prfaas_testbed.experiment.timeline import Timeline


class Pump:
    """Like a Program whose port another process has."""

    pid = os.getpid()

    def kill(self) -> None: ...

    def start(self) -> None: ...

    def wait_ready(self, progress: Any) -> None:
        raise PrfaasError("pump-west ended with 3: listen: Address already in use")


def rows_of_a_kill(control: Path, **how: Any) -> tuple[list[Any], set[str]]:
    fleet: Any = SimpleNamespace(
        named=lambda name: SimpleNamespace(site="west", process=Pump()),
        pumps={"west": Pump()},
        given_up=set(),
        control_socket=lambda site: control,
    )
    event = Kill.model_validate(
        {"do": "kill", "at_s": 0, "instance": "decode", "what": "pump", "restart_after_s": 0.05, **how}
    )
    timeline = Timeline([event], SimpleNamespace(), fleet)  # type: ignore[arg-type]
    timeline.start(time.monotonic())
    timeline._thread.join()
    return timeline.finish(), fleet.given_up


def test_a_pump_that_a_server_brought_back_first_is_back(tmp_path: Path) -> None:
    control = tmp_path / "pump.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as there:
        there.bind(str(control))
        there.listen()
        rows, given_up = rows_of_a_kill(control)
    end = rows[-1].model_dump()
    assert (end["event"], end["by"]) == ("kill_end", "a server that missed it")
    assert not end.get("failed")
    assert given_up == {"west"}


def test_a_pump_that_nobody_brings_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "K_OTHER_PUMP_S", 0.2)
    rows, given_up = rows_of_a_kill(tmp_path / "nobody.sock")
    assert "Address already in use" in rows[-1].model_dump()["failed"]
    assert given_up == set()


K_LISTEN = (
    "import socket, sys, time\n"
    "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n"
    "print('listening', flush=True); time.sleep(60)\n"
)


def test_the_pump_that_a_server_started_is_the_one_that_is_killed_the_next_time(tmp_path: Path) -> None:
    control = tmp_path / "pump.sock"
    words = [sys.executable, "-c", K_LISTEN, str(control)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "listening\n"
        rows, _ = rows_of_a_kill(control, restart_after_s=None)
        assert other.wait(5) == -signal.SIGKILL
    assert [row.model_dump()["signal"] for row in rows] == ["SIGKILL"]
