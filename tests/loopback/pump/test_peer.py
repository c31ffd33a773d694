"""What a pump knows of a peer before and just after it is connected."""

from __future__ import annotations

import time

from prfaas.pump.server import Pump

K_MOST = 2 << 20


def test_blocks_to_a_peer_that_was_never_reached_are_small_unless_it_is_this_machine(pumps):
    pump = Pump(pumps.config("east"))
    try:
        now = pump.loop.now()
        assert pump.peer("192.0.2.1:7700", now).block_bytes(K_MOST) == 64 * 1024
        assert pump.peer("127.0.0.1:9", now).block_bytes(K_MOST) == K_MOST
    finally:
        pump.close()


def test_a_far_peer_gets_its_streams_with_the_first_that_is_ready_not_with_the_next_look(pumps, monkeypatch):
    monkeypatch.setattr("prfaas.transfer.streams.K_FAR_S", 1e-7)  # everything is far
    west = pumps.client(pumps.start("west"))
    pump = Pump(pumps.config("east", congestion_control="cubic"))
    try:
        peer = pump.peer(west.address, pump.loop.now())
        monkeypatch.setattr(peer, "_tick", lambda now: None)
        pump.loop._timers.clear()  # nor does it look later
        peer.prepare(pump.loop.now())
        assert len(peer.streams) == 2
        end = time.monotonic() + 10
        while peer.n_ready < 8:
            assert time.monotonic() < end
            pump.loop.turn(0.05)
    finally:
        pump.close()
