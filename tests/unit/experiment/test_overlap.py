"""How an overlap run is judged, from raw rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prfaas.config.loading import load
from prfaas.config.topology import Topology
from prfaas_testbed.client.asker import short_prompt
from prfaas_testbed.experiment import overlap
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.instances.models import K_MODELS

K_RTT_S, K_RATE_BPS = 0.04, 35e6


def rows(overlap_mode: str, tokens: int, near_s: float, added_s: float) -> list[dict[str, Any]]:
    return [
        {"overlap": overlap_mode, "tokens": tokens, "where": where, "ttft_s": seconds, "tail_s": added_s / 2}
        for where, seconds in (("near", near_s), ("far", near_s + added_s))
    ]


def test_what_is_left_after_prefill_is_the_last_layers_part_of_the_last_chunk() -> None:
    a_layer = K_MODELS[overlap.K_MODEL].kv_bytes_per_token // overlap.K_LAYERS
    assert overlap.last_piece_bytes(512) == 512 * a_layer
    assert overlap.last_piece_bytes(1024) == overlap.last_piece_bytes(4096) == 1024 * a_layer
    assert overlap.last_piece_bytes(1025) == a_layer


@pytest.mark.parametrize(("beyond_s", "within"), [(-0.001, True), (0.001, False)])
def test_distance_may_cost_a_round_trip_the_last_piece_and_ten_milliseconds(
    beyond_s: float, within: bool
) -> None:
    piece_s = overlap.last_piece_bytes(1024) * 8 / (K_RATE_BPS * overlap.K_WIRE_SHARE)
    added_s = K_RTT_S + piece_s + 0.010 + beyond_s
    [one] = overlap.verdicts(rows("layer", 1024, 0.7, added_s), K_RTT_S, K_RATE_BPS)
    assert one.within is within
    assert one.bound_s == pytest.approx(K_RTT_S + piece_s + 0.010)


@pytest.mark.parametrize(
    ("layer_s", "end_s", "near_s", "failed"),
    [
        (0.05, 0.6, 0.7, []),
        (0.30, 0.6, 0.7, ["layer_within_bound/1024", "layer_tail_within_bound/1024"]),
        (0.05, 0.06, 0.7, ["end_breaks_bound/1024", "end_tail_breaks_bound/1024"]),
        (0.05, 0.6, 5.0, ["wire_share/1024"]),
    ],
)
def test_a_run_passes_only_if_the_same_check_fails_at_the_end_and_the_wire_was_busy(
    layer_s: float, end_s: float, near_s: float, failed: list[str]
) -> None:
    found = overlap.verdicts(
        [*rows("layer", 1024, near_s, layer_s), *rows("end", 1024, near_s, end_s)], K_RTT_S, K_RATE_BPS
    )
    judged = overlap.checks(found)
    assert [row["name"] for row in judged if row["outcome"] == "failed"] == failed
    assert len(judged) == 5


def test_a_tail_is_from_the_last_chunks_handing_over_to_the_last_byte_in_its_place(tmp_path: Path) -> None:
    common = {"room": 7, "ahead_bytes": 4096}
    for side, at_s in (("sent", 10.0), ("landed", 10.05)):
        (tmp_path / f"{side}.jsonl").write_text(json.dumps({**common, "side": side, "at_s": at_s}) + "\n")
    row: dict[str, Any] = {"room": 7}
    overlap.add_tails([row], tmp_path)
    assert row == {"room": 7, "tail_s": 0.05, "ahead_bytes": 4096}


def test_its_experiment_and_its_network_fit() -> None:
    topology = load(K_TOPOLOGIES / "networks" / "overlap.yaml", Topology)
    experiment = overlap.experiment_of(topology.name)
    assert {instance.site for instance in experiment.instances} == set(topology.sites)


def test_prompts_are_short_to_send_and_begin_differently() -> None:
    prompts = [short_prompt(100, seed) for seed in range(50)]
    assert all(10 <= token < 100 for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 50
    assert short_prompt(100, 3) == short_prompt(200, 3)[:100]
