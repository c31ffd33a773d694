"""Nothing is left after success, failure, Ctrl-C or kill -9, and nothing is touched that we did not make."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prfaas.config.topology import Topology, load_topology
from prfaas.model.errors import MachineError
from prfaas_testbed.network import open_network
from prfaas_testbed.network.disk import K_DISK_BYTES, empty_disk, fill_disk
from prfaas_testbed.network.state import in_namespace, start_ticks, state_file

_RUN = """
import sys, time
from pathlib import Path
from prfaas.config.topology import load_topology
from prfaas_testbed.network import open_network
small = Path(sys.argv[1], "small")
with open_network(load_topology("hello"), sys.argv[1], wait_s=120, disks=[small]) as net:
    script = "exec > /dev/null 2>&1; trap '' TERM; sleep 600 & wait; sleep 600"  # lets go of our pipes
    server = net.sites["east"].popen(["sh", "-c", script])
    sys.stdout.write(f"{server.pid}\\n"); sys.stdout.flush()
    while True:
        time.sleep(0.1)  # a signal that comes just before a sleep is seen after it
"""


@contextmanager
def running(workdir: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, workdir], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def clean() -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("prfaas-testbed"), "clean"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_success_leaves_nothing_and_ends_what_ran_in_the_sites(
    small: Topology, wait_s: float, tmp_path: Path, left: Callable[[], list[str]]
) -> None:
    before = left()
    with open_network(small, tmp_path, wait_s=wait_s) as net:
        server = net.sites["east"].popen(["sh", "-c", "trap '' TERM; sleep 600 & wait; sleep 600"])
        began = time.monotonic()
    assert time.monotonic() - began < 30
    assert server.wait(timeout=10) < 0
    assert left() == before
    assert not state_file().exists()


def test_what_a_site_writes_on_a_small_disk_stays_and_the_disk_goes(
    small: Topology, wait_s: float, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    with open_network(small, tmp_path, wait_s=wait_s, disks=[folder]) as net:
        assert folder.is_mount()
        filled_bytes = fill_disk(folder)
        assert K_DISK_BYTES // 2 < filled_bytes <= K_DISK_BYTES
        writer = ["dd", "if=/dev/zero", f"of={folder}/log", "bs=1", "count=1"]
        full = net.sites["east"].popen(writer, stderr=subprocess.PIPE)
        assert b"No space left" in full.communicate(timeout=30)[1]
        empty_disk(folder)
        net.sites["east"].run(["sh", "-c", f"echo yes > {folder}/log"])
    assert not folder.is_mount()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"log": "yes\n"}


def test_a_failure_inside_leaves_nothing(
    small: Topology, wait_s: float, tmp_path: Path, left: Callable[[], list[str]]
) -> None:
    before = left()
    with pytest.raises(ZeroDivisionError), open_network(small, tmp_path, wait_s=wait_s):
        raise ZeroDivisionError
    assert left() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: int, tmp_path: Path, left: Callable[[], list[str]]) -> None:
    before = left()
    with running(tmp_path) as (process, server):
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert "KeyboardInterrupt" in err
    assert start_ticks(server) is None
    assert left() == before


def test_after_kill_9_clean_removes_all_of_it_and_only_that(
    tmp_path: Path, left: Callable[[], list[str]]
) -> None:
    before, small = left(), tmp_path / "small"
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        with running(tmp_path) as (process, server):
            process.kill()
            process.communicate()
            assert start_ticks(server) is not None
            assert server in in_namespace("prfaas-east")
            (small / "log").write_text("its last words")
            assert fill_disk(small) > 0
        done = clean()
        assert done.returncode == 0
        assert "namespace prfaas-east" in done.stderr
        assert start_ticks(server) is None
        assert f"disk {small}" in done.stderr
        assert not small.is_mount()
        assert {path.name: path.read_text() for path in small.iterdir()} == {"log": "its last words"}
        assert list(tmp_path.glob("small*")) == [small]
        assert left() == before
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert clean().stderr == "nothing to clean\n"


def test_the_next_start_cleans_up_after_kill_9(
    small: Topology, wait_s: float, tmp_path: Path, left: Callable[[], list[str]]
) -> None:
    before = left()
    with running(tmp_path) as (process, server):
        process.kill()
        process.communicate()
    said: list[str] = []
    with open_network(small, tmp_path, said.append, wait_s=wait_s) as net:
        assert net.sample().links
    assert start_ticks(server) is None
    assert any("left by a killed run" in line for line in said)
    assert not (tmp_path / "small").is_mount()
    assert left() == before


def test_a_namespace_of_somebody_else_is_named_and_left_alone(
    small: Topology, wait_s: float, tmp_path: Path
) -> None:
    subprocess.run(["ip", "netns", "add", "prfaas-west"], check=True)
    try:
        with (
            pytest.raises(MachineError, match="namespace prfaas-west is taken"),
            open_network(small, tmp_path, wait_s=wait_s),
        ):
            pass
        shown = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        assert "prfaas-west" in shown
    finally:
        subprocess.run(["ip", "netns", "delete", "prfaas-west"], check=True)


def test_three_sites_reach_each_other_through_a_shared_hub(wait_s: float, tmp_path: Path) -> None:
    with open_network(load_topology("hub"), tmp_path, wait_s=wait_s) as net:
        for source, target in net.topology.site_pairs():
            address = net.sites[target].address
            done = net.sites[source].run(["ping", "-n", "-c", "2", "-i", "0.2", "-W", "3", address])
            assert " 0% packet loss" in done.stdout
        crossed = net.sample().links["outer->inner"].packets
        assert crossed >= 8
