"""A peer that sends whatever it likes: no frame of its brings the pump down, makes it hang or grow, or gets a
byte into anybody's memory.

Thousands of frames here; PRFAAS_LONG_TESTS=1 sends a million (some minutes).
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from prfaas.config.pump import PumpConfig, split_address
from prfaas.model.errors import RemoteProtocolError
from prfaas.model.transfer import TransferKind
from prfaas.pump.handler import Counters
from prfaas.pump.peer import Peer
from prfaas.pump.server import Pump
from prfaas.pump_client import LocalPumpClient
from prfaas.transfer import frames as f
from prfaas.transfer.segments import iov
from prfaas.transfer.tables import K_STRIDES, K_STRIDES_ROW, K_STRIDES_TABLE, encode_table

K_FRAMES = 1_000_000 if os.environ.get("PRFAAS_LONG_TESTS") else 8000
K_BATCH = 64
K_GROWTH_BYTES = 64 << 20
K_MEMORY_BYTES = 1 << 16
K_MOST_TRANSFERS = 4
K_VERSION = f.K_VERSION_NEWEST
K_HELLO = f.Hello(1, K_VERSION, b"fuzzed-by-a-test", "elsewhere", "127.0.0.1:1", 0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def any_bytes(rng: random.Random, most: int) -> bytes:
    return rng.randbytes(rng.choice((0, 1, rng.randrange(most), most)))


def any_word(rng: random.Random, bits: int) -> int:
    return rng.choice((0, 1, 7, (1 << bits) - 1, 1 << bits - 1, rng.getrandbits(bits)))


class Fuzzer:
    """Frames from a seed. `grant`: a lease whose token it knows; it aims beside the memory, never into it."""

    def __init__(self, rng: random.Random, grant, address: int) -> None:
        self.rng, self._grant, self._address = rng, grant, address

    def survivable(self) -> bytes:
        """A frame that is refused, answered or ignored, and leaves the stream as it is."""
        rng = self.rng
        kind = rng.randrange(7)
        if kind == 0:
            return f.message_frame(K_VERSION, f.FrameType.OPEN, self._open(), any_word(rng, 64))
        if kind == 1:
            return f.message_frame(
                K_VERSION, f.FrameType.CANCEL, f.Refuse("x" * rng.randrange(300)), any_word(rng, 64)
            )
        if kind == 2:
            return f.control_frame(K_VERSION, f.FrameType.PING, any_bytes(rng, 4096))
        if kind == 3:
            message = f.LedgerMessage("no-such-link", True, any_word(rng, 31), {"op": "offer", "key": "x"})
            return f.message_frame(K_VERSION, f.FrameType.LEDGER, message)
        return self._block(sound=kind != 4)

    def _open(self) -> f.Open:
        rng, grant = self.rng, self._grant
        known, right = rng.random() < 0.5, rng.random() < 0.8
        return f.Open(
            grant.room if known else any_word(rng, 63), grant.generation if known else any_word(rng, 31),
            grant.lease_id if known else any_word(rng, 62),
            grant.token if known and right else any_bytes(rng, 64),
            "kv" * rng.randrange(3), rng.choice((64, 4096, any_word(rng, 32))),
            rng.choice((1, 2, 64, any_word(rng, 31))), rng.choice((0.0, 1e-3, 1e300, -5.0)),
            any_word(rng, 31), any_word(rng, 31),
        )  # fmt: skip

    def _block(self, *, sound: bool) -> bytes:
        """Its table is right in form; its addresses are never all within the lease."""
        rng = self.rng
        n = rng.randrange(1, 5)
        outside = (self._address - 5, self._address + K_MEMORY_BYTES - 3, 8, 1 << 40, (1 << 64) - 5000)
        start = rng.choice(outside)
        if rng.random() < 0.5:
            table = encode_table(iov([start + 16 * i for i in range(n)], [8] * n), K_VERSION)
        else:
            row = np.array((start, 16, 8, n), K_STRIDES_ROW)
            table = K_STRIDES_TABLE.pack(K_STRIDES, 1) + row.tobytes()
        payload = rng.randbytes(8 * n)
        body = table + payload
        crc = f.checksum(body) ^ (0 if sound else 1 + rng.getrandbits(16))
        header = f.Header(
            K_VERSION, f.FrameType.BLOCK, 0, len(body), len(table), any_word(rng, 64), any_word(rng, 32), crc
        )
        return header.to_bytes() + body

    def _block_of_any_runs(self) -> bytes:
        rng, n = self.rng, self.rng.randrange(5)
        runs = [(self._address + any_word(rng, 64) & (1 << 64) - 1, *(any_word(rng, 32) for _ in range(3)))
                for _ in range(n)]  # fmt: skip
        table = K_STRIDES_TABLE.pack(K_STRIDES, rng.choice((n, n, n, any_word(rng, 32))))
        table += np.array(runs, K_STRIDES_ROW).tobytes()
        told = sum(size * count for _, _, size, count in runs)
        body = table + rng.randbytes(told if 0 < told < 4096 else rng.randrange(1, 64))
        header = f.Header(K_VERSION, f.FrameType.BLOCK, 0, len(body), len(table), 1, 1, f.checksum(body))
        return header.to_bytes() + body

    def deadly(self) -> bytes:
        """A frame that most often ends the stream: garbage at some depth."""
        rng = self.rng
        kind = rng.randrange(7)
        if kind == 0:
            return rng.randbytes(f.K_HEADER_BYTES)
        frame = bytearray(self.survivable())
        if kind == 1:
            frame[rng.randrange(f.K_HEADER_BYTES)] ^= 1 << rng.randrange(8)
            return bytes(frame)
        if kind == 2:
            # Headers that are sound and lengths that aren't.
            numbers = [any_word(rng, 32), any_word(rng, 32), any_word(rng, 64), any_word(rng, 32)]
            kinds = (rng.choice(list(f.FrameType)), rng.randrange(256))
            packed = f.K_HEADER.pack(f.K_MAGIC, rng.choice((1, 2, 3, 4)), rng.choice(kinds), 0, *numbers, 0)
            return packed + struct.pack("<I", f.checksum(packed))
        types = list(f.FrameType)
        if kind == 3:
            return f.control_frame(K_VERSION, rng.choice(types), any_bytes(rng, 2000), any_word(rng, 64))
        if kind == 4:
            fields = {"room": -1, "lease_id": "x", "token": any_bytes(rng, 9), "reason": [], "link": {}, 7: 7}
            return f.control_frame(K_VERSION, rng.choice(types), msgspec.msgpack.encode(fields))
        if kind == 5:
            return self._block_of_any_runs()
        body = any_bytes(rng, 300) or b"x"
        table = rng.randrange(1, len(body) + 1)
        header = f.Header(K_VERSION, f.FrameType.BLOCK, 0, len(body), table, 1, 1, f.checksum(body))
        return header.to_bytes() + body


class Liar:
    """One connection to the pump after another."""

    def __init__(self, pump: Pump) -> None:
        self._pump, self._sock = pump, None
        self.connections = 0

    def say(self, data: bytes) -> bool:
        """Send it and let the pump work; whether the connection stands."""
        if self._sock is None:
            self._connect()
        sent = 0
        while sent < len(data):
            with contextlib.suppress(BlockingIOError):
                sent += self._sock.send(data[sent:])
            if not self._turn():
                return False
        return self._turn() and self._turn()

    def _connect(self) -> None:
        self.connections += 1
        self._sock = socket.create_connection(split_address(self._pump.address))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.setblocking(False)
        self._sock.send(f.message_frame(1, f.FrameType.HELLO, K_HELLO))
        for _ in range(3):
            assert self._turn()

    def _turn(self) -> bool:
        self._pump.loop.turn(0)
        try:
            while self._sock.recv(1 << 16):
                pass
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        self.close()
        return False

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._sock = None


@pytest.fixture
def pump(tmp_path):
    config = PumpConfig(site="east", control_socket=tmp_path / "east.sock", max_transfers=K_MOST_TRANSFERS)
    pump = Pump(config)
    pump._started_s -= 60  # not so new that it waits for servers of a pump before it
    yield pump
    pump.close()


def beside(pump, call):
    """call() in a thread, while the pump works."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    while thread.is_alive():
        pump.loop.turn(0.05)
    thread.join()
    assert found, "it failed"
    return found[0]


