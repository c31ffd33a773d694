"""A sweep that is interrupted, or loses a process, ends at once, with all of its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

K_PATIENCE_S = 60.0

K_FILE = {
    "name": "endless",
    "description": "two runs, of which one is soon through and the other is not",
    "wall_time_s": 100,
    "network": "hundred-gig",
    "models": [{"name": "m", "profile": "1t-hybrid-h20"}],
    "instances": [
        {"name": "far", "site": "east", "role": "prefill", "count": 9, "profile": "1t-hybrid-h200"},
        {"name": "decode", "site": "west", "role": "decode", "count": 9},
    ],
    "router": {"site": "west", "policy": {"name": "naive"}},
    "workload": {
        "kind": "synthetic",
        "arrivals": {"process": "poisson", "rate_rps": 1},
        "input_tokens": 2000,
        "output_tokens": 50,
        "requests": 5,
    },
}


def alive(group: int) -> list[int]:
    """Processes of the group that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def sweep(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A sweep on two processes, after its first run: one other will take hours, and so does the next."""
    path = folder / "endless.yaml"
    path.write_text(yaml.safe_dump(K_FILE))
    command = [
        sys.executable, "-m", "prfaas.cli.main", "simulate", str(path), "--workers", "2",
        "--out", str(folder / "out"), "--sweep", "workload.requests=5,50000000,50000000",
    ]  # fmt: skip
    # A shell in the background may have told its children to ignore what this test is about.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    ) as process:
        try:
            assert process.stdout is not None
            assert "5 requests" in process.stdout.readline()
            yield process
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def ends(process: subprocess.Popen[str], folder: Path) -> str:
    """What it says last; nothing of it is left."""
    _, error = process.communicate(timeout=K_PATIENCE_S)
    assert "Traceback" not in error
    end_s = time.monotonic() + K_PATIENCE_S
    while alive(process.pid) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert alive(process.pid) == []
    assert list((folder / "out").iterdir()) == []
    return error


def test_an_interrupted_sweep_leaves_no_process(tmp_path: Path) -> None:
    with sweep(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)
        assert "interrupted" in ends(process, tmp_path)
        assert process.returncode == 130


def test_a_sweep_whose_process_was_killed_says_so_instead_of_waiting_for_ever(tmp_path: Path) -> None:
    with sweep(tmp_path) as process:
        workers = [p for p in alive(process.pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        assert "ended from outside" in ends(process, tmp_path)
        assert process.returncode == 1


def test_a_sweep_that_was_killed_leaves_no_process(tmp_path: Path) -> None:
    with sweep(tmp_path) as process:
        assert len(alive(process.pid)) > 2
        process.kill()
        process.wait(K_PATIENCE_S)
        ends(process, tmp_path)
