"""A profiled instance against the real server that it was profiled from, six prompts of mixed length at once.

What is held is the ratio of quantiles: of the time to first token side by side on this machine, and of first
tokens and transfers between two emulated data centres, prefill in one and decode in the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig
from prfaas.config.run import Run, read_run
from prfaas_testbed.experiment.likeness import K_ROUNDS
from prfaas_testbed.experiment.metrics import K_METRICS
from prfaas_testbed.experiment.profiling import Measured, measure
from prfaas_testbed.experiment.view import View
from prfaas_testbed.instances.models import K_MODELS

ROOT = Path(__file__).parents[3]
RUN = [sys.executable, "-m", "prfaas_testbed.cli.main", "run"]
K_WITHIN = 0.10

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not os.environ.get("PRFAAS_LONG_TESTS"),
        reason="measures a server for minutes: set PRFAAS_LONG_TESTS=1",
    ),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("profile")
    found = measure(K_MODELS["dense"], "measured", folder / "server.log", sys.stderr.write)
    check(found.profile, ProfileConfig, "measured")
    return found


def test_first_tokens_come_when_the_real_server_s_do(measured: Measured) -> None:
    assert measured.likeness is not None
    assert len(measured.likeness.real_ttft_s) == K_ROUNDS
    for what, ratio in measured.likeness.ratios().items():
        assert 1 - K_WITHIN <= ratio <= 1 + K_WITHIN, (what, measured.likeness)


def run_pair(folder: Path, kind: str, profile: Path) -> Run:
    """The same bursts over the same network, prefill in east and decode in west, by servers of one kind."""
    data: dict[str, Any] = yaml.safe_load((ROOT / "topologies" / "experiments" / "likeness.yaml").read_text())
    data["models"] = [{"name": "dense", "profile": str(profile)}]
    for instance in data["instances"]:
        instance["kind"] = kind
        if kind == "profiled":
            instance["limits"] = {"prefill_requests": 1}
    data["name"] = f"likeness-{kind}"
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(data))
    done = subprocess.run(
        [*RUN, str(path), "--out", str(folder), "--wait", "60"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (found,) = (folder / data["name"]).iterdir()
    return read_run(found)


def test_transfers_take_as_long_between_profiled_instances(measured: Measured, tmp_path: Path) -> None:
    profile = tmp_path / "measured.yaml"
    profile.write_text(yaml.safe_dump(measured.profile))
    real, profiled = (View(run_pair(tmp_path, kind, profile)) for kind in ("sglang", "profiled"))
    ratios = {
        name: K_METRICS[name].compute(profiled) / K_METRICS[name].compute(real)
        for name in ("transfer_p50_s", "transfer_p90_s", "ttft_p50_s", "ttft_p90_s")
    }
    sys.stderr.write(f"profiled over real: {ratios}\n")
    assert all(1 - K_WITHIN <= ratio <= 1 + K_WITHIN for ratio in ratios.values()), ratios
