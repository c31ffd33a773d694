"""When the simulated door hears that a prefill has ended: as a router does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import prfaas.routing
from prfaas.config.experiment import Experiment
from prfaas.config.topology import Topology
from prfaas.simulator.build import Simulation, simulation_of

K_TOPOLOGIES = Path(prfaas.routing.__file__).parents[3] / "topologies"
K_RTT_S = 0.1


def simulation(policy: str, rate_mbps: float) -> Simulation:
    topology = {
        "name": "unit", "text": "two sites", "sites": {"east": {}, "west": {}},
        "links": [{"between": ["east", "west"], "rate_mbps": rate_mbps, "delay_ms": 500 * K_RTT_S}],
    }  # fmt: skip
    experiment = {
        "name": "unit", "description": "one request", "wall_time_s": 100, "network": "hundred-gig",
        "models": [{"name": "m", "profile": "1t-hybrid-h20"}],
        "instances": [
            {"name": "far", "site": "east", "role": "prefill", "profile": "1t-hybrid-h200"},
            {"name": "near", "site": "west", "role": "prefill"},
            {"name": "decode", "site": "west", "role": "decode"},
        ],
        "router": {"site": "west", "policy": {"name": policy}},
        "workload": {
            "kind": "synthetic", "arrivals": {"process": "at_once"}, "requests": 1,
            "input_tokens": 30_000, "output_tokens": 100,
        },
        "transfer": {"http_by_pump": True},
    }  # fmt: skip
    return simulation_of(
        Experiment.model_validate(experiment), K_TOPOLOGIES, topology=Topology.model_validate(topology),
        sample=False,
    )  # fmt: skip


def heard(world: Simulation) -> dict[str, Any]:
    """What the policy is told of the one request, and what became of it."""
    found: dict[str, Any] = {}
    policy = world.world.policy

    def listen(name: str) -> None:
        method = getattr(policy, name)

        def told(**fields: Any) -> Any:
            found.setdefault(name, {**fields})
            return method(**fields)

        setattr(policy, name, told)

    for name in ("on_dispatch", "on_prefill_done", "on_first_token"):
        listen(name)
    record = world.run()
    return {**found, "landed_s": record.ttft_s[0]}


@pytest.mark.parametrize("rate_mbps", [10_000, 1_000])
def test_a_far_prefill_s_end_is_heard_once_its_bytes_are_across_with_the_tail_that_was_predicted(
    rate_mbps: float,
) -> None:
    found = heard(simulation("naive", rate_mbps))
    done, chosen = found["on_prefill_done"], found["on_dispatch"]["decision"].chosen
    assert chosen.prefill_site == "east"
    assert done["now"] == pytest.approx(found["landed_s"] + K_RTT_S)
    assert done["ago_s"] == chosen.tail_s > K_RTT_S


def test_a_prefill_s_end_at_home_is_heard_at_once() -> None:
    found = heard(simulation("homogeneous", 10_000))
    assert found["on_prefill_done"]["now"] == pytest.approx(found["landed_s"])
    assert found["on_prefill_done"].get("ago_s", 0.0) == 0.0
