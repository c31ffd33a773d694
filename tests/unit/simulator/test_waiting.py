"""What a simulated door holds for its instance: in time more often, and no instance waits for it."""

from __future__ import annotations

from pathlib import Path

import prfaas.routing
from prfaas.config.experiment import Experiment, load_experiment
from prfaas.config.policy import PolicyConfig
from prfaas.routing.prices import PricesPolicy
from prfaas.simulator.build import simulation_of

K_TOPOLOGIES = Path(prfaas.routing.__file__).parents[3] / "topologies"
K_REQUESTS = 400


def in_time(bind: str, repetition: int) -> int:
    """Requests within their SLO, of bursts at 0.85 of capacity. Looks at the instances all the while."""
    experiment = load_experiment("claim-bursts-gamma", K_TOPOLOGIES)
    assert isinstance(experiment, Experiment)
    workload = experiment.workload.model_copy(update={"requests": K_REQUESTS})
    config = PolicyConfig.model_validate({"name": "prices", "service": "deadline", "bind": bind})
    made = simulation_of(
        experiment.model_copy(update={"workload": workload}),
        K_TOPOLOGIES,
        repetition=repetition,
        policy=config,
        sample=False,
    )
    world, busy_s = made.world, dict.fromkeys(made.world.engines, 0.0)
    policy = world.policy
    assert isinstance(policy, PricesPolicy)

    def look(now: float) -> None:
        for name, lane in policy.lanes.lanes.items():
            if world.engines[name].work_s(now) > 0 or not any(one.hold for one in lane.hopeful):
                busy_s[name] = now
            assert now - busy_s[name] < 0.1, f"{name} has nothing to do while something is held for it"
        if world.live:
            world.agenda.at_in_background(now + 0.02, look)

    world.agenda.at_in_background(2.0, look)
    record = made.run()
    assert sorted(record.index) == list(range(K_REQUESTS))
    assert not any(record.error)
    assert (len(policy.lanes), policy.lanes.held()) == (0, 0)
    local = policy.paths.costs("west", "")
    rows = zip(record.ttft_s, record.prompt_tokens, strict=True)
    return sum(ttft_s <= 2 + 2 * local.prefill_s(tokens, 0) for ttft_s, tokens in rows)


def test_what_is_held_is_in_time_more_often_and_no_instance_waits_for_it() -> None:
    start, arrival = (sum(in_time(bind, one) for one in range(3)) for bind in ("start", "arrival"))
    assert start > 1.01 * arrival  # one run's bursts say little
