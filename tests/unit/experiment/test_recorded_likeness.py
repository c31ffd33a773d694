"""The simulator's instance against what a real SGLang server did: the rows of a run that is kept.

The profile is from prompts of one length at a time; the rounds are six prompts of mixed length at once, and
streams of sixteen in which some are prefilled while others are decoded. How lengths mix, queue and share a
batch is the simulator's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prfaas.config.experiment import Experiment, Limits
from prfaas_testbed.experiment import served
from prfaas_testbed.experiment.machine import K_RESULTS
from prfaas_testbed.experiment.served import Served, against_simulator, rounds_of_record
from prfaas_testbed.experiment.sites import write_json

K_RECORD = K_RESULTS / "likeness" / "20261129T220123Z"
K_LEAST_AT_ONCE = 4
K_WITHIN = 0.10

Ratios = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((K_RECORD / "likeness.json").read_text(encoding="utf-8"))
    return found


def rounds(record: dict[str, Any]) -> list[Served]:
    return rounds_of_record(record["simulated"]["rounds"])


def played(record: dict[str, Any], profile: Path) -> Ratios:
    found: Ratios = against_simulator(profile, record["model"], rounds(record))["ratios"]
    return found


def furthest(found: Ratios) -> float:
    return max(abs(ratio - 1) for each in found.values() for ratio in each.values())


def test_the_recorded_server_had_mixed_prompts_under_way_at_once(record: dict[str, Any]) -> None:
    for one in rounds(record):
        mean, most = one.under_way()
        assert most >= K_LEAST_AT_ONCE
        assert mean >= K_LEAST_AT_ONCE or one.kind == "stream"
        assert len(set(one.prompt_tokens)) >= 6


def test_first_tokens_last_ones_and_those_between_come_when_the_real_server_s_did(
    record: dict[str, Any],
) -> None:
    found = played(record, K_RECORD / "profile.yaml")
    assert set(found) == {"at once", "stream"}
    assert furthest(found) <= K_WITHIN, found
    for kind, kept in record["simulated"]["ratios"].items():
        assert found[kind] == pytest.approx(kept, abs=0.02)  # what the record says is still so


@pytest.mark.parametrize(
    "unlike",
    [
        lambda profile: profile | {"decode": profile["decode"] | {"step_s": 0.0064, "batch": None}},
        lambda profile: profile | {"prefill_s": [1.2 * value for value in profile["prefill_s"]]},
        lambda profile: profile
        | {"prefill_s": [tokens * profile["prefill_s"][-1] / 8192 for tokens in profile["tokens"]],
           "latency_s": 0.0},
    ],
    ids=["batches cost nothing", "a fifth slower", "prefill grows evenly"],
)  # fmt: skip
def test_another_profile_would_be_noticed(
    record: dict[str, Any], tmp_path: Path, unlike: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    assert furthest(played(record, write_json(tmp_path / "p.yaml", unlike(record["profile"])))) > K_WITHIN


def test_an_instance_that_prefills_otherwise_would_be_noticed(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = served.alone

    def of_many_prompts_a_step(profile: Path, model: str) -> Experiment:
        file = plain(profile, model)
        unlike = [one.model_copy(update={"limits": Limits()}) for one in file.instances]
        return file.model_copy(update={"instances": unlike})

    monkeypatch.setattr(served, "alone", of_many_prompts_a_step)
    assert furthest(played(record, K_RECORD / "profile.yaml")) > K_WITHIN
