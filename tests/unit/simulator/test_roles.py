"""The slow loop on virtual time: roles follow the link, in the time that the profile tells; none is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import prfaas.routing
from prfaas.config.experiment import Experiment
from prfaas.simulator.build import Simulation, simulation_of
from prfaas.simulator.record import Record

K_TOPOLOGIES = Path(prfaas.routing.__file__).parents[3] / "topologies"
K_FALLS_S = 200.0
K_REQUESTS = 1400
K_LOOP: dict[str, Any] = {"dry_run": False}


def simulation(folder: Path, switch: dict[str, float] | None = None, **fields: Any) -> Simulation:
    """The 1T case at 1.9 req/s. Its link falls from 100 to 5 Gbit/s at 200 s, where 3 prefill and 5 decode
    instances carry 1.77 req/s, 4 and 4 some 2.0, and 5 and 3 2.25."""
    profile = yaml.safe_load((K_TOPOLOGIES / "profiles/1t-hybrid-h20.yaml").read_text())
    profile.pop("role_switch", None)
    if switch is not None:
        profile["role_switch"] = switch | {"source": "made up"}
    (folder / "1t-hybrid-h20.yaml").write_text(yaml.safe_dump(profile))
    slow_loop = fields.pop("slow_loop", None)
    requests = fields.pop("requests", K_REQUESTS)
    rate_rps = fields.pop("rate_rps", 1.9)
    base: dict[str, Any] = {
        "name": "unit",
        "description": "a link that falls",
        "wall_time_s": 100,
        "network": "hundred-gig",
        "models": [{"name": "m", "profile": str(folder / "1t-hybrid-h20.yaml")}],
        "instances": [
            {"name": "far", "site": "east", "role": "prefill", "count": 4, "profile": "1t-hybrid-h200"},
            {"name": "near", "site": "west", "role": "prefill", "count": 3},
            {"name": "decode", "site": "west", "role": "decode", "count": 5},
        ],
        "router": {"site": "west", "policy": {"name": "prices"}, "slow_loop": slow_loop},
        "workload": {
            "kind": "synthetic",
            "arrivals": {"process": "poisson", "rate_rps": rate_rps},
            "input_tokens": {
                "distribution": "truncated_lognormal", "mu": 9.9, "sigma": 1.0, "min": 128, "max": 131072,
            },
            "output_tokens": 1024,
            "requests": requests,
        },
        "timeline": [
            {"do": "set_link", "at_s": K_FALLS_S, "link": "east<->west", "set": {"rate_mbps": 5000}}
        ],
        "request_timeout_s": 3600,
    }  # fmt: skip
    return simulation_of(Experiment.model_validate(base | fields), K_TOPOLOGIES, sample=False)


def events(record: Record, word: str) -> list[tuple[float, str]]:
    return [(at_s, text) for at_s, text in record.events if text.startswith(word)]


def out_s(text: str) -> float:
    """What a step says that it costs."""
    return float(text.partition("out for ")[2].partition(" s")[0])


def assert_whole(played: Simulation, record: Record, requests: int) -> None:
    assert sorted(record.index) == list(range(requests))
    assert not any(row["error"] for row in record.rows("m"))
    for engine in played.world.engines.values():
        assert engine.idle
        assert engine.assigned == 0


def test_roles_follow_a_link_that_falls_in_the_time_that_the_profile_tells(tmp_path: Path) -> None:
    switch = {"to_prefill_s": 20.0, "to_decode_s": 0.0}
    held, moved = (simulation(tmp_path, switch, slow_loop=loop) for loop in (None, K_LOOP))
    before, after = held.run(), moved.run()
    assert_whole(held, before, K_REQUESTS)
    assert_whole(moved, after, K_REQUESTS)
    (drained_s, first), (_, second) = events(after, "drain")
    (asked_s, _), _ = events(after, "switch")
    (turned_s, told), (_, again) = events(after, "resume")
    assert K_FALLS_S < drained_s < asked_s
    assert told.endswith("switched to prefill")
    assert again.endswith("switched to prefill")
    assert turned_s - asked_s == pytest.approx(20.0)
    assert out_s(first) > 20, "what it has is to be answered first"
    # The last one tells of the next, unless that has more work.
    assert out_s(second) >= float(f"{(asked_s - drained_s) / 2 + 20:.3g}")
    assert sum(engine.role == "prefill" for engine in moved.world.engines.values()) == 4 + 5
    waits = [record.summary(400)["ttft_mean_s"] for record in (before, after)]
    assert waits[1] < waits[0] / 2


def test_what_takes_longer_than_it_holds_is_left(tmp_path: Path) -> None:
    slow = {"to_prefill_s": 100.0, "to_decode_s": 0.0}
    played = simulation(tmp_path, slow, slow_loop=K_LOOP | {"holds_s": 200.0}, requests=700)
    assert not events(played.run(), "drain")


def test_a_dry_run_says_what_it_would_do_and_changes_nothing(tmp_path: Path) -> None:
    held, dry = (simulation(tmp_path, slow_loop=loop, requests=700) for loop in (None, {"dry_run": True}))
    before, after = held.run(), dry.run()
    assert list(before.rows("m")) == list(after.rows("m"))
    assert all("(dry run)" in text for _, text in events(after, "drain"))
    assert events(after, "drain")


def test_an_instance_that_dies_while_it_changes_its_role_comes_back_in_its_old_one(tmp_path: Path) -> None:
    switch = {"to_prefill_s": 40.0, "to_decode_s": 0.0}
    first = simulation(tmp_path, switch, slow_loop=K_LOOP, requests=700).run()
    at_s, text = events(first, "switch")[0]
    name = text.split()[1]
    falls = {"do": "set_link", "at_s": K_FALLS_S, "link": "east<->west", "set": {"rate_mbps": 5000}}
    dies = {"do": "kill", "at_s": at_s + 5, "instance": name, "restart_after_s": 100}
    played = simulation(tmp_path, switch, slow_loop=K_LOOP, requests=700, timeline=[falls, dies])
    record = played.run()
    assert_whole(played, record, 700)
    assert "conversion failed: died" in events(record, "resume")[0][1]
    assert played.world.engines[name].role == "decode"
    assert not played.world.engines[name].draining


def test_roles_change_beyond_capacity_too_where_no_instance_is_ever_without_work(tmp_path: Path) -> None:
    """Five of eight prefill, and their link recovers: 3/5 would carry 3.2 req/s, 5/3 carries 2.35; 3 come,
    so that each prefill instance has work for minutes."""
    changes: dict[str, Any] = {
        "requests": 1500,
        "instances": [
            {"name": "far", "site": "east", "role": "prefill", "count": 4, "profile": "1t-hybrid-h200"},
            {"name": "near", "site": "west", "role": "prefill", "count": 5},
            {"name": "decode", "site": "west", "role": "decode", "count": 3},
        ],
        "timeline": [
            {"do": "set_link", "at_s": at_s, "link": "east<->west", "set": {"rate_mbps": rate_mbps}}
            for at_s, rate_mbps in ((1.0, 5000), (200.0, 100_000))
        ],
    }
    switch = {"to_prefill_s": 10.0, "to_decode_s": 10.0}
    took_s = []
    for loop in (None, K_LOOP):
        played = simulation(tmp_path, switch, slow_loop=loop, rate_rps=3.0, **changes)
        record = played.run()
        assert_whole(played, record, 1500)
        took_s.append(sum(row["e2e_s"] for row in record.rows("m")) / 1500)
        if loop is not None:
            assert [text.split()[2] for _, text in events(record, "switch")][:1] == ["as"]
            assert any(text.endswith("switched to decode") for _, text in events(record, "resume"))
            assert not any("not drained" in text for _, text in events(record, "resume"))
    assert took_s[1] < 0.95 * took_s[0]
