"""A sweep that is interrupted ends at once, with all of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


def test_an_interrupted_sweep_leaves_no_process(tmp_path: Path) -> None:
    path = tmp_path / "endless.yaml"
    path.write_text(yaml.safe_dump(K_FILE))
    command = [
        sys.executable, "-m", "prfaas.cli.main", "simulate", str(path), "--workers", "2",
        "--out", str(tmp_path / "out"), "--sweep", "workload.requests=5,50000000,50000000",
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
            os.killpg(process.pid, signal.SIGINT)
            _, error = process.communicate(timeout=K_PATIENCE_S)
            assert process.returncode == 130
            assert "interrupted" in error
            assert "Traceback" not in error
            end_s = time.monotonic() + K_PATIENCE_S
            while alive(process.pid) and time.monotonic() < end_s:
                time.sleep(0.05)
            assert alive(process.pid) == []
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    assert not (tmp_path / "out").exists()
