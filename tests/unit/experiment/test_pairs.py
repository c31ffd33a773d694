"""Real and profiled servers between two sites: the same experiment, and one ratio a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas.config.run import Repetition, RequestRow, Run
from prfaas.model.errors import PrfaasError
from prfaas_testbed.experiment.pairs import K_COMPARED, compared, pair_set


def record(**extra: Any) -> Run:
    rows = [
        {"id": f"r{i}", "model": "dense", "prompt_tokens": 1, "part": part, "ttft_s": factor * (1 + i),
         "e2e_s": 9.0, "transfer_start_s": 0.0, "transfer_end_s": factor * 0.1}
        for part, factor in (("real-1", 1.0), ("profiled-1", 1.2), ("profiled-2", 1.0), ("real-2", 1.0))
        for i in range(6)
    ]  # fmt: skip
    run = Run.model_validate(
        {"experiment": "likeness", "commit": "c", "started": "s", "versions": {}, "machine": {},
         "emulation": "appliance", "parts": ["real-1", "profiled-1", "profiled-2", "real-2"], **extra}
    )  # fmt: skip
    run.repetitions = [Repetition(index=0, requests=[RequestRow.model_validate(row) for row in rows])]
    return run


def test_both_sides_differ_in_their_servers_alone_and_take_turns(tmp_path: Path) -> None:
    choice, parts = pair_set("dense", tmp_path / "p.yaml", turns=2)
    assert [name for name, _ in parts] == ["real-1", "profiled-1", "profiled-2", "real-2"]
    assert [part.name for part in choice.parts] == [name for name, _ in parts]
    real, profiled = dict(parts)["real-1"], dict(parts)["profiled-1"]
    assert real.kinds() == {"sglang"}
    assert profiled.kinds() == {"profiled"}
    same = {"instances": ()}
    assert real.model_copy(update=same) == profiled.model_copy(update=same)
    assert all(instance.limits.prefill_requests == 1 for instance in profiled.instances)


def test_a_ratio_is_of_the_means_of_each_side_s_turns() -> None:
    found = compared(record())
    assert set(found) == set(K_COMPARED)
    assert found["transfer_p50_s"]["ratio"] == pytest.approx(1.1)
    assert found["ttft_p90_s"]["real"] == pytest.approx([5.5, 5.5])


def test_nothing_is_compared_with_a_part_that_did_not_end() -> None:
    with pytest.raises(
        PrfaasError, match="real-2 didn't end, so that nothing can be compared: a server died"
    ):
        compared(record(stopped_parts={"real-2": "a server died"}))
