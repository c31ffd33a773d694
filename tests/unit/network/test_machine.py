import errno
import os
import shutil
from types import SimpleNamespace
from typing import Any, cast

import pytest

from prfaas.config.topology import Impairments
from prfaas.model.errors import MachineError, UsageError
from prfaas_testbed.network import appliance, base, opening
from prfaas_testbed.network.appliance import Appliance
from prfaas_testbed.network.native import Native
from prfaas_testbed.network.network import make_links
from prfaas_testbed.network.opening import check_machine
from prfaas_testbed.network.router import RouterAgent, RouterError


def test_without_root_the_need_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MachineError, match="needs root"):
        check_machine()


def test_root_of_a_container_is_told_which_rights_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(opening, "held_capabilities", lambda: 0xA80425FB)  # Docker's own choice
    with pytest.raises(MachineError, match="root lacks CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_NICE: run it"):
        check_machine()


def test_the_rights_that_this_process_holds_are_read() -> None:
    assert 0 <= opening.held_capabilities() < 1 << 64


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(opening, "held_capabilities", lambda: -1)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "mnexec" else f"/usr/bin/{name}")
    with pytest.raises(MachineError, match="mnexec is missing; install Debian's package mininet"):
        check_machine()


def test_native_is_preferred_and_the_appliance_is_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Appliance, "missing", classmethod(lambda cls: None))
    monkeypatch.setattr(Native, "missing", classmethod(lambda cls: None))
    assert base.create().name == "native"
    monkeypatch.setattr(Native, "missing", classmethod(lambda cls: "no netem"))
    assert base.create().name == "appliance"


def test_a_link_that_the_kernel_cannot_make_is_the_machine_s_lack_with_the_kernel_s_words() -> None:
    def refuse(node: str, argv: list[str], lines: list[str]) -> str:
        raise RouterError("the router refused tc: Specified qdisc kind is unknown")

    with pytest.raises(MachineError, match=r"links of east: .*qdisc kind is unknown") as caught:
        make_links(cast(RouterAgent, SimpleNamespace(run=refuse)), "east", ["qdisc add dev x root red"])
    assert caught.value.exit_status == 3


def test_where_neither_works_both_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Appliance, "missing", classmethod(lambda cls: "no guest"))
    monkeypatch.setattr(Native, "missing", classmethod(lambda cls: "no netem"))
    with pytest.raises(MachineError, match="native: no netem; appliance: no guest"):
        base.create()
    with pytest.raises(MachineError, match="emulation native: no netem"):
        base.create("native")
    with pytest.raises(UsageError, match="there are: native, appliance"):
        base.create("ns3")


def test_a_link_beyond_the_appliance_s_reach_is_refused_with_the_way_out() -> None:
    with pytest.raises(MachineError, match=r"link a->b: 1000 Mbit/s .* give the topology a scale\.factor"):
        Appliance().check_reach({"a->b": Impairments(rate_mbps=1000)})
    Appliance().check_reach({"a->b": Impairments(rate_mbps=200)})


def test_what_the_machine_refuses_the_appliance_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*given: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    router: Any = Appliance()
    assert router.does_without == {}
    router._guest, router._wan = SimpleNamespace(pid=os.getpid()), SimpleNamespace(pin="nowhere")
    monkeypatch.setattr(appliance, "reserve", refused)
    monkeypatch.setattr(appliance, "filter_sockets", refused)
    monkeypatch.setattr(appliance, "coalesce", lambda host, device: device != "east-wan")
    router.cables([(router._wan, "east-wan"), (router._wan, "west-wan")])
    router.settled()
    assert router.does_without == {
        "filters on its packet sockets": "Device or resource busy",
        "frames handed over together": "refused for east-wan",
        "a processor's time of its own": "Device or resource busy",
    }
