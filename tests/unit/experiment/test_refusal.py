"""How a run that is refused everything is judged, from raw rows alone."""

from __future__ import annotations

from typing import Any

import pytest

from prfaas.config.loading import load
from prfaas.config.topology import Topology
from prfaas_testbed.experiment import refusal
from prfaas_testbed.experiment.machine import K_TOPOLOGIES

K_RTT_S = 0.04
K_REFUSED = {
    "status": 503,
    "body": '{"error": {"code": "prfaas_refused", "message": "m"}}',
    "retry_after": "5",
    "e2e_s": 0.0912345,
}


def found(**changes: Any) -> refusal.Found:
    """Two rounds of every length; `changes` are of one row, the first."""
    one = refusal.row_of(K_REFUSED)
    rows = [
        {"round": number, "tokens": tokens, "side": side, **one}
        for number in (0, 1, 2)
        for tokens in refusal.K_LENGTHS
        for side in (refusal.K_PREFILL, refusal.K_DECODE)
    ]
    rows[0].update(changes)
    held = {site: {"free_s": 0.0, "held": {}} for site in ("east", "west")}
    return refusal.Found(rows=rows, computed_tokens=0, held=held)


def failed(judged: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in judged if row["outcome"] == "failed"]


def test_a_refusals_row_has_its_status_code_and_when_to_ask_again() -> None:
    assert refusal.row_of(K_REFUSED) == {
        "status": 503, "code": "prfaas_refused", "retry_after": "5", "seconds": 0.0912
    }  # fmt: skip
    assert refusal.row_of({"output_ids": [1], "error": None, "e2e_s": 0.2})["status"] == 200
    assert refusal.row_of({"status": 500, "body": "no JSON", "e2e_s": 0.2})["code"] is None


def test_all_refused_in_a_round_trip_and_a_tenth_of_a_second_passes() -> None:
    assert failed(refusal.checks(found(), K_RTT_S)) == []


@pytest.mark.parametrize("changes", [{"status": 200}, {"code": None}, {"retry_after": None}])
def test_one_answer_that_is_no_refusal_fails(changes: dict[str, Any]) -> None:
    assert failed(refusal.checks(found(**changes), K_RTT_S)) == ["refused_share"]


def test_late_refusals_computed_prompts_and_held_pages_fail() -> None:
    late = found()
    for row in late.rows:
        if (row["side"], row["tokens"]) == (refusal.K_DECODE, refusal.K_LENGTHS[0]):
            row["seconds"] = K_RTT_S + refusal.K_SLACK_S + 0.001
    late.computed_tokens = 1
    late.held["west"]["free_s"] = None
    assert failed(refusal.checks(late, K_RTT_S)) == [
        f"refused_within/decode/{refusal.K_LENGTHS[0]}", "prompt_tokens_computed", "free/west"
    ]  # fmt: skip


def test_its_experiment_and_its_network_fit() -> None:
    topology = load(K_TOPOLOGIES / "networks" / "overlap.yaml", Topology)
    experiment = refusal.experiment_of(topology.name)
    assert {instance.site for instance in experiment.instances} == set(topology.sites)
    assert experiment.transfer.estimated  # without a ledger nothing is refused
