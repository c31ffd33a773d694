"""What is wrong with an experiment is said before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfaas.config.experiment import Experiment, load_experiment
from prfaas.model.errors import ConfigError
from prfaas_testbed.claim.runs import parts
from prfaas_testbed.experiment.before import check_before
from prfaas_testbed.experiment.machine import K_TOPOLOGIES


def test_profiles_that_disagree_on_a_requests_size_are_refused(tmp_path: Path) -> None:
    experiment = dict(parts("claim-testbed"))["paper-0.9"]
    check_before(experiment, "here")
    text = (K_TOPOLOGIES / "profiles" / "1t-hybrid-h20-half.yaml").read_text()
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("170.480664062", "170.48"))
    far, near, decode = experiment.instances
    near = near.model_copy(update={"profile": str(other)})
    changed = experiment.model_copy(update={"instances": [far, near, decode]})
    with pytest.raises(ConfigError, match=r"KV of \d+ tokens is \d+ bytes by one"):
        check_before(changed, "here")


def with_timeline(*events: dict[str, object]) -> Experiment:
    hello = load_experiment("hello", K_TOPOLOGIES)
    assert isinstance(hello, Experiment)
    return Experiment.model_validate({**hello.model_dump(), "timeline": list(events)})


def test_a_change_that_its_link_can_not_take_is_refused_before_anything_is_started() -> None:
    step: dict[str, object] = {"do": "set_link", "at_s": 1, "link": "east->west", "set": {"jitter_ms": 40}}
    with pytest.raises(
        ConfigError, match=r"set_link of east->west at 1 s: found 'jitter_ms 40.*jitter_ms must"
    ):
        check_before(with_timeline(step), "here")
    slower = {"do": "set_link", "at_s": 0, "link": "east->west", "set": {"delay_ms": 50}}
    check_before(with_timeline(step, slower), "here")
    with pytest.raises(ConfigError, match="jitter_ms must"):
        check_before(with_timeline(step, {**slower, "for_s": 5}), "here")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"router": {"site": "west", "policy": {"name": "price"}}}, "router.policy.name: found 'price'"),
        ({"models": [{"name": "toy", "profile": "toyy"}]}, "here: models.toy.profile: found 'toyy'"),
        ({"models": [{"name": "toy", "profile": "./toyy.yaml"}]}, "toyy.yaml: no such file"),
    ],
)  # fmt: skip
def test_a_name_that_nothing_has_is_refused_with_its_field(change: dict[str, object], told: str) -> None:
    hello = load_experiment("hello", K_TOPOLOGIES)
    assert isinstance(hello, Experiment)
    with pytest.raises(ConfigError) as caught:
        check_before(Experiment.model_validate({**hello.model_dump(), **change}), "here")
    assert told in str(caught.value)
