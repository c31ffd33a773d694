"""A trusted peer that shows as many boot ids as it likes, or another one's."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from prfaas.config.pump import PumpConfig, split_address
from prfaas.model.transfer import FailureReason
from prfaas.pump.server import Pump
from prfaas.transfer import frames as f
from prfaas.transfer.receiving import Lease
from prfaas.transfer.segments import Ranges
from prfaas.transfer.tables import encode_table

K_TOKEN = b"t" * 16
K_REGION = Ranges(np.array([[1 << 20, 4096]], dtype=np.uint64))


@pytest.fixture
def pump(tmp_path) -> Iterator[Pump]:
    pump = Pump(PumpConfig(site="west", control_socket=tmp_path / "west.sock"))
    pump._started_s -= 60  # not so new that it waits for servers of a pump before it
    yield pump
    pump.close()


class Peer:
    """A pump of `site` that shows `boot`, with one stream."""

    def __init__(self, pump: Pump, site: str, boot: int) -> None:
        self._pump, self._sock = pump, socket.create_connection(split_address(pump.address))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.setblocking(False)
        self.ended = False
        hello = f.Hello(1, 2, boot.to_bytes(16, "big"), site, "127.0.0.1:1", 0)
        self.say(f.message_frame(1, f.FrameType.HELLO, hello))

    def say(self, frame: bytes) -> bytes:
        """What comes back."""
        if frame:
            self._sock.send(frame)
        for _ in range(4):
            self._pump.loop.turn(0.005)
        try:
            said = self._sock.recv(1 << 16)
            self.ended = not said
        except BlockingIOError:
            said = b""
        except ConnectionError:
            said, self.ended = b"", True
        return said

    def close(self) -> None:
        self._sock.close()

    def open(self, transfer_id: int) -> None:
        opening = f.Open(5, 1, 9, K_TOKEN, "kv", 64, 1, 30.0)
        self.say(f.message_frame(2, f.FrameType.OPEN, opening, transfer_id))


@pytest.fixture
def shows(pump) -> Iterator[Callable[[str, int], Peer]]:
    """A peer of the site with the boot id."""
    peers: list[Peer] = []

    def shown(site: str, boot: int) -> Peer:
        peers.append(Peer(pump, site, boot))
        return peers[-1]

    yield shown
    for peer in peers:
        peer.close()


def grant(pump: Pump) -> None:
    pump.receiving.grant(Lease(9, K_TOKEN, 5, 1, K_REGION, 1e12, "a server"), K_REGION)


def test_boot_ids_without_end_hold_no_more_than_a_sites_places(pump, shows, monkeypatch) -> None:
    monkeypatch.setattr("prfaas.pump.sessions.K_PUMPS_PER_SITE", 4)
    grant(pump)
    works = shows("east", 1)
    works.open(77)
    other = shows("north", 1)
    many = [shows("east", 2 + number) for number in range(30)]
    for one in (works, other, *many):
        one.say(b"")
    assert [number for number, one in enumerate(many) if not one.ended] == [27, 28, 29]
    assert not works.ended, "a transfer of it is under way"
    assert not other.ended, "another site has places of its own"
    assert len(pump.inbound.streams) == 5
    # One that had to go comes again, at another's cost.
    shows("east", 2)
    many[27].say(b"")
    assert many[27].ended


def test_who_shows_another_sites_boot_id_gets_no_hold_of_its_transfers(pump, shows) -> None:
    grant(pump)
    owner, thief = shows("east", 1), shows("north", 1)
    owner.open(77)
    assert pump.receiving.n_transfers == 1
    cancel = f.Refuse(FailureReason.CANCELLED.value, "by nobody who may")
    thief.say(f.message_frame(2, f.FrameType.CANCEL, cancel, 77))
    assert pump.receiving.n_transfers == 1
    table = encode_table(np.array([[1 << 20, 64]], dtype=np.uint64), 2)
    body = table + bytes(64)
    header = f.Header(2, f.FrameType.BLOCK, 0, len(body), len(table), 77, 0, f.checksum(body))
    thief.say(header.to_bytes() + body)
    assert pump.inbound.refusals == {FailureReason.LEASE_MISMATCH.value: 1}
    owner.say(f.message_frame(2, f.FrameType.CANCEL, cancel, 77))
    assert pump.receiving.n_transfers == 0
