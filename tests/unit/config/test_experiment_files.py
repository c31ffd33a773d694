"""Experiment files: those that come with the project are whole, and faulty ones are told apart by field and
value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prfaas.config.experiment import (
    Experiment,
    ExperimentSet,
    directed,
    find_file,
    load_experiment,
    merged,
    parts_of,
)
from prfaas.config.loading import check
from prfaas.config.workload import Azure
from prfaas.model.errors import ConfigError, UsageError
from prfaas_testbed.experiment.checks import require_known
from prfaas_testbed.experiment.runner import Results
from prfaas_testbed.experiment.timeline import steps_of

TOPOLOGIES = Path(__file__).parents[3] / "topologies"
NAMES = sorted(path.stem for path in (TOPOLOGIES / "experiments").glob("*.yaml"))

UDP_WITHOUT_RATE = {
    "do": "cross_traffic", "at_s": 1, "source": "a", "target": "b", "kind": "udp", "for_s": 1
}  # fmt: skip


def smallest(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "t", "description": "d", "wall_time_s": 10, "network": "hello",
        "models": [{"name": "toy", "profile": "toy"}],
        "instances": [
            {"name": "p", "site": "east", "role": "prefill"},
            {"name": "d", "site": "west", "role": "decode"},
        ],
        "workload": {
            "kind": "synthetic", "arrivals": {"process": "poisson", "rate_rps": 1},
            "input_tokens": 10, "output_tokens": 2, "requests": 3,
        },
    }  # fmt: skip
    return merged(base, changes)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_comes_with_the_project_is_whole(name: str) -> None:
    choice = load_experiment(name, TOPOLOGIES)
    assert choice.name == name
    parts = parts_of(choice, TOPOLOGIES) if isinstance(choice, ExperimentSet) else [(name, choice)]
    for part, experiment in parts:
        require_known(experiment.checks, part)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"speed": 3}, "speed: found 3; unknown field"),
        ({"wall_time_s": -1}, "wall_time_s: found -1"),
        ({"models": [{"name": "toy"}]}, "model toy needs a profile"),
        ({"instances": [{"name": "p", "site": "east", "role": "prefill"}]}, "come together"),
        ({"instances": [{"name": "p", "site": "east", "role": "cook"}]}, "role: found 'cook'"),
        ({"instances": [{"name": "p", "site": "a", "role": "collocated"}] * 2}, "two instances are named p"),
        ({"checks": [{"name": "lost"}]}, "needs at_least or at_most"),
        ({"timeline": [{"do": "explode", "at_s": 1}]}, "explode"),
        ({"timeline": [{"do": "kill", "at_s": 1, "instance": "z"}]}, "kills z"),
        ({"timeline": [{"do": "link_down", "at_s": 1, "link": "east-west", "for_s": 1}]}, "link"),
        ({"timeline": [UDP_WITHOUT_RATE]}, "needs rate_mbps"),
    ],
)
def test_a_faulty_file_is_told_by_field_and_value(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(smallest(**changes), Experiment, "f.yaml")
    assert "f.yaml" in str(caught.value)
    assert complaint in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown experiment 'hallo', perhaps hello; they are in /.*"):
        load_experiment("hallo", TOPOLOGIES)
    with pytest.raises(UsageError, match=r"unknown experiment 'nope'; known: .*hello"):
        find_file("nope", TOPOLOGIES / "experiments", "experiment")


def test_parts_take_the_base_with_their_fields_set(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "base.yaml").write_text(yaml.safe_dump(smallest()))
    both = {"name": "s", "description": "d", "wall_time_s": 9, "base": "base",
            "parts": [{"name": "a"}, {"name": "b", "set": {"workload": {"requests": 7}}}]}  # fmt: skip
    (tmp_path / "experiments" / "s.yaml").write_text(yaml.safe_dump(both))
    choice = load_experiment("s", tmp_path)
    assert isinstance(choice, ExperimentSet)
    assert [(name, part.workload.requests) for name, part in parts_of(choice, tmp_path)] == [
        ("a", 3),
        ("b", 7),
    ]


def test_links_are_one_way_or_both() -> None:
    assert directed("a->b") == ["a->b"]
    assert directed("a<->b") == ["a->b", "b->a"]


def test_a_timeline_is_steps_in_order_of_time() -> None:
    events = [
        {"do": "flap", "at_s": 1, "link": "east<->west", "on_s": 5, "off_s": 2, "times": 2},
        {"do": "set_link", "at_s": 3, "link": "east->west", "set": {"rate_mbps": 10}, "for_s": 1},
        {"do": "cut_stream", "at_s": 2, "source": "east", "target": "west"},
    ]
    experiment = check(smallest(timeline=events), Experiment, "f")
    found = [(step.at_s, step.event.do, step.phase) for step in steps_of(experiment.timeline)]
    assert found == [
        (1, "flap", "begin"),
        (2, "cut_stream", "begin"),
        (3, "flap", "end"),
        (3, "set_link", "begin"),
        (4, "set_link", "end"),
        (8, "flap", "begin"),
        (10, "flap", "end"),
    ]


def test_results_keep_one_repetition_an_index() -> None:
    results = Results()
    assert results.repetition(1) is results.repetition(1)
    assert results.repetition(0).index == 0


def test_paths_in_an_experiment_are_taken_from_its_own_folder_and_names_stay_names(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("")
    workload = {"kind": "azure", "file": "mine.csv"}
    fields = smallest(network="./net.yaml") | {"workload": workload}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(fields))
    one = load_experiment(str(tmp_path / "one.yaml"), TOPOLOGIES)
    assert isinstance(one, Experiment)
    assert one.network == str(tmp_path / "net.yaml")
    assert one.models[0].profile == "toy"
    assert isinstance(one.workload, Azure)
    assert one.workload.file == str(tmp_path / "mine.csv")
    many = {
        "name": "set",
        "description": "d",
        "wall_time_s": 9,
        "parts": [{"name": "a", "experiment": "one.yaml"}],
    }
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(many))
    found = load_experiment(str(tmp_path / "set.yaml"), TOPOLOGIES)
    assert isinstance(found, ExperimentSet)
    assert dict(parts_of(found, TOPOLOGIES)) == {"a": one}
