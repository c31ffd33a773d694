"""What is wrong with an experiment is said before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfaas.config.experiment import Experiment, load_experiment
from prfaas.model.errors import ConfigError, MachineError
from prfaas_testbed.claim.runs import parts
from prfaas_testbed.experiment.before import check_before
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.instances.sglang_server import sglang_python


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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"checks": [{"name": "slo", "metric": "slo_share", "at_least": 1}]}, "`slo_ttft_s:` or `router:`"),
        ({"baseline": None}, "checks.tokens_equal_share: found 'tokens_equal_share'; nothing to judge it by"),
        ({"checks": [{"name": "wire_silence_s", "at_most": 1}]}, "give the experiment `captures:`"),
        ({"wall_time_s": 3}, "wall_time_s: found 3.0; the load alone lasts 4 s: allow more time"),
        ({"wall_time_s": 10, "repetitions": 3}, "the load alone lasts 4 s, 3 times: allow more time"),
        ({"captures": [{"source": "east", "target": "east", "for_s": 1}]}, "'east as source and target'"),
        ({"captures": [{"source": "east", "target": "west", "at_s": 99, "for_s": 1}]}, "captures.at_s: "),
        ({"captures": [{"source": "east", "target": "north", "for_s": 1}]}, "captures: found 'north'; sites"),
    ],
)  # fmt: skip
def test_what_no_run_could_judge_or_reach_is_refused(change: dict[str, object], told: str) -> None:
    hello = load_experiment("hello", K_TOPOLOGIES)
    assert isinstance(hello, Experiment)
    check_before(hello, "here")
    with pytest.raises(ConfigError) as caught:
        check_before(Experiment.model_validate({**hello.model_dump(), **change}), "here")
    assert told in str(caught.value)


def test_a_step_that_the_load_ends_before_is_refused_with_when_that_is() -> None:
    late = {"do": "flap", "at_s": 300, "link": "east->west", "on_s": 1, "off_s": 1, "times": 1}
    told = (
        r"timeline.flap.at_s: found 300.0; the load has ended by then: its last request comes at 3.8 s, and"
    )
    with pytest.raises(ConfigError, match=told):
        check_before(with_timeline(late), "here")
    hello = with_timeline()
    long = {**hello.model_dump(), "wall_time_s": 900, "rounds": [{"name": "one", "duration_s": 290}]}
    long["rounds"][0]["timeline"] = [late]
    check_before(Experiment.model_validate(long), "here")


def test_traffic_from_a_site_to_itself_is_refused() -> None:
    traffic = {"do": "cross_traffic", "at_s": 1, "source": "east", "target": "east", "for_s": 1}
    with pytest.raises(ConfigError, match=r"timeline.cross_traffic: found 'east as source and target'"):
        check_before(with_timeline(traffic), "here")


def test_real_servers_without_lscpu_are_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.touch()
    monkeypatch.setenv("PRFAAS_SGLANG_PYTHON", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="lscpu is missing"):
        sglang_python()
