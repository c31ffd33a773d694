"""A link's ledger: kept by one pump, shared by the others, asked by servers before there are bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np

from prfaas.config.pump import PumpConfig
from prfaas.model.decisions import RefusalReason, Verdict
from prfaas.model.transfer import TransferKind
from prfaas.pump.server import Pump

K_WAIT_S = 20
K_LINK = {"nominal_bps": 80e6, "max_pumps": 3, "share_ttl_s": 0.5}


def link(**fields):
    return [{"peer_site": "west", "admission": {**K_LINK, **fields.pop("admission", {})}, **fields}]


def status(client):
    return client.stats()["links"][0]


def wait_for(condition, seconds=15.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.02)


def test_a_link_without_a_ledger_admits_what_comes(pumps):
    east = pumps.client(pumps.start("east"))
    offer = east.offer("west", 1 << 40, 1.0)
    assert offer.wait(K_WAIT_S) is Verdict.ADMITTED
    east.release(offer)


def test_a_site_that_no_link_leads_to_is_admitted_and_told_of_once_where_other_links_have_a_ledger(pumps):
    east = pumps.client(pumps.start("east", links=link()))
    for site in ("wset", "east", "west", "wset"):
        offer = east.offer(site, 1000, 5.0)
        assert offer.wait(K_WAIT_S) is Verdict.ADMITTED
        east.release(offer)
    told = [line for line in pumps.log("east").splitlines() if "links:" in line]
    assert len(told) == 1
    assert "no `links:` leads to 'wset', only to west: all that goes there is admitted" in told[0]
    south = pumps.client(pumps.start("south"))
    assert south.offer("wset", 1000, 5.0).wait(K_WAIT_S) is Verdict.ADMITTED
    assert "links:" not in pumps.log("south")


def test_a_ledger_admits_queues_refuses_and_admits_what_waited(pumps):
    east = pumps.client(pumps.start("east", links=link()))
    first = east.offer("west", 9_000_000, 2.0)
    assert first.wait(K_WAIT_S) is Verdict.ADMITTED
    assert first.finish_in_s is not None
    assert 0 < first.finish_in_s <= 2.0
    too_much = east.offer("west", 1 << 30, 2.0)
    assert too_much.wait(K_WAIT_S) is Verdict.REFUSED
    assert too_much.reason is RefusalReason.DEADLINE
    waiting = east.offer("west", 15_000_000, 2.0)
    assert waiting.wait(K_WAIT_S) is Verdict.QUEUED
    east.release(first)
    wait_for(lambda: waiting.verdict is Verdict.ADMITTED)
    assert status(east)["promised_bytes"] == 15_000_000
    east.release(waiting)
    wait_for(lambda: status(east)["promised_bytes"] == 0)


def test_a_server_that_leaves_holds_no_promise(pumps):
    config = pumps.start("east", links=link())
    east, leaving = pumps.client(config), pumps.client(config)
    assert leaving.offer("west", 9_000_000, 5.0).wait(K_WAIT_S) is Verdict.ADMITTED
    assert status(east)["admitted"] == 1
    leaving.close()
    wait_for(lambda: status(east)["admitted"] == 0)


def test_a_transfer_ends_its_promise_with_its_last_part(pumps):
    east = pumps.client(pumps.start("east", links=link()))
    west = pumps.client(pumps.start("west"))
    src, dst = pumps.memory(east, 1 << 20), pumps.memory(west, 1 << 20, fill=0)
    lease = west.grant_lease(1, 0, [(dst.ctypes.data, len(dst))], 60)
    offer = east.offer("west", len(src), 10.0)
    assert offer.wait(K_WAIT_S) is Verdict.ADMITTED
    half = len(src) // 2
    for at, last in ((0, False), (half, True)):
        transfer = east.submit(
            lease.grant, [src.ctypes.data + at], [dst.ctypes.data + at], [half],
            kind=TransferKind.KV, deadline_s=10, last=last, offer=offer,
        )  # fmt: skip
        assert transfer.wait(K_WAIT_S).ok
        if not last:
            wait_for(lambda: status(east)["promised_bytes"] <= half)
            assert status(east)["admitted"] == 1
    assert np.array_equal(src, dst)
    wait_for(lambda: status(east)["admitted"] == 0)


def test_pumps_of_a_site_share_one_ledger_and_its_promises_never_exceed_the_estimate(pumps):
    keeper = pumps.client(pumps.start("east", links=link()))
    # Another pump of the same site, at another control socket.
    other = pumps.client(pumps.start("other", site="east", links=link(host=keeper.address)))
    wait_for(lambda: status(other)["reachable"])
    wait_for(lambda: status(other)["estimate"] is not None)
    here = keeper.offer("west", 9_000_000, 2.0)
    assert here.wait(K_WAIT_S) is Verdict.ADMITTED
    there = other.offer("west", 12_000_000, 2.0)
    assert there.wait(K_WAIT_S) is Verdict.QUEUED
    assert not there.alone
    keeper.release(here)
    wait_for(lambda: there.verdict is Verdict.ADMITTED)
    kept = status(keeper)
    assert len(kept["shares_bps"]) == 2
    assert kept["promised_bps"] <= kept["estimate"]["rate_bps"] * 1.0001
    other.release(there)
    wait_for(lambda: status(keeper)["admitted"] == 0)


def test_a_pump_whose_ledger_is_away_promises_against_its_floor_alone(pumps):
    keeper = pumps.client(pumps.start("east", links=link()))
    other = pumps.client(pumps.start("other", site="east", links=link(host=keeper.address)))
    wait_for(lambda: status(other)["reachable"])
    pumps.kill("east")
    wait_for(lambda: not status(other)["reachable"])
    assert other.offer("west", 9_000_000, 1.0).wait(K_WAIT_S) is Verdict.REFUSED
    small = other.offer("west", 100_000, 2.0)
    assert small.wait(K_WAIT_S) is Verdict.ADMITTED
    assert small.alone


def test_what_a_pump_did_not_decide_is_asked_again_of_the_next_one_with_the_time_left(pumps):
    east = pumps.client(pumps.start("east", links=link()))
    # At 80 Mbit/s 45 s of the 60, and 20 more: not both. Neither is near what it could be alone.
    admitted, queued = (east.offer("west", size, 60.0) for size in (450_000_000, 200_000_000))
    assert admitted.wait(K_WAIT_S) is Verdict.ADMITTED
    assert queued.wait(K_WAIT_S) is Verdict.QUEUED
    # A stopped pump takes what is said to it, and says nothing.
    pid = pumps.pid("east")
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    asked = east.offer("west", 10_000_000, 60.0)
    given_up = east.offer("west", 10_000_000, 60.0)
    too_late = east.offer("west", 1_000, 0.2)
    asked_at = time.monotonic()
    pumps.kill("east")
    wait_for(lambda: east._alone)
    while_away = east.offer("west", 10_000_000, 60.0)
    east.release(given_up)
    # The next pump comes only when there is no time left for this one.
    time.sleep(max(0.0, asked_at + 0.3 - time.monotonic()))
    assert {o.verdict for o in (asked, given_up, too_late, while_away)} == {None}
    pumps.start("east", links=link())
    assert asked.wait(K_WAIT_S) is Verdict.ADMITTED
    assert while_away.wait(K_WAIT_S) is Verdict.ADMITTED
    assert too_late.wait(K_WAIT_S) is Verdict.REFUSED
    assert too_late.reason is RefusalReason.DEADLINE_PASSED
    # Each was asked once. What had been admitted has its place again, and leaves none to what was queued.
    wait_for(lambda: (status(east)["admitted"], status(east)["queued"]) == (3, 1))
    held = status(east)
    assert held["promised_bytes"] == 470_000_000
    assert held["refusals"] == {"deadline-passed": 1}
    assert given_up.verdict is None
    assert admitted.verdict is Verdict.ADMITTED
    assert not admitted.late
    assert queued.verdict is Verdict.QUEUED
    east.release(admitted)
    wait_for(lambda: queued.verdict is Verdict.ADMITTED)
    assert status(east)["promised_bytes"] == 220_000_000


def test_what_was_admitted_is_late_when_the_next_pumps_ledger_has_no_room_for_it(pumps):
    east = pumps.client(pumps.start("east", links=link()))
    offer = east.offer("west", 9_000_000, 20.0)
    assert offer.wait(K_WAIT_S) is Verdict.ADMITTED
    pumps.kill("east")
    wait_for(lambda: east._alone)
    pumps.start("east", links=link(admission={"nominal_bps": 1e6}))
    wait_for(lambda: offer.late)
    assert offer.verdict is Verdict.ADMITTED
    assert status(east)["admitted"] == 0


def test_a_pump_started_anew_moves_its_promises_at_the_keeper_and_holds_none_twice(pumps):
    keeper = pumps.client(pumps.start("east", links=link()))
    second = {"site": "east", "links": link(host=keeper.address, admission={"share_ttl_s": 30.0})}
    other = pumps.client(pumps.start("other", **second))
    wait_for(lambda: status(other)["reachable"])
    # 45 s of the 60: there is no room for it twice.
    offer = other.offer("west", 450_000_000, 60.0)
    assert offer.wait(K_WAIT_S) is Verdict.ADMITTED
    assert not offer.alone
    lost = other.pump_pid
    pumps.kill("other")
    pumps.start("other", **second)
    wait_for(lambda: other.pump_pid != lost)
    wait_for(lambda: status(other)["reachable"])
    assert offer.verdict is Verdict.ADMITTED
    held = status(keeper)
    assert (held["admitted"], held["queued"]) == (1, 0)
    assert held["promised_bytes"] == 450_000_000
    assert not offer.late


def test_a_keeper_started_anew_hears_what_stood_and_takes_over_what_was_promised_without_it(pumps):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "{}:{}".format(*free.getsockname())
    keeper = pumps.client(pumps.start("east", listen=address, links=link()))
    other = pumps.client(pumps.start("other", site="east", links=link(host=address)))
    wait_for(lambda: status(other)["reachable"])
    offer = other.offer("west", 150_000_000, 60.0)
    assert offer.wait(K_WAIT_S) is Verdict.ADMITTED
    assert not offer.alone
    pumps.kill("east")
    wait_for(lambda: not status(other)["reachable"])
    alone = other.offer("west", 100_000, 60.0)
    assert alone.wait(K_WAIT_S) is Verdict.ADMITTED
    assert alone.alone
    lost = keeper.pump_pid
    pumps.start("east", listen=address, links=link())
    wait_for(lambda: keeper.pump_pid != lost)
    wait_for(lambda: status(keeper)["promised_bytes"] == 150_100_000)
    wait_for(lambda: not alone.alone)
    assert (offer.verdict, alone.verdict) == (Verdict.ADMITTED, Verdict.ADMITTED)
    assert not offer.late
    assert not alone.late
    assert status(other)["admitted"] == 0  # nothing is promised twice
    other.release(alone)
    other.release(offer)
    wait_for(lambda: status(keeper)["admitted"] == 0)


def test_another_sites_pump_gets_no_share(pumps):
    keeper = pumps.client(pumps.start("east", links=link()))
    thief = pumps.client(pumps.start("thief", links=link(host=keeper.address)))
    time.sleep(0.5)
    assert not status(thief)["reachable"]
    assert len(status(keeper)["shares_bps"]) == 1


def test_a_link_that_was_down_is_found_to_be_up_again_with_nothing_under_way(pumps):
    # Time enough for a refusal before the first probe.
    east = pumps.client(pumps.start("east", links=link(admission={"probe_every_s": 2.0})))
    west = pumps.client(pumps.start("west"))
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=0)
    lease = west.grant_lease(1, 0, [(dst.ctypes.data, len(dst))], 60)
    row = ([src.ctypes.data], [dst.ctypes.data], [len(src)])
    assert east.submit(lease.grant, *row, kind=TransferKind.KV, deadline_s=10, last=True).wait(K_WAIT_S).ok
    with silent_address() as nowhere:
        lost = dataclasses.replace(lease.grant, address=nowhere, lease_id=1)
        stuck = east.submit(lost, *row, kind=TransferKind.KV, deadline_s=60)
        wait_for(lambda: not status(east)["estimate"]["up"])
        offer = east.offer("west", 4096, 10.0)
        assert offer.wait(K_WAIT_S) is Verdict.REFUSED
        assert offer.reason is RefusalReason.LINK_DOWN
        assert offer.retry_after_s is not None
        east.cancel(stuck)
        wait_for(lambda: status(east)["estimate"]["up"])
    assert east.offer("west", 4096, 10.0).wait(K_WAIT_S) is Verdict.ADMITTED


@contextlib.contextmanager
def silent_address():
    """host:port where nothing ever answers, not even the kernel: its queue of connections is full."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            one = held.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield "{}:{}".format(*listener.getsockname())


def test_an_offer_that_a_server_forgot_is_given_up_after_its_deadline_and_others_stay(pumps, monkeypatch):
    monkeypatch.setattr("prfaas.pump.owner.K_UNUSED_S", 0.2)
    pump = Pump(PumpConfig.model_validate({**pumps.config("east").model_dump(), "links": link()}))
    thread = threading.Thread(target=pump.run)
    thread.start()
    try:
        east = pumps.client(pump.config)
        kept = east.offer("west", 1_000_000, 30.0)
        forgotten = east.offer("west", 1_000_000, 0.5)
        for offer in (kept, forgotten):
            assert offer.wait(K_WAIT_S) is Verdict.ADMITTED
        wait_for(lambda: status(east)["admitted"] == 1)
        wait_for(lambda: status(east)["late"] == 0)
        east.release(kept)
        wait_for(lambda: status(east)["admitted"] == 0)
        east.release(forgotten)  # it remembers after all
        east.close()
    finally:
        pump.stop()
        thread.join()
