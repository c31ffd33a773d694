"""What iperf3 is told, for traffic whose rate is one of Ethernet frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from prfaas.model.errors import MachineError
from prfaas_testbed.network import sysctls
from prfaas_testbed.network.network import Network
from prfaas_testbed.network.state import Record
from prfaas_testbed.network.traffic import received, sending_words


def test_udp_is_full_frames_of_which_there_are_as_many_as_the_rate_says() -> None:
    words = sending_words("udp", 200, 1, 1500)
    assert words[:3] == ["-u", "-l", "1472"]
    payload_bps = float(words[4].removesuffix("M")) * 1e6
    assert payload_bps / 8 / 1472 * 1514 * 8 == pytest.approx(200e6)


def test_a_rate_is_that_of_all_streams_and_a_small_mtu_has_small_frames() -> None:
    assert sending_words("udp", 100, 4, 576) == ["-u", "-l", "548", "-b", f"{100 * 548 / 590 / 4:.6f}M"]


def test_tcp_fills_its_segments_itself_and_has_a_ceiling_only_where_one_is_told() -> None:
    assert sending_words("bbr", None, 2, 1500) == ["-C", "bbr"]
    assert sending_words("cubic", 15.14, 1, 1500) == ["-C", "cubic", "-b", "14.480000M"]


def test_a_congestion_control_that_the_kernel_lacks_is_told_and_nothing_else_stands_for_it() -> None:
    net = cast(Network, SimpleNamespace(congestion_controls=["reno", "cubic"]))
    with pytest.raises(MachineError, match=r"by bbr: this kernel offers reno, cubic alone; load .*tcp_bbr"):
        Network.prepare_traffic(net, "east", "west", "bbr")


def test_what_a_kernel_offers_is_asked_of_it() -> None:
    assert sysctls.offers("reno")  # no kernel is without
    assert not sysctls.offers("nosuch")


def test_sites_are_allowed_what_the_kernel_offers_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[tuple[str, str]] = []
    record = cast(Record, SimpleNamespace(raise_sysctl=lambda name, value: raised.append((name, value))))
    monkeypatch.setattr(sysctls, "read_sysctl", lambda name: "reno")
    monkeypatch.setattr(sysctls, "offers", lambda name: name == "cubic")
    assert sysctls.allow_congestion_controls(record) == ["reno", "cubic"]
    assert raised == [(sysctls.K_CONGESTION, "reno cubic")]
    monkeypatch.setattr(sysctls, "offers", lambda name: False)
    assert sysctls.allow_congestion_controls(record) == ["reno"]
    assert len(raised) == 1


def test_an_interval_that_is_told_twice_counts_once() -> None:
    """As iperf3 3.12 does when its client is interrupted."""
    first, last = ({"start": at, "seconds": 1.0, "bytes": 10.0 * (1 + at)} for at in (0, 1.0003))
    rows = [{"sum": first}, {"sum": last}, {"sum": last}]
    assert received({"intervals": rows}) == (pytest.approx(30.003), 2.0)
    assert received({"error": "no client came"}) == (0, 0)
