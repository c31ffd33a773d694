"""Which prefill servers are of a decode server's own site, and that its two managers keep out of each other's
way."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from prfaas.config.backend import BackendConfig, NearConfig
from prfaas.config.loading import check
from prfaas.model.errors import ConfigError, MachineError, PrfaasError
from prfaas.sglang import compat, near
from prfaas.sglang.near import NearTier, ReachedServers

K_NEAR = NearConfig(hosts=("10.2.0.0/16", "10.3.0.7", "fd00:2::/32", "prefill-3.west"))


@pytest.mark.parametrize("host", ["10.2.0.1", "10.2.255.255", "10.3.0.7", "fd00:2::9", "prefill-3.west"])
def test_hosts_networks_and_names_are_near(host: str) -> None:
    assert K_NEAR.holds(host)


@pytest.mark.parametrize("host", ["10.1.0.5", "10.3.0.8", "fd00:3::9", "prefill-4.west", "", "10.2.0.0/16"])
def test_all_others_are_elsewhere(host: str) -> None:
    assert not K_NEAR.holds(host)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"hosts": []}, "near.hosts"),
        ({"hosts": ["10.2.0.1/16"]}, "10.2.0.1/16 has host bits set"),
        ({"hosts": ["10.2.0.1:8998"]}, "'10.2.0.1:8998' is not an address, a network or a name"),
        ({"hosts": ["10.2.0.1"], "transport": "nvlink"}, "near.transport"),
    ],
)
def test_a_wrong_section_is_refused_by_value(section: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check({"near": section}, BackendConfig, "west.yaml")
    assert says in str(caught.value)


def test_a_host_cannot_be_here_and_elsewhere() -> None:
    both = {"near": {"hosts": ["10.1.0.0/16"]}, "control": {"pumps": {"10.1.0.5": "198.51.100.7:7700"}}}
    with pytest.raises(ConfigError) as caught:
        check(both, BackendConfig, "west.yaml")
    assert "10.1.0.5 is of this site by near.hosts, and elsewhere by control.pumps" in str(caught.value)


class Manager:
    """SGLang's, so far as the tier asks it."""

    def __init__(self, *args: Any) -> None:
        self.made_of = args
        self.prefill_info_table: dict[str, str] = {}
        self.said: list[str] = []

    def register_buffer_to_engine(self) -> None:
        self.said.append("registered")

    def deregister_buffer_to_engine(self) -> None:
        self.said.append("deregistered")

    def teardown(self) -> None:
        self.deregister_buffer_to_engine()


def test_a_loopback_address_is_judged_by_the_one_that_it_leads_to() -> None:
    leads = {"127.0.0.1:40001": "10.2.0.1:8998", "10.2.0.2:1": "10.1.0.5:8998"}
    tier = NearTier(K_NEAR, Manager(), lambda address: leads.get(address, address))
    assert tier.holds("127.0.0.1:40001")
    assert tier.holds("10.2.0.1:8998")
    assert not tier.holds("10.2.0.2:1")
    assert not tier.holds("127.0.0.1:40002")


@pytest.mark.parametrize("address", ["", "10.2.0.1", "10.2.0.1:", "a b:1", "10.2.0.1:99999"])
def test_what_is_no_address_is_not_near(address: str) -> None:
    assert not NearTier(K_NEAR, Manager()).holds(address)


def test_the_scheduler_finds_both_tiers_servers_by_get_and_heartbeats_see_ours_alone() -> None:
    tier = NearTier(K_NEAR, Manager())
    servers = ReachedServers(tier)
    servers["10.1.0.5:1"] = "ours"
    tier.manager.prefill_info_table["10.2.0.1:1"] = "SGLang's"
    assert servers.get("10.1.0.5:1") == "ours"
    assert servers.get("10.2.0.1:1") == "SGLang's"
    assert servers.get("10.9.0.1:1") is None
    assert list(servers) == ["10.1.0.5:1"]
    assert "10.2.0.1:1" not in servers


def test_memory_is_released_and_registered_again_once_each() -> None:
    tier = NearTier(K_NEAR, Manager())
    tier.resume()
    tier.release()
    tier.release()
    tier.resume()
    tier.close()
    tier.release()
    assert tier.manager.said == ["deregistered", "registered", "deregistered"]


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    started: dict[str, Any] = {}
    names = {
        "MooncakeKVManager": Manager,
        "init_mooncake_transfer_engine": lambda **asked: started.update(asked),
        "get_local_ip_auto": lambda: "10.2.0.9",
    }
    for name, thing in names.items():
        monkeypatch.setitem(vars(compat), name, thing)
    # So that it is put back.
    monkeypatch.setenv(near.K_FORCE_TCP, "0")
    monkeypatch.delenv(near.K_FORCE_TCP)
    return started


def ours() -> SimpleNamespace:
    args = SimpleNamespace(gpu_id=3, ib_device="mlx5_1")
    return SimpleNamespace(kv_args=args, disaggregation_mode="decode", server_args="s", is_mla_backend=True)


@pytest.mark.parametrize(("transport", "forced"), [("tcp", "1"), ("rdma", None)])
def test_the_second_manager_is_sglangs_on_the_same_memory(
    sglang: dict[str, Any], transport: Any, forced: str | None
) -> None:
    one = ours()
    tier = NearTier.open(NearConfig(hosts=("10.2.0.1",), transport=transport), one)
    assert tier.manager.made_of == (one.kv_args, "decode", "s", True)
    assert sglang == {"hostname": "10.2.0.9", "gpu_id": 3, "ib_device": "mlx5_1"}
    assert os.environ.get(near.K_FORCE_TCP) == forced


def test_an_engine_that_does_not_start_ends_the_launch_with_its_reason(
    sglang: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**asked: Any) -> None:
        try:
            raise ImportError("libibverbs.so.1: cannot open shared object file")
        except ImportError as error:
            raise ImportError("Please install mooncake") from error

    monkeypatch.setitem(vars(compat), "init_mooncake_transfer_engine", start)
    with pytest.raises(PrfaasError, match=r"near: Mooncake's engine doesn't start: libibverbs\.so\.1"):
        NearTier.open(K_NEAR, ours())


def test_without_mooncakes_package_the_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="pip install mooncake-transfer-engine"):
        near.check_installed()
