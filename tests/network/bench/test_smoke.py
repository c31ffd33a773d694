"""The whole bench, a minute's worth: every part runs over a real emulated link and leaves a run that reads
back.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prfaas.cli.main import main
from prfaas.config.run import read_run


@pytest.mark.timeout(300)
def test_every_part_of_the_bench_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "all", "--smoke", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (file,) = (tmp_path / "bench").glob("*/run.json")
    run = read_run(file.parent).model_dump()
    assert run["emulation"] in ("native", "appliance")
    assert [row["goodput_mbps"] for row in run["rows"]] == [row["goodput_mbps"] for row in printed["rows"]]
    ours = [row for row in run["rows"] if row["engine"] == "prfaas"]
    assert {row["cell"] for row in ours} >= {
        "wan-thin-loss",
        "loopback-64k",
        "loopback-64k-tls",
        "loopback-100k-segments",
    }
    assert all(row["goodput_mbps"] and not row["errors"] for row in ours)
    assert {"iperf3", "mooncake"} <= {row["engine"] for row in run["rows"] if row["goodput_mbps"]}
    assert run["measures"]["latency"][0]["sender_s"]
    (cut,) = run["measures"]["outage"]
    assert not cut["over_before_the_end"]
    assert run["measures"]["neighbour"]["stopped_mbps"]
    assert {row["engine"] for row in run["measures"]["host"]} >= {"prfaas", "control"}
