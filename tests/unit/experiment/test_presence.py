"""How a presence run is judged, from raw rows alone."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest

from prfaas_testbed.experiment import presence
from prfaas_testbed.instances.models import K_MODELS


def found_of(with_over_without: float, equal: bool = True) -> presence.Found:
    factor = {"with": with_over_without, "without": 1.0}
    blocks = [(block, arm) for block in range(3) for arm in presence.K_ARMS]
    return presence.Found(
        starts=[
            {"block": b, "arm": a, "seconds": 40 * factor[a], "cpu_s": 20 * factor[a]} for b, a in blocks
        ],
        processor=[{"block": b, "arm": a, "cpu_s": 30 * factor[a]} for b, a in blocks],
        requests=[
            # A slow block is slow for both: only pairs are compared.
            {"block": b, "round": 0, "arm": a, "tokens": n, "ttft_s": (1 + b) * factor[a]}
            | {"e2e_s": factor[a], "cpu_s": factor[a]}
            for b, a in blocks
            for n in presence.K_LENGTHS
        ],
        bursts=[{"block": b, "round": 0, "arm": a, "seconds": factor[a]} for b, a in blocks],
        answers=[{"block": 0, "tokens": 20, "equal": equal}],
    )


@pytest.mark.parametrize(
    ("ratio", "equal", "passed"), [(1.0, True, True), (1.1, True, False), (1.0, False, False)]
)
def test_a_plugin_that_costs_time_or_changes_answers_is_seen(ratio: float, equal: bool, passed: bool) -> None:
    judged = presence.checks(found_of(ratio, equal))
    assert all(row["outcome"] == "passed" for row in judged) is passed
    assert {row["value"] for row in judged if row["name"].startswith("ratio/")} == {ratio}


def test_a_median_of_pairs_says_how_far_off_it_may_well_be() -> None:
    rng = random.Random(3)
    errors, medians = [], []
    for _ in range(200):
        rows = [
            {"block": 0, "round": i, "arm": arm, "s": rng.gauss(1.0, 0.1) if arm == "with" else 1.0}
            for i in range(64)
            for arm in presence.K_ARMS
        ]
        found = presence._paired(rows, "s")
        assert found.error is not None
        errors.append(found.error)
        medians.append(found.value)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(medians), rel=0.15)


def test_what_each_start_of_both_came_to_is_told_apart() -> None:
    """Two starts of one server can differ by more than requests to them do."""
    rows = [
        {"block": block, "round": i, "arm": arm, "s": ratio if arm == "with" else 1.0}
        for block, ratio in enumerate((0.98, 1.04))
        for i in range(4)
        for arm in presence.K_ARMS
    ]
    found = presence._paired(rows, "s")
    assert (found.value, found.by_block) == (1.01, (0.98, 1.04))


def test_as_a_control_neither_server_loads_the_plugin(tmp_path: Path) -> None:
    for control, loads in (
        (False, {"with": True, "without": False}),
        (True, {"with": False, "without": False}),
    ):
        for arm in presence.K_ARMS:
            server = presence._server(K_MODELS["dense"], arm, 1, tmp_path, 0, control)
            assert ("SGLANG_PLUGINS" not in server.spec.extra_env) is loads[arm]
