"""A real server outlives nobody: who was killed by -9 leaves none behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

K_PATIENCE_S = 20.0
K_STARTS = """
import sys, time
from pathlib import Path
from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import ServerSpec, SglangServer
model, port, log = sys.argv[1:]
server = SglangServer(ServerSpec("plain", K_MODELS["dense"], Path(model), "127.0.0.1", int(port)), Path(log))
server.start()
print(server.pid, flush=True)
server.wait_ready()
print("ready", flush=True)
time.sleep(600)
"""


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def test_a_server_and_all_below_it_end_when_what_started_it_is_killed(start_own: Any, tmp_path: Path) -> None:
    spec = start_own.spec("dense", tmp_path / "spec")
    words = [sys.executable, "-c", K_STARTS, str(spec.model_dir), str(spec.port), str(tmp_path / "log")]
    starter = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    top = psutil.Process(int(starter.stdout.readline()))
    tree = [top]
    try:
        assert starter.stdout.readline() == "ready\n"
        tree += top.children(recursive=True)
        assert len(tree) > 2
        starter.kill()
        end_s = time.monotonic() + K_PATIENCE_S
        while running(tree) and time.monotonic() < end_s:
            time.sleep(0.1)
        assert running(tree) == []
    finally:
        starter.kill()
        starter.communicate()
        for process in running(tree):
            process.kill()
