"""`prfaas-testbed open`: one's own programs in a network, and links that change under them."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import psutil
import yaml

from prfaas.config.topology import Topology
from prfaas.model.errors import EXIT_INTERRUPTED

K_OPEN = [sys.executable, "-m", "prfaas_testbed.cli.main", "open"]
K_SCRIPT = """
$IN_west ping -c 3 -i 0.2 $ADDRESS_east
$IN_west sh -c 'echo of west > /tmp/mine; cat small.yaml > /dev/null' || exit 7
$IN_east cat /tmp/mine
"""
K_LASTING = "sleep 600 & sleep 1; echo $!; sleep 601"
K_LINES = b"""
\xff\xfe and more nonsense
east->nowhere down=true
east<->west<->east down=true
east->west speed=1
east->west queue_bytes=99999999999999
east<->west delay_ms=50
"""


def written(topology: Topology, folder: Path) -> str:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(topology.model_dump(by_alias=True, exclude_unset=True, mode="json")))
    return str(file)


def test_a_command_reaches_sites_by_their_names_and_its_status_is_told(
    small: Topology, tmp_path: Path, wait_s: float
) -> None:
    done = subprocess.run(
        [*K_OPEN, written(small, tmp_path), "--wait", str(wait_s), "--run", K_SCRIPT],
        capture_output=True, text=True, timeout=150, check=False, cwd=tmp_path,
    )  # fmt: skip
    rtts = [float(ms) for ms in re.findall(r"time=([\d.]+) ms", done.stdout)]
    assert rtts, done
    assert 25 <= min(rtts) < 60
    assert "/tmp/mine" in done.stderr, "a site saw another's /tmp"
    assert done.returncode == 1
    assert "the commands ended with status 1" in done.stderr


def test_a_signal_to_the_command_alone_ends_what_its_commands_run_on_this_machine(
    small: Topology, tmp_path: Path, wait_s: float
) -> None:
    process = subprocess.Popen(
        [*K_OPEN, written(small, tmp_path), "--wait", str(wait_s), "--run", K_LASTING],
        stdout=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        started = psutil.Process(int(process.stdout.readline()))
        process.terminate()
        assert process.wait(60) == EXIT_INTERRUPTED
    with contextlib.suppress(psutil.NoSuchProcess):
        assert started.status() == psutil.STATUS_ZOMBIE


def test_lines_change_links_of_a_network_that_is_open_and_its_end_takes_it_down(
    small: Topology, tmp_path: Path, wait_s: float
) -> None:
    done = subprocess.run(
        [*K_OPEN, written(small, tmp_path), "--wait", str(wait_s)],
        input=K_LINES, capture_output=True, timeout=150, check=False, cwd=tmp_path,
    )  # fmt: skip
    told = done.stderr.decode()
    assert done.returncode == 0, told
    assert "no link 'east->nowhere'; there are: east->west" in told
    assert "no link 'east->west<->east'" in told
    assert "unknown field" in told
    assert "the router refused" in told, "a queue that the kernel's tbf can't have"
    # The last line's, after all that was refused.
    for link in ("east->west", "west->east"):
        assert told.count(f"{link} changed, known within") == 1
    assert not list(Path("/run/netns").glob("prfaas-*"))
