"""Rounds of trouble: the same requests over another time, disks and clocks that are upset, what is held."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prfaas.config.experiment import Experiment, Kill, Round, load_experiment, parts_of
from prfaas.config.loading import check
from prfaas.model.errors import ConfigError, MachineError
from prfaas_testbed.experiment import held, rounds, upset
from prfaas_testbed.experiment.load import plan
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.timeline import Timeline, steps_of
from prfaas_testbed.network import disk

BASE: dict[str, Any] = {
    "name": "t", "description": "d", "wall_time_s": 10, "network": "hello",
    "models": [{"name": "toy", "profile": "toy"}],
    "instances": [
        {"name": "p", "site": "east", "role": "prefill"}, {"name": "d", "site": "west", "role": "decode"},
    ],
    "router": {"site": "west"},
    "workload": {
        "kind": "synthetic", "arrivals": {"process": "poisson", "rate_rps": 2},
        "input_tokens": 10, "output_tokens": 2, "duration_s": 10,
    },
}  # fmt: skip


def experiment_of(**more: Any) -> Experiment:
    return check({**BASE, **more}, Experiment, "file")


def test_a_round_plays_the_same_requests_over_its_own_time() -> None:
    experiment = experiment_of()
    requests = plan(experiment, False, 1)
    longer = rounds.stretched(requests, experiment, Round(name="x", duration_s=25))
    assert [one.tokens for one in longer] == [one.tokens for one in requests]
    assert [one.at_s for one in longer] == pytest.approx([2.5 * one.at_s for one in requests])
    assert rounds.stretched(requests, experiment, Round(name="x")) == requests
    probe = rounds.probe_of(requests, False)
    assert probe == rounds.probe_of(requests, False)
    assert probe.id not in {one.id for one in requests}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rounds": [{"name": "a"}], "timeline": [{"do": "fill_disk", "at_s": 1, "for_s": 1}]}, "timelines"),
        ({"rounds": [{"name": "a"}, {"name": "a"}]}, "two rounds"),
        ({"rounds": [{"name": "a", "timeline": [{"do": "kill", "at_s": 1, "instance": "x"}]}]}, "kills x"),
        ({"router": None, "timeline": [{"do": "kill", "at_s": 1, "instance": "router"}]}, "kills router"),
    ],
)
def test_rounds_that_make_no_sense_are_refused(more: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        experiment_of(**more)


def test_a_full_disk_and_a_stepped_clock_end_and_a_router_can_be_killed() -> None:
    timeline = [
        {"do": "fill_disk", "at_s": 1, "for_s": 2},
        {"do": "step_clock", "at_s": 2, "site": "east", "step_s": -60, "for_s": 3},
        {"do": "kill", "at_s": 4, "instance": "router", "restart_after_s": 1},
    ]
    experiment = experiment_of(rounds=[{"name": "all", "timeline": timeline}])
    steps = steps_of(experiment.rounds[0].timeline)
    assert [(step.at_s, step.event.do, step.phase) for step in steps] == [
        (1, "fill_disk", "begin"), (2, "step_clock", "begin"), (3, "fill_disk", "end"),
        (4, "kill", "begin"), (5, "step_clock", "end"), (5, "kill", "end"),
    ]  # fmt: skip
    nobody: Any = None
    assert Timeline(experiment.events(), nobody, nobody).kills
    assert not Timeline(experiment.events()[:2], nobody, nobody).kills


def test_only_a_disk_of_its_own_is_filled(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no disk of its own"):
        disk.fill_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_step_changes_the_time_of_day_of_the_site_s_programs_alone(tmp_path: Path) -> None:
    clocks = upset.Clocks(tmp_path)
    code = "import time; print(time.time() - {}, time.monotonic())"
    for site, seconds in (("east", 0), ("east", 3600), ("west", 0), ("east", -3600)):
        clocks.step(site, seconds)
        true_s = time.time()
        out = subprocess.run(
            [sys.executable, "-S", "-c", code.format(true_s)],
            env={**os.environ, **clocks.environment(site)}, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        later_s, monotonic_s = map(float, out.split())
        assert later_s == pytest.approx(seconds, abs=60)
        assert monotonic_s == pytest.approx(time.monotonic(), abs=60)
    assert struct.unpack("=q", (tmp_path / "clock-east").read_bytes()) == (-3600,)


def test_what_a_site_holds_is_read_from_its_servers_and_its_pump() -> None:
    row = {
        "num_used_tokens": 70, "num_running_reqs": 1, "num_waiting_reqs": 2,
        "disaggregation": {"prefill_inflight_queue_reqs": 3, "kv_transfer_speed": 9.0},
    }  # fmt: skip
    assert held.of_server(row) == {"pages": 70, "requests": 6}
    assert held.of_server({**row, "disaggregation": None}) == {"pages": 70, "requests": 3}
    stats = {"leases": 2, "incoming": 1, "peers": [{"transfers": 4}, {"transfers": 0}]}
    assert held.of_pump(stats) == {"leases": 2, "transfers": 5}


def test_the_matrix_s_pumps_are_left_to_those_who_miss_them() -> None:
    for _, experiment in parts_of(load_experiment("claim-faults", K_TOPOLOGIES), K_TOPOLOGIES):  # type: ignore[arg-type]
        for event in experiment.events():
            if isinstance(event, Kill):
                assert (event.restart_after_s is None) == (event.what == "pump")