@pytest.mark.timeout(900 if K_FRAMES >= 1_000_000 else 60)
def test_whatever_a_peer_sends_the_pump_lives_keeps_its_size_and_writes_nothing(pump):
    client = beside(pump, lambda: LocalPumpClient.open(pump.config, start=False))
    canary, free = (np.full(K_MEMORY_BYTES, fill, np.uint8) for fill in (0xA5, 0))
    client.register([(x.ctypes.data, K_MEMORY_BYTES) for x in (canary, free)])
    lease = client.grant_lease(7, 0, [(canary.ctypes.data, K_MEMORY_BYTES)], 3600)
    fuzzer, liar = Fuzzer(random.Random(11), lease.grant, canary.ctypes.data), Liar(pump)
    sent = ended = grown_from = 0
    while sent < K_FRAMES:
        good = [fuzzer.survivable() for _ in range(fuzzer.rng.randrange(K_BATCH))]
        assert liar.say(b"".join(good)), "a harmless frame ended the stream"
        ended += not liar.say(fuzzer.deadly())
        liar.close()  # what is left of it may wait for bytes that it promised
        sent += len(good) + 1
        if sent > K_FRAMES // 5 and not grown_from:
            grown_from = resident_bytes()
    assert ended > 0.5 * liar.connections
    # It got as far as each of these checks.
    reached = {"lease_unknown", "lease_mismatch", "bad_request", "address_refused", "too_many"}
    assert reached <= pump.inbound.refusals.keys()
    assert pump.inbound.counters.corrupt_blocks
    assert resident_bytes() - grown_from < K_GROWTH_BYTES
    liar.close()
    for _ in range(20):
        pump.loop.turn(0.01)
    assert not pump.inbound.streams
    assert pump.receiving.n_transfers <= K_MOST_TRANSFERS
    assert (canary == 0xA5).all()
    # And it still serves who is honest, at once.
    lease.revoke()  # whose transfers, opened and never sent, leave no room for another
    again = client.grant_lease(8, 0, [(free.ctypes.data, K_MEMORY_BYTES)], 60)

    def honest():
        transfer = client.submit(
            again.grant, [canary.ctypes.data], [free.ctypes.data], [K_MEMORY_BYTES],
            kind=TransferKind.KV, deadline_s=30, last=True,
        )  # fmt: skip
        return transfer.wait(30)

    outcome = beside(pump, honest)
    assert outcome.ok, outcome
    assert (free == 0xA5).all()
    beside(pump, lambda: client.close() or True)


