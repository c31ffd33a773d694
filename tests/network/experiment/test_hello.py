"""The first experiment whole: emulated link, pumps, profiled instances, judging; and its end by Ctrl-C, and
by a disk that fills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from prfaas.config.run import read_run
from prfaas_testbed.experiment.place import K_RESERVE_BYTES, K_WORK_BYTES

RUN = [sys.executable, "-m", "prfaas_testbed.cli.main", "run"]
WAIT = ["--wait", "60"]
K_SPARE_BYTES = 4_000_000
# Filled when the first request of the repetition is written down; what is there at the end is copied out.
K_SCRIPT = """
mount -t tmpfs -o size={size} none {disk} || exit 99
{run} &
run=$!
until find {disk} -name rep0-0.answers.jsonl | grep -q .; do
    kill -0 $run 2>/dev/null || break
    sleep 0.1
done
dd if=/dev/zero of={disk}/other bs=65536 >/dev/null 2>&1
dd if=/dev/zero of={disk}/rest bs=1 >/dev/null 2>&1
wait $run
status=$?
cp {disk}/hello-small/*/run.json {kept}
exit $status
"""


@pytest.fixture
def small_hello(hello: Callable[[Path], dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: object) -> Path:
        data = hello(tmp_path)
        data["workload"]["requests"] = 6
        path = tmp_path / "hello-small.yaml"
        path.write_text(yaml.safe_dump({**data, "name": "hello-small", **changes}))
        return path

    return make


def results(folder: Path) -> Path:
    (found,) = (folder / "hello-small").iterdir()
    return found


def test_hello_passes_every_check_that_does_not_time_anything_and_nothing_crosses_in_the_clear(
    tmp_path: Path, hello: Callable[[Path], dict[str, Any]], small_hello: Callable[..., Path]
) -> None:
    """And a repetition finds nothing of the one before in any cache."""
    checks = [*hello(tmp_path)["checks"], {"name": "outside_pumps_bytes", "at_most": 0}]
    path = small_hello(transfer={"http_by_pump": True}, checks=checks, repetitions=2)
    done = subprocess.run(
        [*RUN, str(path), "--out", str(tmp_path), "--json", *WAIT],
        capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr  # 1: checks that time something, on a busy machine
    outcomes = {row["name"]: row["outcome"] for row in json.loads(done.stdout)}
    assert outcomes["tokens_equal_share"] == "passed", done.stderr
    assert outcomes["digests_equal_share"] == "passed"
    assert outcomes["sites_isolated"] == "passed"
    assert outcomes["bytes_gap_share"] == "passed"
    assert outcomes["outside_pumps_bytes"] == "passed"
    run = read_run(results(tmp_path))
    assert run.emulation in ("native", "appliance")
    assert [len(one.requests) for one in run.repetitions] == [6, 6]
    assert len(run.baseline) == 6
    assert not any(row.cached_tokens for one in run.repetitions for row in one.requests)
    assert all(row.kv_bytes for row in run.repetitions[0].requests)
    assert {row.link for row in run.repetitions[0].links} == {"east->west", "west->east"}
    assert (results(tmp_path) / "index.html").exists()


def test_ctrl_c_ends_with_130_and_leaves_nothing(tmp_path: Path, small_hello: Callable[..., Path]) -> None:
    process = subprocess.Popen(
        [*RUN, str(small_hello()), "--out", str(tmp_path), *WAIT],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "calibrating" in line:
                break
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130, said
    assert said.strip().splitlines()[-1] == "prfaas-testbed: interrupted"
    assert "Traceback" not in said
    assert not list(Path("/run/netns").glob("prfaas-*"))
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    assert left == ""


def test_a_disk_that_fills_ends_the_run_with_3_and_keeps_what_was_measured(
    tmp_path: Path, small_hello: Callable[..., Path]
) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    experiment = small_hello(repetitions=2)
    words = " ".join([*RUN, str(experiment), "--out", str(disk), *WAIT])
    size = K_RESERVE_BYTES + K_WORK_BYTES + K_SPARE_BYTES
    script = K_SCRIPT.format(size=size, disk=disk, run=words, kept=kept)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=170
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "the disk is full" in done.stderr.strip().splitlines()[-1]
    assert sum("the disk is full" in line for line in done.stderr.splitlines()) == 1
    run = read_run(kept)
    assert len(run.baseline) == 6
    assert {row.direction for row in run.calibration} == {"east->west", "west->east"}
    assert not list(Path("/run/netns").glob("prfaas-*"))


def test_a_site_that_the_network_lacks_is_told_before_anything_starts(
    tmp_path: Path, small_hello: Callable[..., Path]
) -> None:
    path = small_hello(baseline={"site": "mars"})
    done = subprocess.run(
        [*RUN, str(path), "--out", str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "baseline.site: found 'mars'; sites: east, west" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "hello-small").exists()
