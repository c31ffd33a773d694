"""What the router of a scaled experiment is told: rates and sizes as they are on the emulated link."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from prfaas.config.experiment import Experiment, RouterChoice, load_experiment
from prfaas.config.loading import check
from prfaas.config.policy import SlowLoopConfig
from prfaas.config.profile import find_profile, load_profile
from prfaas.config.router import Server, load_router_config
from prfaas_testbed.experiment.door import _scaled, _server, router_file
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.servers import Server as Running
from prfaas_testbed.experiment.ways import Ways


@pytest.mark.parametrize("name", ["1t-hybrid-h20", "kimi-linear-48b"])
def test_a_scaled_profile_s_file_says_what_the_instances_move(name: str, tmp_path: Path) -> None:
    found = load_profile(_scaled(name, 500, tmp_path))
    instances = find_profile(name, K_TOPOLOGIES).scaled(500)
    for tokens in (2000, 30_000, 131_072):
        assert found.kv_bytes(tokens) == pytest.approx(instances.kv_bytes(tokens), abs=1)
        assert found.prefill_s(tokens) == instances.prefill_s(tokens)
    assert found.state_bytes == instances.state_bytes


def test_an_unscaled_one_is_as_it_lies(tmp_path: Path) -> None:
    toy = K_TOPOLOGIES / "profiles" / "toy.yaml"
    assert _scaled("toy", 1, tmp_path).read_text() == toy.read_text()


def test_the_router_reads_a_profile_that_its_site_can_see(tmp_path: Path) -> None:
    """Each site has a /tmp of its own; two profiles of one name are two."""
    text = (K_TOPOLOGIES / "profiles" / "toy.yaml").read_text()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(text + f"# {name}\n")
    work = tmp_path / "work"
    one, other = (_scaled(str(tmp_path / name / "mine.yaml"), 1, work) for name in ("a", "b"))
    assert one.is_relative_to(work)
    assert (one.read_text()[-2], other.read_text()[-2]) == ("a", "b")
    assert _scaled(str(tmp_path / "a" / "mine.yaml"), 2, work).is_relative_to(work)


@pytest.mark.parametrize("kind", ["profiled", "sglang"])
def test_profiled_instances_may_change_their_roles_where_there_is_a_slow_loop(kind: str) -> None:
    found = load_experiment("hello", K_TOPOLOGIES)
    assert isinstance(found, Experiment)
    instances = [one.model_copy(update={"kind": kind}) for one in found.instances]
    plain, loop = RouterChoice(site="west"), RouterChoice(site="west", slow_loop=SlowLoopConfig())
    for router in (plain, loop):
        experiment = found.model_copy(update={"instances": instances, "router": router})
        for one in instances:
            running = Running(one.names()[0], one.site, one.role, "10.0.0.1", 80, Mock(), bootstrap_port=80)
            server = check(_server(running, experiment, Ways()), Server, "the router's file")
            assert server.convertible == (router is loop and kind == "profiled" and one.role != "collocated")


def test_where_http_goes_by_pumps_the_router_asks_its_own_loopback_and_names_the_server_s_own_bootstrap() -> (
    None
):
    found = load_experiment("hello", K_TOPOLOGIES)
    assert isinstance(found, Experiment)
    experiment = found.model_copy(update={"router": RouterChoice(site="west")})
    far = Running("prefill", "east", "prefill", "10.0.0.1", 30000, Mock(), bootstrap_port=30000)
    ports = [("10.0.0.1", port) for port in (30000, 32000, 32001)]
    ways = Ways({"east": ports, "west": []}, {"east": "10.0.0.1:7600", "west": "10.0.0.2:7600"})
    server = check(_server(far, experiment, ways), Server, "the router's file")
    assert server.url == "http://127.0.0.1:25000"
    assert server.bootstrap == ("10.0.0.1", 30000)
    assert server.kv_events is not None
    assert server.kv_events.endpoint == "tcp://127.0.0.1:25001"
    assert server.kv_events.replay_endpoint == "tcp://127.0.0.1:25002"


def test_a_router_that_is_killed_and_started_again_by_the_same_file_gives_no_room_out_twice(
    tmp_path: Path,
) -> None:
    found = load_experiment("hello", K_TOPOLOGIES)
    assert isinstance(found, Experiment)
    experiment = found.model_copy(update={"router": RouterChoice(site="west")})
    names = ("east", "west")
    net = Mock(sites={name: Mock(address="10.0.0.1") for name in names}, path=lambda source, target: [])
    net.topology = Mock(scale=None, emulated=dict)
    servers = [
        Running(one.names()[0], one.site, one.role, "10.0.0.1", 80, Mock(), bootstrap_port=80)
        for one in experiment.instances
    ]
    (tmp_path / "tokenizer").mkdir()
    written = router_file(net, experiment, "toy", "toy", servers, tmp_path / "tokenizer", tmp_path, Ways())
    config = load_router_config(written)
    assert config.seed is None
    # And it cuts prompts into blocks as they do, or it would know nothing of what they cache.
    assert config.models[0].page_tokens == find_profile("toy", K_TOPOLOGIES).block_tokens > 1
