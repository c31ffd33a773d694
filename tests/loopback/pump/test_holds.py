"""What a pump and its clients hold when much has come and gone: no more objects than before it came."""

from __future__ import annotations

import gc
import socket
import time
from collections import Counter, deque

import numpy as np
import pytest

from prfaas.config.pump import split_address
from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import LeaseGrant, TransferKind
from prfaas.pump.server import Pump
from prfaas.pump_client import LocalPumpClient
from prfaas.transfer import frames as f

K_BYTES = 1 << 18
K_PIECE_BYTES = 4096
K_ROUNDS = 12
K_BOUNDED = ("_Past", "Remembered.", "Line.", "Loop._timers", "Pump.ended", "Inbound.refusals")
"""Of these there is now more and now less, up to a number that tests of their own hold (transfer/), or to
as many as there are reasons: on a busy machine a transfer ends by one that no round before had.
"""


def held() -> Counter[str]:
    """Objects of our own classes, by class, and entries of their tables, by attribute."""
    gc.collect()
    found: Counter[str] = Counter()
    for one in gc.get_objects():
        kind = type(one)
        if not str(kind.__module__).startswith("prfaas."):
            continue
        found[kind.__qualname__] += 1
        names = [*getattr(one, "__dict__", ()), *getattr(kind, "__slots__", ())]
        for name in names:
            value = getattr(one, name, None)
            if isinstance(value, dict | list | set | deque | bytearray):
                found[f"{kind.__qualname__}.{name}"] += len(value)
    for name in [name for name in found if name.startswith(K_BOUNDED)]:
        del found[name]
    return found


class Life:
    """Rounds of what servers and peers do to two pumps, well and badly."""

    def __init__(self, east: Pump, west: Pump) -> None:
        self.east, self.west = east, west
        self._rooms = 0

    def round(self) -> None:
        with (
            LocalPumpClient.open(self.east.config, start=False) as sender,
            LocalPumpClient.open(self.west.config, start=False) as receiver,
        ):
            source, target = np.ones(K_BYTES, np.uint8), np.zeros(K_BYTES, np.uint8)
            for client, array in ((sender, source), (receiver, target)):
                client.register([(array.ctypes.data, K_BYTES)])
            for how in ("whole", "in pieces", "cancelled", "revoked", "late", "unknown", "refused", "left"):
                self._transfer(how, sender, receiver, source, target)
            sender.submit_raw(
                receiver.session_id, [source.ctypes.data], [target.ctypes.data], [K_BYTES], deadline_s=20
            ).wait(20)
            sender.release(sender.offer("west", 1 << 20, 20.0))
            sender.prepare("127.0.0.1:9")
            with pytest.raises(PrfaasError):
                sender.forward("127.0.0.1:port", "127.0.0.1", 1)
            for client, array in ((sender, source), (receiver, target)):
                client.deregister([array.ctypes.data])
        self._strangers()

    def _transfer(
        self, how: str, sender: LocalPumpClient, receiver: LocalPumpClient, source: np.ndarray,
        target: np.ndarray,
    ) -> None:  # fmt: skip
        self._rooms += 1
        lease = receiver.grant_lease(self._rooms, 1, [(target.ctypes.data, K_BYTES)], 20.0)
        offer = sender.offer("west", K_BYTES, 20.0)
        assert offer.wait(10) is not None
        grant = lease.grant
        if how == "unknown":
            grant = LeaseGrant(grant.address, 1 << 50, grant.token, grant.room, 1, grant.window_bytes)
        outside = K_BYTES if how == "refused" else 0
        size = K_PIECE_BYTES if how == "in pieces" else K_BYTES
        starts = np.arange(0, K_BYTES, size, dtype=np.uint64)
        if how == "revoked":
            lease.revoke()
        transfer = sender.submit(
            grant, source.ctypes.data + starts, target.ctypes.data + outside + starts,
            np.full(len(starts), size, np.uint64), kind=TransferKind.KV,
            deadline_s=0.0 if how == "late" else 20.0, last=True, offer=offer,
        )  # fmt: skip
        if how == "cancelled":
            sender.cancel(transfer)
        if how == "left":
            return  # both close with it under way, or just ended
        outcome = transfer.wait(20)
        assert outcome is not None
        if how in ("whole", "in pieces"):
            assert outcome.ok, outcome
            assert lease.wait(10)
        elif how in ("unknown", "revoked", "refused"):
            assert not outcome.ok
        lease.revoke()

    def _strangers(self) -> None:
        """Some say nothing, some nonsense, some that they are pumps, with a transfer or a forwarding."""
        for pump in (self.east, self.west):
            for number, said in enumerate(
                (
                    b"",
                    b"GET / HTTP/1.1\r\n\r\n",
                    f.message_frame(1, f.FrameType.HELLO, self._hello(forwarding=False)),
                    f.message_frame(1, f.FrameType.HELLO, self._hello(forwarding=True)),
                )
            ):
                with socket.create_connection(split_address(pump.address)) as sock:
                    sock.sendall(said)
                    if number == 2:
                        opening = f.Open(5, 1, 9, b"t" * 16, "kv", 64, 1, 30.0)
                        sock.sendall(f.message_frame(2, f.FrameType.OPEN, opening, 77))
                    if number == 3:
                        where = f.Forward("127.0.0.1", 1)
                        sock.sendall(f.message_frame(2, f.FrameType.FORWARD, where))
                    time.sleep(0.01)

    def _hello(self, *, forwarding: bool) -> f.Hello:
        self._rooms += 1
        boot = self._rooms.to_bytes(16, "big")
        return f.Hello(1, 2, boot, "strange", "127.0.0.1:1", 0, forwarding=forwarding)


def test_whatever_comes_and_goes_leaves_nothing_behind(pumps, monkeypatch) -> None:
    monkeypatch.setattr("prfaas.pump.inbound.K_HANDSHAKE_S", 0.2)
    monkeypatch.setattr("prfaas.pump.peer.K_FORGET_S", 0.5)
    monkeypatch.setattr("prfaas.pump.dialling.K_WARM_TRIES", 2)
    links = [{"peer_site": "west", "admission": {"nominal_bps": 1e10}}]
    with (
        pumps.here("east", links=links) as east,
        pumps.here("west") as west,
    ):
        life = Life(east, west)
        for _ in range(3):
            life.round()
        before = settled(lambda now, last: now == last)
        for _ in range(K_ROUNDS):
            life.round()
        after = settled(lambda now, _: not now - before)
        assert not after - before, "what is there now and wasn't"


def settled(enough) -> Counter[str]:
    """What is held when timers have run out: tried for some seconds."""
    last: Counter[str] = Counter()
    for _ in range(40):
        now = held()
        if enough(now, last):
            break
        last = now
        time.sleep(0.25)
    return now
