from __future__ import annotations

import json
import math
from typing import Any

import pytest

from prfaas.config.case import CaseConfig
from prfaas.config.lengths import lengths_of
from prfaas.model.lengths import Constant, Lengths
from prfaas.planner import Impossible, Slo, report

K_KEYS = {
    "throughput_rps",
    "threshold_tokens",
    "prefill",
    "decode",
    "offloaded_share",
    "l_long_tokens",
    "l_short_tokens",
    "prfaas_rps",
    "local_prefill_rps",
    "decode_rps",
    "egress_gbps",
    "ttft_mean_s",
    "ttft_p90_s",
}


def lengths(case: CaseConfig) -> Lengths:
    return lengths_of(case.workload.input_tokens)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result(case: CaseConfig) -> dict[str, Any]:
    return report(case, lengths(case))


def test_the_keys_are_there_for_every_system(result: dict[str, Any]) -> None:
    assert result.keys() >= K_KEYS
    assert result["homogeneous"].keys() >= K_KEYS
    assert result["naive"].keys() >= K_KEYS
    assert json.loads(json.dumps(result)) == result  # plain, finite where numbers are meant


def test_nothing_in_the_report_is_infinite_or_undefined(result: dict[str, Any]) -> None:
    def walk(value: object) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)
        elif isinstance(value, float):
            assert math.isfinite(value)

    walk(result)


def test_published_figures_stand_beside_ours_with_ratio_and_reason(result: dict[str, Any]) -> None:
    rows = {(row["system"], row["figure"]): row for row in result["published"]}
    assert len(rows) == 24
    egress = rows[("prfaas_pd", "egress_gbps")]
    assert egress["published"] == 13
    assert egress["ours"] == pytest.approx(11.94, abs=0.05)
    assert "give 12.2 with it" in egress["note"]
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["ours"] / row["published"])
        assert row["note"] or abs(row["ratio"] - 1) <= 0.005


def test_figures_that_inputs_were_solved_back_from_are_marked(result: dict[str, Any]) -> None:
    circular = {(row["system"], row["figure"]) for row in result["published"] if row["circular"]}
    assert circular == {
        ("prfaas_pd", "local_prefill_rps"),
        ("prfaas_pd", "decode_rps"),
        ("homogeneous", "throughput_rps"),
        ("homogeneous", "decode_rps"),
        ("naive", "decode_rps"),
    }
    assert result["solved_back"] == ["local.profile", "decode.max_batch"]


def test_solved_back_values_are_recognised_without_being_declared(case: CaseConfig) -> None:
    silent = report(case.model_copy(update={"solved_back": ()}), lengths(case), 19_400, 3)
    circular = {(row["system"], row["figure"]) for row in silent["published"] if row["circular"]}
    assert ("homogeneous", "throughput_rps") in circular
    assert ("prfaas_pd", "local_prefill_rps") in circular
    assert ("prfaas_pd", "throughput_rps") not in circular


def test_extrapolation_is_said(result: dict[str, Any]) -> None:
    assert any("27486 tokens lies beyond its points" in line for line in result["extrapolated"])


def test_what_is_given_is_held_and_the_rest_chosen(case: CaseConfig) -> None:
    both = report(case, lengths(case), 19_400, 3)
    assert (both["threshold_tokens"], both["prefill"], both["chosen"]) == (19_400, 3, [])
    threshold = report(case, lengths(case), 41_700, None)
    assert threshold["threshold_tokens"] == 41_700
    assert threshold["chosen"] == ["prefill"]
    assert threshold["prefill"] != 3
    split = report(case, lengths(case), None, 5)
    assert split["prefill"] == 5
    assert split["chosen"] == ["threshold"]


def test_without_equal_hardware_there_is_no_baseline_to_show(case: CaseConfig) -> None:
    bare = report(case.model_copy(update={"homogeneous_instances": None, "published": None}), lengths(case))
    assert bare["homogeneous"] is None
    assert bare["collocated"] is None
    assert bare["published"] == []
    assert bare["ratios"]["homogeneous"] is None
    assert bare["throughput_rps"] == pytest.approx(3.196, abs=0.001)


@pytest.mark.parametrize("update", [{"instances": 0}, {"egress_gbps": 0.0}], ids=["no instances", "no link"])
def test_a_cluster_that_can_send_nothing_leaves_the_local_one(
    case: CaseConfig, update: dict[str, Any]
) -> None:
    alone = report(case.model_copy(update={"prfaas": case.prfaas.model_copy(update=update)}), lengths(case))
    assert alone["naive"] is None
    assert alone["throughput_rps"] == pytest.approx(1.38, abs=0.01)
    assert alone["offloaded_share"] == pytest.approx(0, abs=1e-3)


def test_equal_lengths_can_be_planned(case: CaseConfig) -> None:
    assert report(case, Constant(27_000))["throughput_rps"] > 2


def test_queues_are_shown_over_the_load_and_an_slo_is_sized(case: CaseConfig) -> None:
    result = report(case, lengths(case), None, None, Slo(6.0), 3.0)
    means = [row["ttft_mean_s"] for row in result["queueing"] if "unstable" not in row]
    assert means == sorted(means)
    assert result["sizing"]["ttft_quantile_s"] <= 6.01
    with pytest.raises(Impossible):
        report(case, lengths(case), None, None, Slo(1.0), 3.0)
