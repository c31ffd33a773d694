"""Prefixes that are brought to another site's prefill cache before their prompt is sent there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prfaas.routing
from prfaas.config.experiment import Experiment
from prfaas.config.topology import Topology
from prfaas.model.decisions import K_MOVE_FACTOR
from prfaas.simulator.build import Simulation, simulation_of

K_TOPOLOGIES = Path(prfaas.routing.__file__).parents[3] / "topologies"
K_RTT_S = 0.02
K_TOPOLOGY = Topology.model_validate(
    {
        "name": "unit",
        "text": "two sites",
        "sites": {"east": {}, "west": {}},
        "links": [{"between": ["east", "west"], "rate_mbps": 10_000, "delay_ms": 1e3 * K_RTT_S / 2}],
    }
)
K_PAPER = {"name": "paper", "regime": "abundant", "threshold_tokens": 5000}


def simulation(movable: bool = True, policy: dict[str, Any] = K_PAPER, **fields: Any) -> Simulation:
    """Conversations whose first turns are sent to east, and whose later ones stay in west."""
    base: dict[str, Any] = {
        "name": "unit",
        "description": "conversations",
        "wall_time_s": 100,
        "network": "hundred-gig",
        "models": [{"name": "m", "profile": "1t-hybrid-h20"}],
        "instances": [
            {"name": "far", "site": "east", "role": "prefill", "count": 2, "profile": "1t-hybrid-h200"},
            {"name": "near", "site": "west", "role": "prefill", "count": 2},
            {"name": "decode", "site": "west", "role": "decode", "count": 3},
        ],
        "router": {"site": "west", "policy": policy, "move_prefixes": movable},
        "workload": {
            "kind": "sessions",
            "arrivals": {"process": "poisson", "rate_rps": 0.2},
            "requests": 60,
            "turns": 4,
            "first_tokens": 12_800,
            "turn_tokens": 1280,
            "output_tokens": 64,
            "think_s": 10,
        },
        "request_timeout_s": 600,
    }  # fmt: skip
    asked = Experiment.model_validate(base | fields)
    return simulation_of(asked, K_TOPOLOGIES, topology=K_TOPOLOGY, sample=False)


def rows(world: Simulation) -> list[dict[str, Any]]:
    return list(world.run().rows("m"))


def test_what_only_east_holds_is_found_in_west_after_it_was_brought() -> None:
    world = simulation()
    found = rows(world)
    moved = [row for row in found if row["moved_tokens"]]
    assert moved
    for row in moved:
        assert row["site"] == "west"
        assert row["cached_tokens"] == row["moved_tokens"]
        assert row["kv_bytes"] == 0
    # Once: the turns that follow find it there.
    assert len(moved) < sum(row["site"] == "west" for row in found)
    sent = world.world.network.pipes["east", "west"].sent_bytes
    works = world.world.engines["near-0"].works
    brought = sum(works.kv_bytes(row["moved_tokens"]) for row in moved)
    assert sent == pytest.approx(brought + sum(row["kv_bytes"] for row in found))
    assert world.world.record.summary()["moved_share"] == pytest.approx(len(moved) / len(found))


def test_it_takes_a_question_and_its_bytes_time() -> None:
    alone = {
        "kind": "sessions", "arrivals": {"process": "at_once"}, "sessions": 1, "turns": 2,
        "first_tokens": 12_800, "turn_tokens": 1280, "output_tokens": 64, "think_s": 50,
    }  # fmt: skip
    _, second = rows(simulation(workload=alone))
    assert second["moved_tokens"] == second["cached_tokens"] > 0
    near = simulation().world.engines["near-0"]
    prefill_s = near.works.prefill_s(second["prompt_tokens"], second["cached_tokens"])
    wire_s = near.works.kv_bytes(second["moved_tokens"]) * 8 / 10e9
    added_s = second["ttft_s"] - prefill_s
    # Connection and question, the bytes (their streams gather speed first), a decode step.
    assert 2 * K_RTT_S + wire_s < added_s < 12 * K_RTT_S + 2 * wire_s


def test_nothing_is_moved_where_that_is_not_asked_for() -> None:
    assert not any(row["moved_tokens"] for row in rows(simulation(movable=False)))


def test_a_move_that_a_dead_link_holds_up_is_given_up_and_the_prompt_is_computed() -> None:
    # The report's policy asks nobody whether the link is up before it counts on it.
    down = {"do": "link_down", "at_s": 30.0, "link": "east->west", "for_s": 60.0}
    world = simulation(timeline=[down])
    found = rows(world)
    assert not any(row["error"] for row in found)
    assert not any(pipe.transfers for pipe in world.world.network.pipes.values())


def test_a_move_whose_link_dies_under_it_is_waited_for_so_long_and_the_prompt_is_computed() -> None:
    alone = {
        "kind": "sessions", "arrivals": {"process": "at_once"}, "sessions": 1, "turns": 2,
        "first_tokens": 12_800, "turn_tokens": 1280, "output_tokens": 64, "think_s": 50,
    }  # fmt: skip
    _, healthy = rows(simulation(workload=alone))
    assert healthy["moved_tokens"]
    # When the question is on its way: nobody knows of it yet.
    down = {"do": "link_down", "at_s": healthy["sent_s"] + K_RTT_S, "link": "east->west", "for_s": 300.0}
    world = simulation(workload=alone, timeline=[down])
    _, second = rows(world)
    assert (second["moved_tokens"], second["cached_tokens"], second["error"]) == (0, 0, None)
    works = world.world.engines["near-0"].works
    waited_s = second["ttft_s"] - works.prefill_s(second["prompt_tokens"], 0)
    least_s = works.prefill_s(healthy["prompt_tokens"], healthy["cached_tokens"])
    # So many times what was predicted: the rest's prefill, and a move no slower than the healthy one.
    least_s, most_s = (K_MOVE_FACTOR * one for one in (least_s, healthy["ttft_s"]))
    assert least_s < waited_s < most_s
    assert not any(pipe.transfers for pipe in world.world.network.pipes.values())


@settings(max_examples=25)
@given(
    seed=st.integers(1, 10**6),
    name=st.sampled_from(["paper", "prices"]),
    service=st.sampled_from(["arrival", "deadline"]),
    rate_rps=st.floats(0.05, 1.0),
    down_s=st.floats(0.5, 40),
    kill=st.sampled_from(["far-0", "near-0", "near-1"]),
)
def test_no_request_is_lost_or_answered_twice_whatever_fails_meanwhile(
    seed: int, name: str, service: str, rate_rps: float, down_s: float, kill: str
) -> None:
    world = simulation(
        policy={**K_PAPER, "name": name, "service": service if name == "prices" else "arrival"},
        seed=seed,
        workload={
            "kind": "sessions", "arrivals": {"process": "poisson", "rate_rps": rate_rps}, "requests": 60,
            "turns": 4, "first_tokens": 12_800, "turn_tokens": 1280, "output_tokens": 64, "think_s": 5,
        },
        timeline=[
            {"do": "link_down", "at_s": 20, "link": "east<->west", "for_s": down_s},
            {"do": "kill", "at_s": 25, "instance": kill, "restart_after_s": 10},
        ],
    )  # fmt: skip
    record = world.run()
    assert sorted(record.index) == list(range(60))
    assert not world.world.live
    for engine in world.world.engines.values():
        assert engine.reserved_tokens == engine.assigned == engine.running == 0
    for link in world.world.links.values():
        assert link.ledger.statistics().admitted == 0
        assert not link.pipe.transfers