class Unconnected:
    """What a peer asks of the stream that a frame came on."""

    index, version, ready, waiting_to_write, peer_site, session = 0, K_VERSION, False, False, "west", None

    def __init__(self) -> None:
        self.counters = Counters()

    def send_control(self, frame: bytes) -> None:
        pass


def test_whatever_a_receiver_answers_the_sender_lives(pump):
    rng, now = random.Random(12), pump.loop.now()
    peer = Peer(pump, "127.0.0.1:9", now)
    fuzzer = Fuzzer(rng, f.Open(1, 1, 1, b"t" * 16, "kv", 1, 1, 1.0), 1 << 30)
    refused = 0
    for _ in range(K_FRAMES // 2):
        kind = rng.choice([t for t in f.FrameType if t not in (f.FrameType.BLOCK, f.FrameType.HELLO)])
        body = rng.choice((any_bytes(rng, 200), fuzzer.survivable()[f.K_HEADER_BYTES :]))
        if kind is f.FrameType.ACK and rng.random() < 0.5:
            body = f.ack_body([(any_word(rng, 64), any_word(rng, 32)) for _ in range(3)])
        header = f.Header(K_VERSION, kind, 0, len(body), 0, any_word(rng, 64), any_word(rng, 32), 0)
        try:
            peer.on_frame(Unconnected(), header, memoryview(body), now)
        except RemoteProtocolError:
            refused += 1
    assert 0 < refused < K_FRAMES // 2
    assert len(peer.sending) == 0
    peer.close(now)
