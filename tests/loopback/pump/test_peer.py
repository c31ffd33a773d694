"""What a pump knows of a peer before and just after it is connected."""

from __future__ import annotations

import contextlib
import socket
import time

from prfaas.config.pump import split_address
from prfaas.model.transfer import FailureReason
from prfaas.pump.loop import Loop
from prfaas.pump.server import Pump
from prfaas.pump.spreading import Spreading
from prfaas.pump.tcpinfo import TcpInfo
from prfaas.transfer import frames as f
from prfaas.transfer.sending import Failed

K_MOST = 2 << 20


def far(packets: int, rtt_s: float) -> TcpInfo:
    """What the kernel says of a stream whose window holds so many packets."""
    return TcpInfo(rtt_s, rtt_s, packets, 1448, 0, 0, 0, 0, 0, 0, 0.0, 0, 0)


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
    pump = Pump(pumps.config("east", congestion_control="reno"))  # driven by loss, and anybody may have it
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


def test_the_first_round_trip_after_a_rest_is_handed_out_at_a_pace_however_much_waits():
    loop, looks = Loop(), []
    spreading = Spreading(loop, looks.append)
    infos = [far(packets=100, rtt_s=0.04) for _ in range(8)]  # windows of 1.16 MB
    now = 100.0
    assert not spreading.is_on(10**9, now)
    spreading.begins(infos, now)
    assert spreading.is_on(10**9, now)
    assert spreading.with_room([], infos, now) == []
    handed = 0
    for _ in range(20):  # 2 ms each
        spreading.with_room([], infos, now)
        while spreading._allowance.open:
            spreading.spent(16 * 1024)
            handed += 16 * 1024
        now += 0.002
    windows = 8 * 100 * 1448
    assert 0.9 * windows < handed < 1.6 * windows
    assert not spreading.is_on(10**9, 100.0 + 0.041), "then acknowledgements set the pace"
    assert spreading.is_on(windows // 2, 100.0 + 0.041)
    spreading.begins([far(packets=100, rtt_s=0.0001)] * 8, now)
    assert not spreading.is_on(10**9, now), "on a short path there is nothing to pace"
    loop.close()


class Heard:
    """What a stream that works is given to say."""

    def __init__(self) -> None:
        self.version, self.ready, self.said = 2, True, []

    def send_control(self, frame: bytes) -> None:
        self.said.append(f.Header.from_bytes(frame[: f.K_HEADER_BYTES], 2))


def test_each_stream_says_that_a_transfer_is_cancelled_for_each_may_still_have_its_opening_on_the_way(pumps):
    pump = Pump(pumps.config("east"))
    try:
        peer = pump.peer("192.0.2.1:7700", pump.loop.now())
        streams = [Heard(), Heard(), Heard()]
        streams[1].ready = False
        peer._streams = dict(enumerate(streams))
        peer._tell_cancelled(Failed(7, FailureReason.CANCELLED, "", 0, 0, 0.0, tell_peer=True))
        said = [[(one.type, one.transfer_id) for one in stream.said] for stream in streams]
        assert said == [[(f.FrameType.CANCEL, 7)], [], [(f.FrameType.CANCEL, 7)]]
        peer._streams.clear()
    finally:
        pump.close()


def test_a_cancel_that_overtakes_the_opening_by_another_stream_is_followed_by_one_that_does_not(pumps):
    west = pumps.client(pumps.start("west"))
    memory = pumps.memory(west, 4096, fill=0)
    lease = west.grant_lease(5, 0, [(memory.ctypes.data, 4096)], 30)
    opening = f.Open(5, 0, lease.grant.lease_id, lease.grant.token, "kv", 4096, 1, 20.0, 0, 1, "")
    cancel = f.message_frame(2, f.FrameType.CANCEL, f.Refuse("cancelled", "by the sender"), 7)
    with contextlib.ExitStack() as stack:
        streams = []
        for index in range(2):
            sock = stack.enter_context(socket.create_connection(split_address(west.address), timeout=20))
            hello = f.Hello(1, 2, b"sixteen bytes ok", "east", "127.0.0.1:1", index)
            sock.sendall(f.message_frame(1, f.FrameType.HELLO, hello))
            f.Header.from_bytes(sock.recv(f.K_HEADER_BYTES), None)
            streams.append(sock)
        heard, said = b"heard the cancel", b""
        streams[0].sendall(cancel + f.control_frame(2, f.FrameType.PING, heard))
        while heard not in said:
            said += streams[0].recv(4096)
        streams[1].sendall(f.message_frame(2, f.FrameType.OPEN, opening, 7))
        pumps.until(lambda: west.stats()["incoming"] == 1)
        streams[1].sendall(cancel)
        assert not lease.wait(20)
        assert lease.failure.reason == "cancelled"
    lease.revoke()
