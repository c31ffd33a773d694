"""Pumps over a real emulated link: a cut in the middle of a transfer, and three senders under one ledger."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from prfaas.config.topology import LinkChange
from prfaas.model.transfer import FailureReason
from prfaas.transfer.streams import K_FAR_STREAMS
from prfaas_testbed.bench import outage, share
from prfaas_testbed.bench.cell import NAMED_CELLS
from prfaas_testbed.bench.engines.prfaas import Prfaas
from prfaas_testbed.bench.places import emulated


@pytest.mark.timeout(180)
def test_a_transfer_goes_on_after_the_link_was_down_and_pages_come_back_meanwhile(tmp_path: Path) -> None:
    with emulated(NAMED_CELLS["wan-clean"], tmp_path, lambda text: None) as place:
        (row,) = outage.measure(place, NAMED_CELLS["wan-clean"], (2.0,), lambda text: None)
    assert not row["over_before_the_end"]
    assert row["sender_s"] > row["down_s"]
    assert row["payload_bytes"] >= row["size_bytes"]
    # One second is promised; a machine that is busy gets more.
    assert row["freed_s"] < 10


@pytest.mark.timeout(180)
def test_a_lease_ended_with_the_link_down_and_bytes_under_way_gives_its_pages_back_untouched(
    tmp_path: Path,
) -> None:
    with emulated(NAMED_CELLS["wan-clean"], tmp_path, lambda text: None) as place:
        row = outage.abandon(place, NAMED_CELLS["wan-clean"], 2.0, lambda text: None)
    assert 0 < row["received_bytes"] < row["size_bytes"]
    # The sender is silent all the while: it can't even hear of it.
    assert not row["over_before_the_end"]
    assert row["untouched"]
    assert row["used_again"]
    assert FailureReason.LEASE_ENDED.value in row["told"] or FailureReason.LEASE_UNKNOWN.value in row["told"]
    # One second is promised; a machine that is busy gets more.
    assert row["freed_s"] < 10


@pytest.mark.timeout(180)
def test_a_cut_that_comes_when_its_transfer_is_through_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, said = NAMED_CELLS["wan-clean"], list[str]()
    with emulated(cell, tmp_path, lambda text: None) as place:
        set_down, late = place.set_down, [True, False, True, False]

        def set_down_late(down: bool) -> None:
            if down and late.pop(0):
                time.sleep(5.0)
            set_down(down)

        monkeypatch.setattr(place, "set_down", set_down_late)
        (row,) = outage.measure(place, cell, (2.0,), said.append)
        abandoned = outage.abandon(place, cell, 2.0, said.append)
    assert sum("once more" in line for line in said) == 2
    assert not row["over_before_the_end"]
    assert row["sender_s"] > row["down_s"]
    assert 0 < abandoned["received_bytes"] < abandoned["size_bytes"]
    assert abandoned["untouched"]
    assert abandoned["used_again"]


@pytest.mark.timeout(180)
def test_packets_that_overtake_by_the_whole_way_do_not_make_a_far_peer_look_near(tmp_path: Path) -> None:
    cell = NAMED_CELLS["ocean-loss-bbr"].with_(total_bytes=1 << 26)
    with emulated(cell, tmp_path, lambda text: None) as place, Prfaas() as engine:
        engine.start(place, cell)
        place.change(LinkChange(loss_percent=0.0, reorder_percent=2.0))
        give_up_s = time.monotonic() + 60.0
        while True:
            engine.move(total_bytes=1 << 40, limit_s=2.0)
            (peer,) = engine.ends["sender"].call("stats")["peers"]
            controls = {stream["congestion_control"] for stream in peer["streams"]}
            # Beyond what a far path has from the start: they wouldn't grow on one that is short, nor by BBR.
            if "cubic" in controls and len(peer["streams"]) > K_FAR_STREAMS:
                break
            assert time.monotonic() < give_up_s, (controls, len(peer["streams"]))
        assert min(stream["min_rtt_s"] for stream in peer["streams"]) < 0.05


@pytest.mark.timeout(180)
def test_a_link_that_is_lightly_used_does_not_look_slow(tmp_path: Path) -> None:
    with share.group(tmp_path, lambda text: None) as (group, _):
        group.ready()
        before = group.look()["estimate_bps"]
        # One tiny transfer after the other: something is under way at almost every look.
        sent, looks = group.run([(4_000, 20.0)] * 240)
    assert all(row.get("ok") for rows in sent.values() for row in rows)
    assert sum(len(rows) for rows in sent.values()) == 3 * 240
    assert min(look["estimate_bps"] for look in looks) > 0.9 * before


@pytest.mark.timeout(180)
def test_three_senders_under_one_ledger_are_promised_no_more_than_its_estimate(tmp_path: Path) -> None:
    with share.group(tmp_path, lambda text: None) as (group, _):
        found = share.measure(group, 2, lambda text: None)
    assert found["looks"]
    assert found["most_promised"] <= share.K_ROUNDING
    assert found["failed"] == 0
    # Every one was decided, and what was admitted came; each of the three got its part.
    assert found["admitted"] + found["refused"] == 3 * 2 * len(share.K_ORDERS)
    assert all(any(row.get("ok") for row in rows) for rows in found["senders"].values())
    assert not any(row.get("alone") for rows in found["senders"].values() for row in rows)
