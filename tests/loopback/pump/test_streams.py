"""The number of streams to a peer goes down as well, and what their kernels hold follows how late we are."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest

from prfaas.model.transfer import TransferKind
from prfaas.pump import tcpinfo
from prfaas_testbed.bench.certificates import tls_for

K_BYTES = 8 << 20


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_streams_beyond_the_number_wanted_end_under_load_and_nothing_is_lost_or_sent_twice(
    pumps, tmp_path, monkeypatch, encrypted
):
    monkeypatch.setattr("prfaas.transfer.streams.K_SETTLE_S", 0.05)
    monkeypatch.setattr("prfaas.transfer.streams.K_SETTLE_RTT", 0.0)
    monkeypatch.setattr("prfaas.pump.tcpinfo.K_UNSENT_MOST_BYTES", 1 << 20)  # so that something waits
    monkeypatch.setattr("prfaas.transfer.streams.K_CALM_S", 0.2)
    monkeypatch.setattr("prfaas.pump.peer.K_SILENT_S", 0.1)
    monkeypatch.setattr("prfaas.pump.peer.K_HEDGE_S", 60.0)  # nor a second time on suspicion
    sites = {
        name: {"tls": tls_for(tmp_path / "keys", name).model_dump()} if encrypted else {}
        for name in ("east", "west")
    }
    west = pumps.client(pumps.start("west", **sites["west"]))
    with pumps.here("east", **sites["east"]) as pump:
        east = pumps.client(pump.config)
        source, target = pumps.memory(east, K_BYTES), pumps.memory(west, K_BYTES, fill=0)
        lease = west.grant_lease(1, 0, [(target.ctypes.data, K_BYTES)], 60)

        def submit():
            return east.submit(
                lease.grant, [source.ctypes.data], [target.ctypes.data], [K_BYTES], kind=TransferKind.KV,
                deadline_s=60,
            )  # fmt: skip

        def streams() -> int:
            return west.stats()["inbound"]["streams"]

        assert submit().wait(20).ok
        (peer,) = pump._peers.values()
        peer.count.wanted = 8
        under_way, resent = [submit() for _ in range(8)], 0
        pumps.until(lambda: streams() == 8)
        end = time.monotonic() + 60
        while streams() > 2:
            assert time.monotonic() < end, f"{streams()} streams, {peer.count.wanted} wanted"
            outcome = under_way.pop(0).wait(20)
            assert outcome.ok
            resent += outcome.resent_blocks
            under_way.append(submit())
        assert resent == 0
        assert all(one.wait(20).ok for one in under_way)
        assert np.array_equal(source, target)
        assert peer.count.wanted == peer.n_ready == 2
        assert peer.totals().streams_lost == west.stats()["inbound"]["streams_lost"] == 0
        lease.revoke()


def test_a_stream_that_is_wanted_again_before_it_ended_goes_on(pumps, monkeypatch):
    monkeypatch.setattr("prfaas.pump.peer.K_SILENT_S", 3600.0)
    west = pumps.client(pumps.start("west"))
    with pumps.here("east", min_streams=4) as pump:
        east = pumps.client(pump.config)
        east.prepare(west.address)
        pumps.until(lambda: [p.n_ready for p in pump._peers.values()] == [4])
        (peer,) = pump._peers.values()
        peer.count.wanted = 2
        pumps.until(lambda: sum(s.is_retiring for s in peer.streams) == 2)
        peer.count.wanted = 4
        pumps.until(lambda: not any(s.is_retiring for s in peer.streams))
        assert peer.n_ready == 4
        assert peer.totals().streams_lost == 0


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection, whose receiver takes little before it reads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        sender = socket.create_connection(listener.getsockname())
        receiver, _ = listener.accept()
    with sender, receiver:
        sender.setblocking(False)
        yield sender, receiver


def test_a_stream_is_dry_when_its_kernel_has_sent_all_that_it_was_handed(wire):
    sender, receiver = wire
    assert tcpinfo.is_dry(sender)
    sent = 0
    try:
        while True:
            sent += sender.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    assert not tcpinfo.is_dry(sender)
    while sent:
        sent -= len(receiver.recv(sent))
    assert tcpinfo.is_dry(sender)
    sender.close()
    assert not tcpinfo.is_dry(sender)


def test_streams_that_run_dry_though_more_waits_are_let_hold_more_on_a_long_path_alone(pumps, monkeypatch):
    west = pumps.client(pumps.start("west"))
    with pumps.here("east", min_streams=4) as pump:
        east = pumps.client(pump.config)
        east.prepare(west.address)
        pumps.until(lambda: [p.n_ready for p in pump._peers.values()] == [4])
        (peer,) = pump._peers.values()
        waits = [True]
        monkeypatch.setattr(peer.sending, "can_send", lambda: waits[0])
        now = pump.loop.now()
        began_s = peer.slack_s(now)
        peer.on_dry(peer.streams[0], now)
        assert peer.slack_s(now) == began_s, "on a short path the kernel sends all at once"
        monkeypatch.setattr("prfaas.pump.peer_figures.K_LONG_PATH_S", 1e-9)
        waits[0] = False
        peer.on_dry(peer.streams[0], now)
        assert peer.slack_s(now) == began_s, "nothing waited"
        waits[0] = True
        peer.on_dry(peer.streams[0], now)
        assert peer.slack_s(now) > began_s
        (said,) = east.stats()["peers"]
        assert said["slack_s"] > began_s, "an operator sees it"


def info(rtt_s: float, packets: int, delivery_bps: float, pacing_bps: float) -> tcpinfo.TcpInfo:
    return tcpinfo.TcpInfo(
        rtt_s, rtt_s, packets, 1448, 0, 0, 0, 0, 0, 0, delivery_bps, 0, 0, pacing_rate_bps=pacing_bps
    )


def test_what_a_kernel_may_hold_goes_by_pace_and_window_not_by_a_rate_sample_of_a_moment():
    held_up = info(0.04, 400, delivery_bps=5e6, pacing_bps=50e6)
    assert tcpinfo.unsent_bytes(held_up, 0.06, 64) == int(50e6 / 8 * 0.06)
    assert tcpinfo.unsent_bytes(held_up, 0.18, 64) == pytest.approx(3 * 50e6 / 8 * 0.06, abs=1)
    unpaced = info(0.04, 200, delivery_bps=5e6, pacing_bps=float(2**64))
    assert tcpinfo.unsent_bytes(unpaced, 0.06, 64) == pytest.approx(200 * 1448 / 0.04 * 0.06, abs=1)
    short = info(0.0001, 10, delivery_bps=1e9, pacing_bps=1e9)
    assert tcpinfo.unsent_bytes(short, 0.06, 64) == tcpinfo.K_UNSENT_MOST_BYTES
