import json

import pytest

from prfaas.model.errors import UsageError
from prfaas_testbed.network.ports import (
    Connection,
    PortBytes,
    connections_of,
    counter_lines,
    counters_of,
    reset_lines,
)


def test_a_group_s_packets_are_counted_by_either_port_and_the_rest_apart() -> None:
    lines = counter_lines("east-wan", {"engine": [9001, 9000], "control": [7000]})
    sent = [line for line in lines if line.startswith("add rule ip prfaas_ports sent")]
    assert sent[0].endswith("oifname east-wan tcp sport { 9000, 9001 } counter name sent_engine accept")
    assert sent[-1].endswith("oifname east-wan counter name sent_other")
    assert sum("received_" in line and line.startswith("add counter") for line in lines) == 3


@pytest.mark.parametrize("groups", [{"a": [1], "b": [1]}, {"other": [1]}, {"not a name": [1]}])
def test_ambiguous_groups_are_refused(groups: dict[str, list[int]]) -> None:
    with pytest.raises(UsageError):
        counter_lines("east-wan", groups)


def test_counters_are_read_by_group_and_frames_have_14_bytes_more() -> None:
    rows = [
        {"counter": {"name": f"{way}_{group}", "bytes": 1500, "packets": 1}}
        for way in ("sent", "received")
        for group in ("engine", "other")
    ]
    found = counters_of(json.dumps({"nftables": [{"metainfo": {}}, *rows]}))
    assert found["engine"] == PortBytes(1500, 1, 1500, 1)
    assert found["engine"].received_frame_bytes == 1514


def test_connections_are_read_from_ss_whatever_the_family() -> None:
    shown = "0      0      10.77.1.2:60294 10.77.2.2:5930 \n0 0 [::ffff:10.77.1.2]:33 [::ffff:10.77.2.2]:44\n"
    assert connections_of(shown) == [Connection(60294, "10.77.2.2", 5930), Connection(33, "10.77.2.2", 44)]


def test_a_reset_hits_one_connection_in_both_directions() -> None:
    rules = [line for line in reset_lines(Connection(1000, "10.77.2.2", 9000)) if "add rule" in line]
    assert len(rules) == 2
    assert all("9000" in rule and "1000" in rule and rule.endswith("reject with tcp reset") for rule in rules)
