"""Whole simulated systems: conservation, repeatability, failures, and the identity of decisions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prfaas.routing
from prfaas.config.experiment import Experiment
from prfaas.config.topology import Topology
from prfaas.model.errors import UsageError
from prfaas.model.ids import LinkId
from prfaas.simulator.build import Simulation, simulation_of
from prfaas.simulator.coverage import extrapolations
from prfaas.simulator.engine import Engine
from prfaas.simulator.job import Job
from prfaas.simulator.record import Record
from prfaas.simulator.settings import Settings

K_TOPOLOGIES = Path(prfaas.routing.__file__).parents[3] / "topologies"
K_TOPOLOGY = Topology.model_validate(
    {
        "name": "unit",
        "text": "two sites",
        "sites": {"east": {}, "west": {}},
        "links": [{"between": ["east", "west"], "rate_mbps": 10_000, "delay_ms": 10}],
    }
)


def experiment(**fields: object) -> Experiment:
    base: dict[str, object] = {
        "name": "unit",
        "description": "a small world",
        "wall_time_s": 100,
        "network": "hundred-gig",
        "models": [{"name": "m", "profile": "1t-hybrid-h20"}],
        "instances": [
            {"name": "far", "site": "east", "role": "prefill", "count": 2, "profile": "1t-hybrid-h200"},
            {"name": "near", "site": "west", "role": "prefill", "count": 2},
            {"name": "decode", "site": "west", "role": "decode", "count": 3},
        ],
        "router": {"site": "west", "policy": {"name": "prices"}},
        "workload": {
            "kind": "synthetic",
            "arrivals": {"process": "poisson", "rate_rps": 1.5},
            "input_tokens": {
                "distribution": "truncated_lognormal", "mu": 9.9, "sigma": 1.0, "min": 128, "max": 131072,
            },
            "output_tokens": 200,
            "requests": 150,
        },
        "request_timeout_s": 600,
    }  # fmt: skip
    return Experiment.model_validate(base | fields)


def simulation(**fields: object) -> Simulation:
    return simulation_of(experiment(**fields), K_TOPOLOGIES, topology=K_TOPOLOGY, sample=False)


def rows(record: Record) -> list[dict[str, object]]:
    return list(record.rows("m"))


def policy(name: str, **more: object) -> dict[str, object]:
    return {"site": "west", "policy": {"name": name, **more}}


def assert_whole(world: Simulation, record: Record, requests: int) -> None:
    """Every request ended once, and nothing is held any more."""
    assert sorted(record.index) == list(range(requests))
    assert not world.world.live
    for engine in world.world.engines.values():
        assert engine.reserved_tokens == 0
        assert engine.assigned == 0
        assert engine.running == 0
    for link in world.world.links.values():
        assert link.ledger.statistics().admitted == 0
        assert not link.pipe.transfers


@pytest.mark.parametrize("name", ["homogeneous", "naive", "paper", "prices"])
def test_every_policy_serves_every_request_and_leaves_nothing_behind(name: str) -> None:
    world = simulation(router=policy(name))
    record = world.run()
    assert_whole(world, record, 150)
    assert not any(row["error"] for row in rows(record))


def test_collocated_engines_do_both() -> None:
    world = simulation(
        router=policy("collocated"),
        instances=[{"name": "both", "site": "west", "role": "collocated", "count": 5}],
    )
    record = world.run()
    assert_whole(world, record, 150)
    assert not any(row["error"] for row in rows(record))


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    first, again, other = (rows(simulation(seed=seed).run()) for seed in (1, 1, 2))
    assert first == again
    assert first != other


K_SESSIONS = {
    "kind": "sessions",
    "arrivals": {"process": "poisson", "rate_rps": 0.4},
    "requests": 150,
    "turns": 5,
    "first_tokens": 6000,
    "turn_tokens": 2000,
    "output_tokens": 200,
    "think_s": 5,
}


@pytest.mark.parametrize("reused", [False, True])
def test_the_policy_decides_for_the_simulator_as_it_would_for_a_router(reused: bool) -> None:
    """A fresh policy, told the same in the same order, decides the same: nothing else enters."""
    world = simulation(**({"workload": K_SESSIONS} if reused else {}))
    deciding, told = world.world.policy, []

    def listen(name: str) -> None:
        method = getattr(deciding, name)

        def heard(*args: object, **kwargs: object) -> object:
            answer = method(*args, **kwargs)
            if name == "decide":
                view, snapshot, now = args
                kept = type(snapshot)(snapshot.now, dict(snapshot.sites), dict(snapshot.links))
                told.append((name, (view, kept, now), {}, answer))
            else:
                told.append((name, args, kwargs, None))
            return answer

        setattr(deciding, name, heard)

    hooks = ("on_dispatch", "on_prefill_done", "on_first_token", "on_refused", "on_failed", "on_finished")
    for name in ("decide", *hooks):
        listen(name)
    world.run()
    fresh = type(deciding)(deciding.config, deciding.fleet)
    decided = reusing = 0
    for name, args, kwargs, answer in told:
        found = getattr(fresh, name)(*args, **kwargs)
        if name == "decide":
            decided += 1
            reusing += bool(args[0].cached_tokens)
            assert (found.action, found.prefill_site, found.reason) == (
                answer.action,
                answer.prefill_site,
                answer.reason,
            )
    assert decided >= 150
    assert (reusing > 50) == reused


def test_a_dead_link_sends_its_requests_elsewhere_and_none_is_lost() -> None:
    world = simulation(
        router=policy("naive"),
        timeline=[{"do": "link_down", "at_s": 20, "link": "east->west", "for_s": 15}],
    )
    record = world.run()
    assert_whole(world, record, 150)
    assert any("down" in text for _, text in record.events)
    assert {row["site"] for row in rows(record)} >= {"east"}


def test_what_is_under_way_waits_for_a_link_to_come_back_as_pumps_do() -> None:
    flap = {"do": "link_down", "at_s": 20, "link": "east<->west", "for_s": 2}
    world = simulation(router=policy("prices"), timeline=[flap])
    failed = []
    world.world.policy.on_failed = lambda **told: failed.append(told)
    record = world.run()
    assert_whole(world, record, 150)
    assert any("believed down" in text for _, text in record.events)
    assert not failed
    late = [row for row in rows(record) if row["sent_s"] < 20.5 < 23 < row["sent_s"] + row["ttft_s"]]
    assert any(row["site"] == "east" for row in late)


def test_a_door_hears_that_a_link_is_back_once_its_streams_have_found_that_out() -> None:
    down = {"do": "link_down", "at_s": 20, "link": "east<->west", "for_s": 2}
    world = simulation(router=policy("prices"), timeline=[down])
    believed = {}

    def look(now: float) -> None:
        believed[round(now, 1)] = world.world.links[LinkId("east", "west")].estimate.up

    for at_s in (19.9, 21.9, 22.4, 23.0):  # the streams are replaced after 1.5 s, and asked for twice
        world.world.agenda.at(at_s, look)
    world.run()
    assert believed == {19.9: True, 21.9: False, 22.4: False, 23.0: True}


def test_a_link_that_dies_at_rest_is_found_dead_by_a_probe() -> None:
    workload = experiment().workload.model_dump() | {"arrivals": {"process": "poisson", "rate_rps": 0.2}}
    down = {"do": "set_link", "at_s": 0, "link": "east<->west", "set": {"down": True}}
    world = simulation(router=policy("prices"), workload=workload | {"requests": 20}, timeline=[down])
    record = world.run()
    assert_whole(world, record, 20)
    (at_s, _), *_ = [one for one in record.events if "east->west believed down" in one[1]]
    assert 1.5 < at_s < 2.5  # probed after a second, silent for 0.8
    assert {row["site"] for row in rows(record) if row["sent_s"] > 2.5} == {"west"}


def test_a_door_gives_an_attempt_up_that_a_dead_link_keeps_waiting_and_tries_another_site() -> None:
    cut = [{"do": "set_link", "at_s": 20, "link": "east<->west", "set": {"down": True}}]
    world = simulation(router=policy("prices"), timeline=cut)
    failed = []
    on_failed = world.world.policy.on_failed

    def hear(**told: object) -> None:
        failed.append(told)
        on_failed(**told)

    world.world.policy.on_failed = hear
    record = world.run()
    assert_whole(world, record, 150)
    assert not any(row["error"] for row in rows(record))
    assert failed
    assert all(told["reason"] == "no first token in time" for told in failed)
    by_index = {int(row["id"]): row for row in rows(record)}
    for told in failed:
        row = by_index[int(told["request"])]
        assert told["now"] >= row["sent_s"] + 10  # the router's least patience
        assert row["site"] == "west"


def test_without_a_door_nobody_hears_of_a_dead_link_or_gives_up_before_the_request_s_own_time() -> None:
    down = {"do": "link_down", "at_s": 20, "link": "east<->west", "for_s": 30}
    instances = [
        {"name": "far", "site": "east", "role": "prefill", "count": 4, "profile": "1t-hybrid-h200"},
        {"name": "decode", "site": "west", "role": "decode", "count": 3},
    ]
    world = simulation(router=None, instances=instances, timeline=[down])
    record = world.run()
    assert_whole(world, record, 150)
    assert not any(row["error"] for row in rows(record))
    waited = [row for row in rows(record) if 20 < row["sent_s"] < 50]
    assert waited
    assert all(row["sent_s"] + row["ttft_s"] > 50 for row in waited)
    short = simulation(router=None, instances=instances, timeline=[down], request_timeout_s=25)
    errors = {row["error"] for row in rows(short.run())}
    assert errors == {None, "deadline passed"}


def test_a_request_that_is_sent_into_a_dead_link_crosses_it_with_a_later_repetition(monkeypatch) -> None:
    """Over a new connection: a second after another (Linux), until the link is up again."""
    begun: list[float] = []
    prefill = Engine.prefill

    def hear(engine: Engine, job: Job, now: float) -> None:
        begun.append(now)
        prefill(engine, job, now)

    monkeypatch.setattr(Engine, "prefill", hear)
    for down in ([], [{"do": "link_down", "at_s": 0, "link": "east<->west", "for_s": 2.5}]):
        workload = experiment().workload.model_dump() | {"requests": 1}
        simulation(router=policy("naive"), workload=workload, timeline=down).run()
    at_once_s, late_s = begun
    assert at_once_s < 1
    assert late_s == pytest.approx(at_once_s + 2)


def test_a_link_flaps_at_the_times_at_which_the_testbed_s_does() -> None:
    flap = {"do": "flap", "at_s": 20, "link": "east->west", "on_s": 5, "off_s": 2, "times": 2}
    told = simulation(router=policy("naive"), timeline=[flap]).run().events
    downs = [(round(at_s, 6), "True" in text) for at_s, text in told if "east->west: down" in text]
    assert downs == [(20, True), (22, False), (27, True), (29, False)]


def test_a_link_that_stays_down_does_not_keep_the_run_from_ending() -> None:
    cut = [{"do": "set_link", "at_s": 20, "link": "east->west", "set": {"down": True}}]
    record = simulation(router=policy("naive"), timeline=cut).run()
    assert sorted(record.index) == list(range(150))
    told = []
    again = simulation(router=policy("naive"), timeline=cut).run(lambda now, done: told.append(done))
    assert rows(again) == rows(record)
    assert told[-1] == 150


def test_what_can_never_end_is_reported_as_unfinished() -> None:
    """Nobody watches this link and no request has a deadline: only the run's own end is left."""
    cut = [{"do": "set_link", "at_s": 20, "link": "east->west", "set": {"down": True}}]
    world = simulation_of(
        experiment(router=policy("naive"), timeline=cut),
        K_TOPOLOGIES,
        topology=K_TOPOLOGY,
        settings=Settings(),
        sample=True,
    )
    for link in world.world.links.values():
        link._went_down = lambda pipe, now: None
    record = world.run()
    assert_whole(world, record, 150)
    assert {row["error"] for row in rows(record)} >= {"unfinished"}


