"""The bench of decisions and look-ups, at a small size: it is a script of its own, which nothing imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

K_SCRIPT = Path(__file__).parents[3] / "scripts" / "bench-routing"


def test_the_bench_measures_decisions_of_each_kind_and_look_ups() -> None:
    words = ["--blocks", "2000", "--queries", "5", "--decisions", "20"]
    done = subprocess.run([sys.executable, str(K_SCRIPT), *words], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert set(found["decision"]) == {"homogeneous", "naive", "paper", "prices"}
    parts = (found["decision_by_deadline"], found["decision_as_held"], found["look_at_servers"])
    for one in (*found["decision"].values(), *parts):
        assert 0 < one["p50_us"] <= one["p99_us"]
    assert found["look_up_dense"]["blocks"] >= 2000
