"""How fast a real prefill server was where it served, and profiled instances that are as slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prfaas.config.experiment import Experiment
from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig
from prfaas.config.run import RequestRow
from prfaas.model.errors import PrfaasError
from prfaas_testbed.experiment.pace import Stretch, as_slow, slowness, stretches
from prfaas_testbed.experiment.pairs import at_its_pace, pair_set
from prfaas_testbed.experiment.profiling import with_steps
from prfaas_testbed.experiment.runner import Results

K_PROFILE: dict[str, Any] = {
    "name": "p", "description": "d", "source": "measured", "gpus": 0, "tokens": [100, 4096, 4097, 8192],
    "prefill_s": [0.02, 0.36, 0.76, 1.56], "latency_s": 0.01, "kv_bytes_per_token": 1024,
    "decode": {"step_s": 0.01, "max_batch": 8}, "block_tokens": 1, "chunk_tokens": 4096,
}  # fmt: skip
K_PROMPTS = [100, 4097, 4096]


def line(tokens: int, pending: int, seconds: float) -> str:
    return (
        f"[2026-11-30 06:05:59] Prefill batch, #new-seq: 1, #new-token: {tokens}, #cached-token: 0, "
        f"token usage: 0.07, #running-req: 0, #queue-req: 0, #pending-token: {pending}, #bootstrap-req: 0, "
        f"cpu graph: False, input throughput (token/s): {tokens / seconds:.2f}\n"
    )


def log(factor: float, other: str = "") -> str:
    """Something, a pause, then K_PROMPTS at once by a server so many times as slow."""
    return "".join([
        line(64, 0, 9.0), other, line(100, 8193, 5.0), "[2026-11-30 06:05:59] Decode batch, #new-token: 9\n",
        line(4096, 4097, 0.35 * factor), line(1, 4096, 0.40 * factor), line(4096, 0, 0.35 * factor),
    ])  # fmt: skip


def test_the_first_step_after_a_pause_counts_its_tokens_and_not_its_time() -> None:
    first, second = stretches(log(1.0))
    assert first == Stretch(64, 64, 0.0)
    assert (second.first_tokens, second.tokens) == (100, 8293)
    assert second.rest_s == pytest.approx(1.1, rel=1e-3)


def test_how_slow_a_server_was_is_known_from_the_median_of_its_rounds() -> None:
    profile = check(K_PROFILE, ProfileConfig, "p").profile()
    assert slowness(log(1.3), K_PROMPTS, profile) == pytest.approx(1.3, rel=1e-3)
    three = log(1.3) + log(9.0) + log(1.2)
    assert slowness(three, K_PROMPTS, profile) == pytest.approx(1.3, rel=1e-3)


def test_a_log_without_the_round_says_nothing_of_a_pace() -> None:
    profile = check(K_PROFILE, ProfileConfig, "p").profile()
    with pytest.raises(PrfaasError, match="no 2 prompts that followed on one another"):
        slowness(log(1.3), [100, 4097], profile)


def test_profiled_instances_become_as_slow_as_the_real_server_was_before_them(tmp_path: Path) -> None:
    file, paces = tmp_path / "there.yaml", list[float]()
    _, parts = pair_set("dense", file, turns=1)
    seen: list[str] = []

    def conduct(name: str, experiment: Experiment, results: Results) -> None:
        seen.append(name)
        if name == "real-1":
            (tmp_path / name / "work" / "dense").mkdir(parents=True)
            (tmp_path / name / "work" / "dense" / "prefill.log").write_text(log(1.25))
            rows = [
                RequestRow.model_validate({"id": f"r{i}", "model": "dense", "prompt_tokens": tokens})
                for i, tokens in enumerate(K_PROMPTS)
            ]
            results.repetition(0).requests.extend(rows)

    conducted = at_its_pace(conduct, tmp_path, K_PROFILE, file, paces)
    for name, experiment in parts:
        conducted(name, experiment, Results())
    assert seen == ["real-1", "profiled-1"]
    assert paces == [pytest.approx(1.25, rel=1e-3)]
    there = yaml.safe_load(file.read_text())
    assert there == as_slow(K_PROFILE, paces[0])
    slower, alone = (check(one, ProfileConfig, "p").profile() for one in (there, K_PROFILE))
    assert slower.latency_s == alone.latency_s
    assert slower.occupied_s(5000) == pytest.approx(1.25 * alone.occupied_s(5000), rel=1e-3)


def test_a_profile_is_measured_on_both_sides_of_each_step_s_end() -> None:
    assert with_steps([16, 2048, 6144], 4096) == [16, 2048, 4096, 4097, 6144]
    assert with_steps([16, 8192], 4096) == [16, 4096, 4097, 8192]
    assert with_steps([16, 1024], 4096) == [16, 1024]