def test_lengths_beyond_a_profile_are_told() -> None:
    world = simulation()
    world.run()
    assert extrapolations(world.world) == []
    long = experiment().workload.model_dump() | {"input_tokens": 200_000, "requests": 5}
    world = simulation(router=policy("naive"), workload=long)
    world.run()
    (line,) = extrapolations(world.world)
    assert line.startswith("5 of 5 prompts at east lie outside ")
    assert "1t-hybrid-h200" in line


def test_a_killed_prefill_instance_costs_time_and_not_requests() -> None:
    world = simulation(timeline=[{"do": "kill", "at_s": 10, "instance": "far-0", "restart_after_s": 20}])
    record = world.run()
    assert_whole(world, record, 150)
    assert not any(row["error"] for row in rows(record))


def test_a_killed_decode_instance_breaks_only_answers_that_had_begun() -> None:
    world = simulation(timeline=[{"do": "kill", "at_s": 30, "instance": "decode-0"}])
    record = world.run()
    assert_whole(world, record, 150)
    broken = [row for row in rows(record) if row["error"]]
    assert broken
    assert all(row["ttft_s"] is not None for row in broken)


def test_less_bandwidth_means_less_offloading() -> None:
    def share(rate_mbps: float) -> float:
        changed = [{"do": "set_link", "at_s": 0, "link": "east->west", "set": {"rate_mbps": rate_mbps}}]
        found = rows(simulation(timeline=changed).run())
        return sum(row["site"] == "east" for row in found) / len(found)

    assert share(10_000) > share(300) > 0


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    named=st.sampled_from(
        [("prices", "arrival"), ("prices", "deadline"), ("paper", "arrival"), ("naive", "arrival")]
    ),
    down_s=st.floats(0.5, 40),
    kill=st.sampled_from(["far-0", "near-1", "decode-1"]),
    rate_rps=st.floats(0.5, 4),
)
def test_no_request_is_lost_or_answered_twice_whatever_fails(seed, named, down_s, kill, rate_rps) -> None:
    workload = experiment().workload.model_dump() | {
        "requests": 40,
        "arrivals": {"process": "poisson", "rate_rps": rate_rps},
    }
    world = simulation(
        seed=seed,
        router=policy(named[0], service=named[1]),
        workload=workload,
        request_timeout_s=200,
        timeline=[
            {"do": "link_down", "at_s": 5, "link": "east<->west", "for_s": down_s},
            {"do": "kill", "at_s": 8, "instance": kill, "restart_after_s": 10},
        ],
    )
    assert_whole(world, world.run(), 40)


