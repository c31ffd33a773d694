"""Rounds of requests that a real server answered, and the simulator's instance held against it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig
from prfaas_testbed.client import Answer
from prfaas_testbed.experiment.likeness import K_MIX_TOKENS
from prfaas_testbed.experiment.served import (
    K_STREAM_REQUESTS,
    Asked,
    Served,
    against_simulator,
    at_own_speed,
    ratios,
    rounds_of_record,
    simulated,
    stream_of,
)
from prfaas_testbed.experiment.sites import write_json

K_PROFILE: dict[str, Any] = {
    "name": "known", "description": "For a test.", "source": "made up", "gpus": 0,
    "tokens": [100, 1000], "prefill_s": [0.3, 1.2], "latency_s": 0.2, "kv_bytes_per_token": 64,
    "decode": {"batch": [1, 2], "step_s": [0.1, 0.15], "max_batch": 2}, "block_tokens": 1,
    "chunk_tokens": 400, "pool_tokens": 65536,
}  # fmt: skip


def written(tmp_path: Path, **changes: Any) -> Path:
    check(K_PROFILE | changes, ProfileConfig, "a test's")
    return write_json(tmp_path / "profile.yaml", K_PROFILE | changes)


def asked_of(*each: tuple[float, int, int], slowness: float = 1.0) -> Served:
    at_s, prompts, new = (list(column) for column in zip(*each, strict=True))
    return Served("at once", slowness, at_s, prompts, new, [1.0] * len(each), [2.0] * len(each))


def test_requests_are_served_one_prompt_a_step_and_then_decoded_together(tmp_path: Path) -> None:
    found = simulated(written(tmp_path), "known", asked_of((0.0, 500, 3), (0.0, 100, 3)))
    # Both are read for 0.2 s; 500 tokens take 0.5 s in two steps, 100 the 0.1 s after that.
    assert found.ttft_s == pytest.approx([0.7, 0.8], abs=1e-4)
    # Then two steps of both, 0.15 s each.
    assert found.e2e_s == pytest.approx([1.1, 1.1], abs=1e-4)
    assert found.tpot_s() == pytest.approx([0.2, 0.15], abs=1e-4)


def test_on_a_machine_half_as_fast_all_takes_twice_as_long(tmp_path: Path) -> None:
    profile = written(tmp_path)
    one = asked_of((0.0, 500, 3), (0.25, 100, 9))
    slow = asked_of((0.0, 500, 3), (0.5, 100, 9), slowness=2.0)
    usual, twice = simulated(profile, "known", one), simulated(profile, "known", slow)
    assert twice.ttft_s == pytest.approx([2 * value for value in usual.ttft_s], abs=1e-4)
    assert twice.e2e_s == pytest.approx([2 * value for value in usual.e2e_s], abs=1e-4)


def test_a_round_s_own_speed_is_found_from_how_long_its_requests_last(tmp_path: Path) -> None:
    profile = written(tmp_path)
    asked = asked_of((0.0, 500, 3), (0.4, 100, 9), (0.9, 300, 5))
    real = simulated(profile, "known", replace(asked, slowness=1.7))
    found = at_own_speed(profile, "known", replace(real, slowness=1.0))
    assert found.slowness == pytest.approx(1.7, rel=0.01)
    assert found.ttft_s == pytest.approx(real.ttft_s, rel=0.01)


def test_sides_are_compared_by_kind_and_quantile(tmp_path: Path) -> None:
    real = [asked_of((0.0, 500, 3), (0.0, 100, 3)), replace(asked_of((0.0, 100, 5)), kind="stream")]
    played = [replace(one, ttft_s=[1.1 * value for value in one.ttft_s]) for one in real]
    found = ratios(real, played)
    assert set(found) == {"at once", "stream"}
    assert found["stream"]["ttft_p90"] == pytest.approx(1.1)
    assert found["stream"]["e2e_p50"] == pytest.approx(1.0)
    assert found["stream"]["tpot_p50"] == pytest.approx(0.9)


def test_a_record_holds_the_raw_rounds_and_gives_them_back(tmp_path: Path) -> None:
    rounds = [asked_of((0.0, 500, 3), (0.0, 100, 3))]
    found = against_simulator(written(tmp_path), "known", rounds)
    assert rounds_of_record(found["rounds"]) == rounds
    assert found["ratios"]["at once"]["ttft_p90"] == pytest.approx(0.79, abs=1e-3)
    assert found["under_way"]["at once"] == [2.0, 2]


def test_a_stream_asks_for_every_length_at_times_of_its_own(tmp_path: Path) -> None:
    found = stream_of(8192, 0.4, seed=1)
    assert len(found) == K_STREAM_REQUESTS
    assert {min(K_MIX_TOKENS), max(K_MIX_TOKENS)} <= {one.prompt_tokens for one in found}
    assert [one.at_s for one in found] == sorted(one.at_s for one in found)
    assert found == stream_of(8192, 0.4, seed=1) != stream_of(8192, 0.4, seed=2)
    assert max(one.prompt_tokens for one in stream_of(1024, 0.4, seed=1)) == 900


def test_answers_are_put_in_the_order_of_their_sending() -> None:
    asked = [Asked(0.0, 100, 2), Asked(0.1, 200, 2)]
    answers = [Answer("8", 0.1, ttft_s=2.0, e2e_s=3.0), Answer("7", 0.0, ttft_s=1.0, e2e_s=4.0)]
    found = Served.of("stream", 1.0, asked, answers)
    assert (found.prompt_tokens, found.ttft_s, found.e2e_s) == ([100, 200], [1.0, 2.0], [4.0, 3.0])
    mean, most = found.under_way()
    assert mean == pytest.approx((0.1 + 3.0 * 2 + 0.9) / 4.0)
    assert most == 2
