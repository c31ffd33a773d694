"""`prfaas-testbed open`: one's own programs in a network, and links that change under them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from prfaas.config.topology import Topology

K_OPEN = [sys.executable, "-m", "prfaas_testbed.cli.main", "open"]
K_SCRIPT = """
$IN_west ping -c 3 -i 0.2 $ADDRESS_east
$IN_west sh -c 'echo of west > /tmp/mine; cat small.yaml > /dev/null' || exit 7
$IN_east cat /tmp/mine
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


def test_lines_change_links_of_a_network_that_is_open_and_its_end_takes_it_down(
    small: Topology, tmp_path: Path, wait_s: float
) -> None:
    done = subprocess.run(
        [*K_OPEN, written(small, tmp_path), "--wait", str(wait_s)],
        input="east<->west delay_ms=50\neast->nowhere down=true\neast->west speed=1\n",
        capture_output=True, text=True, timeout=150, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for link in ("east->west", "west->east"):
        assert f"{link} changed, known within" in done.stderr
    assert "no link 'east->nowhere'; there are: east->west" in done.stderr
    assert "unknown field" in done.stderr
    assert not list(Path("/run/netns").glob("prfaas-*"))