def test_looking_at_a_run_does_not_change_it() -> None:
    plain, sampled = (
        simulation_of(experiment(), K_TOPOLOGIES, topology=K_TOPOLOGY, sample=sample).run()
        for sample in (False, True)
    )
    assert rows(plain) == rows(sampled)
    assert sampled.link_rows
    assert sampled.log_rows


def test_what_is_seen_of_a_link_is_what_it_sent() -> None:
    record = simulation_of(experiment(), K_TOPOLOGIES, topology=K_TOPOLOGY).run()
    seen = sum(sent for _, link, sent, _ in record.link_rows if link == "east->west")
    assert seen == pytest.approx(sum(record.kv_bytes), rel=0.02)  # the last sample is before the end
    assert min(backlog for _, _, _, backlog in record.link_rows) >= 0


K_HOMES = {
    "instances": [
        {"name": "far", "site": "east", "role": "prefill", "count": 2, "profile": "1t-hybrid-h200"},
        {"name": "near", "site": "west", "role": "prefill"},
        {"name": "decode", "site": "west", "role": "decode", "count": 2},
        {"name": "lone", "site": "north", "role": "prefill"},
        {"name": "others", "site": "north", "role": "decode", "count": 2},
    ]
}


def homes(*names: str) -> Simulation:
    topology = Topology.model_validate(
        K_TOPOLOGY.model_dump(exclude={"links"})
        | {
            "sites": {"east": {}, "west": {}, "north": {}},
            "links": [{"between": ["east", "west"], "rate_mbps": 10_000, "delay_ms": 10}],
            "partial": True,
        }
    )
    asked = experiment(**K_HOMES)
    workload = asked.workload.model_copy(update={"homes": names})
    return simulation_of(
        asked.model_copy(update={"workload": workload}), K_TOPOLOGIES, topology=topology, sample=False
    )


