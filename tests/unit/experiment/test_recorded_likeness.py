"""The simulator's instance against what a real SGLang server did: the rows of a run that is kept.

The profile is from prompts of one length at a time; the rounds are six prompts of mixed length at once. Each
round's speed is its own (the machine was shared), so that what is held here is how requests queue and share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prfaas.config.experiment import Experiment, Limits
from prfaas_testbed.experiment import served
from prfaas_testbed.experiment.machine import K_RESULTS
from prfaas_testbed.experiment.served import Served, at_own_speed, ratios, rounds_of_record

K_RECORD = K_RESULTS / "likeness" / "20261129T210136Z"
K_LEAST_AT_ONCE = 4
K_WITHIN = 0.10


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((K_RECORD / "likeness.json").read_text(encoding="utf-8"))
    return found


def rounds(record: dict[str, Any]) -> list[Served]:
    return [one for one in rounds_of_record(record["simulated"]["rounds"]) if one.kind == "at once"]


def played(record: dict[str, Any], profile: Path = K_RECORD / "profile.yaml") -> dict[str, float]:
    real = rounds(record)
    return ratios(real, [at_own_speed(profile, record["model"], one) for one in real])["at once"]


def test_the_recorded_server_had_mixed_prompts_under_way_at_once(record: dict[str, Any]) -> None:
    found = rounds(record)
    assert len(found) >= 4
    for one in found:
        mean, most = one.under_way()
        assert most >= mean >= K_LEAST_AT_ONCE
        assert len(set(one.prompt_tokens)) == len(one.prompt_tokens)


def test_first_tokens_and_tokens_come_when_the_real_server_s_did(record: dict[str, Any]) -> None:
    found = played(record)
    for name in ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90"):
        assert found[name] == pytest.approx(1.0, abs=K_WITHIN), name


def test_an_instance_that_serves_otherwise_would_be_noticed(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = served.alone

    def of_many_prompts_a_step(profile: Path, model: str) -> Experiment:
        file = plain(profile, model)
        unlike = [one.model_copy(update={"limits": Limits()}) for one in file.instances]
        return file.model_copy(update={"instances": unlike})

    monkeypatch.setattr(served, "alone", of_many_prompts_a_step)
    assert any(abs(ratio - 1) > K_WITHIN for ratio in played(record).values())


def test_the_recorded_figure_is_what_the_simulator_still_says(record: dict[str, Any]) -> None:
    found = played(record)
    kept = record["simulated"]["own_speed"]["ratios"]["at once"]
    assert np.allclose(list(found.values()), [kept[name] for name in found], atol=0.02)
