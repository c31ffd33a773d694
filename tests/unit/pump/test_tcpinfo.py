"""What is made of the kernel's figures: the path's shortest round trip, and the control that fits it."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.pump import gauges
from prfaas.pump.tcpinfo import TcpInfo, control_for, parse

FAR = TcpInfo(
    rtt_s=0.15, min_rtt_s=0.149, cwnd_packets=100, mss_bytes=1448, unacked_packets=0, notsent_bytes=0,
    retransmitted_bytes=0, sent_bytes=0, acked_bytes=0, received_bytes=0, delivery_rate_bps=0.0,
    segments_out=0, segments_in=0,
)  # fmt: skip
OVERTAKEN = replace(FAR, min_rtt_s=0.0002, reorderings=7)
QUEUED = replace(FAR, min_rtt_s=0.0002)
"""A short path with a queue of 150 ms: as little, and no packet overtook another."""


def test_a_round_trip_that_only_packets_that_overtook_have_made_is_not_the_paths() -> None:
    assert OVERTAKEN.is_overtaken
    assert OVERTAKEN.path_rtt_s == 0.15
    assert gauges.min_rtt_s([OVERTAKEN, FAR]) == 0.149
    quick = replace(OVERTAKEN, rtt_s=0.12)
    assert gauges.min_rtt_s([OVERTAKEN, quick]) == gauges.mean_rtt_s([OVERTAKEN, quick]) > 0.12
    # A packet may overtake with nothing on its way to show it by.
    assert gauges.min_rtt_s([OVERTAKEN, QUEUED]) == 0.15


def test_a_long_queue_on_a_short_path_is_still_a_queue() -> None:
    assert not QUEUED.is_overtaken
    assert QUEUED.path_rtt_s == gauges.min_rtt_s([QUEUED]) == 0.0002


def test_packets_that_overtake_by_little_leave_the_round_trip_believed() -> None:
    assert replace(FAR, min_rtt_s=0.14, reorderings=1000).path_rtt_s == 0.14
    loopback = replace(FAR, rtt_s=0.003, min_rtt_s=0.00002, reorderings=3)
    assert loopback.path_rtt_s == 0.00002


@pytest.mark.parametrize(
    ("info", "overtaken", "name"),
    [
        (FAR, False, "bbr"),
        (FAR, True, "cubic"),  # a stream that is new, beside others
        (OVERTAKEN, True, "cubic"),
        (QUEUED, False, "cubic"),
        (None, False, "cubic"),
    ],
)
def test_the_control_is_rate_driven_where_the_least_round_trip_is_that_of_a_long_path(
    info: TcpInfo | None, overtaken: bool, name: str
) -> None:
    assert control_for("auto", info, overtaken) == name


@given(
    st.sampled_from(["bbr", "cubic", "reno"]), st.sampled_from([None, FAR, OVERTAKEN, QUEUED]), st.booleans()
)
def test_a_control_that_the_operator_named_stays(name: str, info: TcpInfo | None, overtaken: bool) -> None:
    assert control_for(name, info, overtaken) == name


def test_a_kernel_that_knows_no_least_round_trip_leaves_it_unknown() -> None:
    assert gauges.min_rtt_s([replace(FAR, min_rtt_s=0.0)]) == 0.0


@given(st.binary(max_size=260))
def test_a_kernel_that_says_less_leaves_zeros(data: bytes) -> None:
    info = parse(data.ljust(104, b"\0")[: max(104, len(data))])
    if len(data) < 224:
        assert info.reorderings == 0
        assert not info.is_overtaken
    else:
        assert info.reorderings == struct.unpack_from("<I", data, 220)[0]