def test_each_request_is_decoded_at_its_home_and_prefilled_where_a_link_leads_there() -> None:
    record = homes("west", "north").run()
    sites = {(index % 2, site) for index, site in zip(record.index, record.site, strict=True)}
    assert {(home, record.names[site]) for home, site in sites} == {(0, "east"), (0, "west"), (1, "north")}


def test_a_home_that_does_not_decode_is_named() -> None:
    with pytest.raises(UsageError, match=r"workload\.homes: found east; sites that decode are north, west"):
        homes("west", "east")


def test_requests_that_wait_too_long_are_given_up_each_at_its_own_time() -> None:
    world = simulation(request_timeout_s=4)
    record = world.run()
    assert_whole(world, record, 150)
    late = [row for row in rows(record) if row["error"]]
    assert {row["error"] for row in late} == {"deadline passed"}
    assert {row["e2e_s"] for row in late} == {4.0}
    assert all(row["error"] or row["ttft_s"] <= 4 for row in rows(record))
    assert 5 < len(late) < 100


def test_several_homes_weigh_sites_by_all_that_there_is_and_not_by_their_surroundings_alone() -> None:
    """What a snapshot lacks counts as gone: each request must see every site, or prices never settle."""
    simulated = homes("west", "north")
    seen = []
    decide = simulated.world.policy.decide

    def listen(view, snapshot, now):
        seen.append(set(snapshot.sites))
        return decide(view, snapshot, now)

    simulated.world.policy.decide = listen  # type: ignore[method-assign]
    simulated.run()
    assert all(sites == {"east", "west", "north"} for sites in seen)


