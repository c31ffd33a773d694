"""Where bytes went, what the emulator did, and what both sides wrote: pure pieces of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prfaas_testbed.experiment.sites import K_ACCOUNTED, account, pump_sent
from prfaas_testbed.experiment.transfers import moved_of
from prfaas_testbed.experiment.watch import link_rows

PLUGIN_ROW: dict[str, Any] = {
    "room": 2, "pages": 3, "kv": [1, 2], "state": {"0": [5]}, "aux": [7],
    "bytes": {"kv": 30, "state": 4, "aux": 9}, "begun_s": 5.0, "at_s": 6.0,
}  # fmt: skip


def sample(at_s: float, sent: int) -> Any:
    """The network's own types can't be had here: they come with mininet."""
    counters = SimpleNamespace(bytes=sent, losses=0, queue_drops=0, backlog_bytes=7)
    return SimpleNamespace(at_s=at_s, links={"a->b": counters})


def state(scale: int, **pump: int) -> dict[str, Any]:
    stats = {"peers": [dict.fromkeys(pump_sent({"peers": [], "inbound": {}}), 0) | pump], "inbound": {}}
    return {
        "pump": pump_sent(stats),
        "frames": {"pump_bytes": 0, "pump_packets": 0, "other_bytes": 104 * scale},
        "wan_bytes": 10_000 * scale,
        "wan_packets": 10 * scale,
        "wan_losses": 0,
    }


def test_a_site_that_sends_is_explained_by_payload_framing_headers_and_the_rest() -> None:
    sent = {"payload_bytes_sent": 9000, "framing_bytes_sent": 100, "tcp_bytes_sent": 9200, "segments_out": 10,
            "retransmitted_bytes": 50}  # fmt: skip
    row = account(state(0), state(1, **sent))
    assert row["accounted_bytes"] == 9200 + 10 * 66 + 104
    assert row["tls_bytes"] == 9200 - 50 - 9000 - 100
    assert row["wan_bytes"] == 10_000
    assert row["outside_pumps_bytes"] == 104


def test_a_cut_connection_s_unsent_bytes_are_not_taken_off_tls() -> None:
    sent = {"payload_bytes_sent": 9000, "framing_bytes_sent": 100, "tcp_bytes_sent": 5000, "streams_lost": 1}
    row = account(state(0), state(1, **sent))
    assert row["tls_bytes"] is None
    assert row["accounted_bytes"] == 5000 + 104


def test_a_pump_that_was_started_again_explains_nothing() -> None:
    before = state(0, payload_bytes_sent=9000, tcp_bytes_sent=9200, streams_opened=4)
    after = state(1, payload_bytes_sent=300, tcp_bytes_sent=330, streams_opened=4)
    row = account(before, after)
    assert row["started_again"]
    assert row["wan_bytes"] == 10_000
    assert {name for name, value in row.items() if value is None} == set(K_ACCOUNTED)
    assert not {name for name, value in row.items() if isinstance(value, int) and value < 0}


def test_what_a_pump_sends_to_its_own_site_is_no_wan_traffic() -> None:
    wan = {"site": "west", "payload_bytes_sent": 9000, "control_bytes_sent": 70, "tcp_bytes_sent": 9200,
           "segments_out": 10}  # fmt: skip
    own = {"site": "east", "payload_bytes_sent": 500, "tcp_bytes_sent": 550, "segments_out": 3,
           "retransmitted_bytes": 5, "control_bytes_received": 40, "tcp_bytes_received": 60,
           "segments_in": 2}  # fmt: skip
    # The accepting end of its own connection, and one of a peer that dialled.
    inbound = {"payload_bytes_received": 500 + 1000, "control_bytes_sent": 40 + 30,
               "tcp_bytes_sent": 60 + 35, "segments_out": 2 + 4}  # fmt: skip
    found = pump_sent({"site": "east", "peers": [wan, own], "inbound": inbound})
    assert found["payload_bytes_sent"] == 9000
    assert found["payload_bytes_received"] == 1000
    assert found["control_bytes_sent"] == 70 + 30
    assert found["tcp_bytes_sent"] == 9200 + 35
    assert found["segments_out"] == 10 + 4
    assert found["retransmitted_bytes"] == 0


def test_what_the_link_lost_was_sent_as_well() -> None:
    after = state(1, payload_bytes_sent=1)
    after["wan_losses"] = 2
    assert account(state(0), after)["wan_bytes"] == 12_000


def test_links_are_differences_of_counters() -> None:
    rows = link_rows([sample(10.0, 0), sample(10.1, 500), sample(10.2, 1500)], zero_s=10.0)
    assert [(row.at_s, row.bytes) for row in rows] == [(0.1, 500), (0.2, 1000)]
    assert rows[0].backlog_bytes == 7


def test_rows_of_both_kinds_of_instance_give_one_form() -> None:
    profiled = [
        {"side": "source", "room": 1, "digest": "d", "bytes": 100, "start_s": 1.0, "resent_blocks": 0},
        {"side": "landed", "room": 1, "digest": "d", "bytes": 100, "at_s": 2.0},
    ]
    found = moved_of([*profiled, {**PLUGIN_ROW, "side": "sent"}, {**PLUGIN_ROW, "side": "landed"}])
    assert found[1].source_digest == found[1].landed_digest == "d"
    assert (found[1].start_s, found[1].end_s, found[1].payload_bytes) == (1.0, 2.0, 100)
    assert found[2].source_digest == found[2].landed_digest
    assert (found[2].start_s, found[2].end_s, found[2].payload_bytes) == (5.0, 6.0, 34)


@pytest.mark.parametrize("name", ["kv", "state", "aux"])
def test_one_differing_buffer_changes_the_digest(name: str) -> None:
    other = {**PLUGIN_ROW, name: {"0": [6]} if name == "state" else [8]}
    found = moved_of([{**PLUGIN_ROW, "side": "sent"}, {**other, "side": "landed"}])
    assert found[2].source_digest != found[2].landed_digest