def test_what_the_door_believes_cached_is_a_little_late_and_engines_find_what_they_have() -> None:
    asked = experiment(workload=K_SESSIONS)
    records = {
        delay_s: simulation_of(
            asked, K_TOPOLOGIES, topology=K_TOPOLOGY, sample=False, settings=Settings(index_delay_s=delay_s)
        ).run()
        for delay_s in (0.0, 0.05, 1e6)
    }
    reused = {delay_s: sum(record.cached_tokens) for delay_s, record in records.items()}
    assert reused[0.05] == pytest.approx(reused[0.0], rel=0.1)
    assert reused[1e6] < 0.9 * reused[0.0]  # never told, the door sends turns anywhere
    assert reused[1e6] > 0


@pytest.mark.parametrize(("tokens", "rounds"), [(1000, 0), (4000, 1), (60_000, 4)])
def test_a_prompt_crosses_to_another_site_in_round_trips_unless_by_the_pumps(tokens, rounds) -> None:
    ttft_s = []
    for http_by_pump in (True, False):
        alone = {
            "kind": "synthetic", "arrivals": {"process": "at_once"}, "requests": 1,
            "input_tokens": tokens, "output_tokens": 1,
        }  # fmt: skip
        sent = simulation(workload=alone, router=policy("naive"), transfer={"http_by_pump": http_by_pump})
        ttft_s.append(sent.run().ttft_s[0])
    assert ttft_s[1] - ttft_s[0] == pytest.approx(rounds * 0.02)


def test_prompts_that_follow_each_other_start_slowly_once_where_the_connection_is_kept() -> None:
    ttft_s = {}
    for rate_rps in (0.3, 0.1):
        load = {
            "kind": "synthetic", "arrivals": {"process": "paced", "rate_rps": rate_rps}, "requests": 3,
            "input_tokens": 60_000, "output_tokens": 1,
        }  # fmt: skip
        sent = simulation(workload=load, router=policy("naive"), transfer={"http_by_pump": False})
        ttft_s[rate_rps] = sent.run().ttft_s
    assert ttft_s[0.3][0] - ttft_s[0.3][2] == pytest.approx(4 * 0.02)
    assert ttft_s[0.1][2] == pytest.approx(ttft_s[0.1][0])
