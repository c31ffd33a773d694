"""Mutual TLS between pumps: who proves its site is served, and nobody else."""

from __future__ import annotations

import contextlib
import datetime
import gc
import selectors
import shutil
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from unittest.mock import Mock

import numpy as np
import pytest

from prfaas.config.pump import PumpConfig, split_address
from prfaas.model.transfer import FailureReason, TransferKind
from prfaas.pump import keys, openssl
from prfaas.pump.loop import Loop
from prfaas.pump.stream import State, Stream
from prfaas.pump.trust import Trust

K_WAIT_S = 40
K_NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Folders of keys by site; east and west trust each other and `third`, nobody trusts `stranger`."""
    folder = tmp_path_factory.mktemp("keys")
    for site in ("east", "west", "third", "stranger"):
        keys.create_site(folder / site, site, days=30, authority_days=60, now=K_NOW)
    for site in ("east", "west", "third", "stranger"):
        for peer in ("east", "west", "third"):
            keys.trust(folder / site, folder / peer / keys.K_AUTHORITY_CERTIFICATE)
    return folder


def tls(folder, site, only=()):
    return {
        "site_file": folder / site / keys.K_SITE_FILE,
        "authorities": [folder / site / keys.K_TRUSTED],
        "sites": only,
    }


def send(pumps, a, b, *, site=None, deadline_s=20.0, size=1 << 20, lease_site=""):
    """(outcome, whether the bytes are there, whether any byte was written)"""
    src, dst = pumps.memory(a, size), pumps.memory(b, size, fill=0)
    lease = b.grant_lease(1, 0, [(dst.ctypes.data, size)], 60, site=lease_site)
    transfer = a.submit(
        lease.grant, [src.ctypes.data], [dst.ctypes.data], [size],
        kind=TransferKind.KV, deadline_s=deadline_s, last=True,
    )  # fmt: skip
    outcome = transfer.wait(K_WAIT_S)
    lease.revoke()
    return outcome, np.array_equal(src, dst), dst.any()


def test_two_sites_that_trust_each_other_talk_encrypted_both_ways(pumps, sites):
    east = pumps.client(pumps.start("east", tls=tls(sites, "east")))
    west = pumps.client(pumps.start("west", tls=tls(sites, "west")))
    for a, b in ((east, west), (west, east)):
        outcome, landed, _ = send(pumps, a, b, size=1 << 23)
        assert outcome.ok
        assert landed
        streams = a.stats()["peers"][0]["streams"]  # type: ignore[index]
        assert streams
        assert all(s["tls"] for s in streams)
    assert "mutual TLS 1.3 by OpenSSL" in pumps.log("west")


def test_a_stranger_and_a_plain_peer_get_nothing(pumps, sites):
    west = pumps.client(pumps.start("west", tls=tls(sites, "west")))
    stranger = pumps.client(pumps.start("stranger", tls=tls(sites, "stranger")))
    plain = pumps.client(pumps.start("plain"))
    for client in (stranger, plain):
        outcome, landed, touched = send(pumps, client, west, deadline_s=3.0)
        assert outcome.reason in (FailureReason.PEER_UNTRUSTED, FailureReason.DEADLINE)
        assert not landed
        assert not touched
    assert west.stats()["inbound"]["refusals"]["untrusted"] > 0  # type: ignore[index]


def test_a_stranger_is_told_apart_from_a_dead_peer(pumps, sites):
    west = pumps.client(pumps.start("west", tls=tls(sites, "west")))
    stranger = pumps.client(pumps.start("stranger", tls=tls(sites, "stranger")))
    outcome, _, _ = send(pumps, stranger, west, deadline_s=15.0)
    assert outcome.reason is FailureReason.PEER_UNTRUSTED


def test_a_client_without_a_certificate_is_cut_off_before_it_is_heard(pumps, sites):
    west = pumps.client(pumps.start("west", tls=tls(sites, "west")))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    host, port = split_address(west.address)
    with socket.create_connection((host, port), timeout=10) as sock, context.wrap_socket(sock) as wrapped:
        try:
            wrapped.sendall(b"PRFA" + bytes(64))
            answer = wrapped.recv(4096)
        except (ssl.SSLError, ConnectionError):
            answer = b""
    assert answer == b""


def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent).do_handshake()
    return sent.read()


def beginnings() -> Iterator[tuple[bytes, bool, bool]]:
    """What somebody says who goes before he is known, whether an answer is awaited, and whether he resets."""
    hello = client_hello()
    for said in (b"", hello[:1], hello[:100], hello, hello + hello[:7], b"GET / HTTP/1.0\r\n\r\n"):
        for waits in (False, True) if said.startswith(hello) else (False,):
            for resets in (False, True):
                yield said, waits, resets


def test_whoever_comes_and_goes_before_he_is_known_ends_nothing(pumps, sites):
    """A look at a port, by those who watch over it or scan it, is just that."""
    west = pumps.client(pumps.start("west", tls=tls(sites, "west")))
    east = pumps.client(pumps.start("east", tls=tls(sites, "east")))
    for said, waits, resets in beginnings():
        with socket.create_connection(split_address(west.address), timeout=10) as sock:
            sock.sendall(said)
            if waits:
                sock.recv(1)
            if resets:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    outcome, landed, _ = send(pumps, east, west)
    assert (outcome.ok, landed) == (True, True), pumps.log("west")
    assert "Traceback" not in pumps.log("west")


def test_of_those_who_came_and_went_before_they_were_known_no_memory_is_held(pumps, sites):
    def ends() -> int:
        return sum(isinstance(one, openssl.End) for one in gc.get_objects())

    before = ends()
    with pumps.here("west", tls=tls(sites, "west")) as pump:
        for _ in range(30):
            socket.create_connection(split_address(pump.address), timeout=10).close()
        pumps.until(lambda: pump.inbound.refusals.get("handshake") == 30)
        assert ends() == before


def test_a_fault_of_ours_that_somebody_unknown_brings_out_costs_him_his_stream_alone(pumps, monkeypatch):
    says_hello, asked = Stream._send_hello, []

    def fail_once(stream):
        asked.append(stream)
        if len(asked) == 1:
            raise KeyError("a fault")
        says_hello(stream)

    monkeypatch.setattr(Stream, "_send_hello", fail_once)
    with pumps.here("west") as pump:
        for is_served in (False, True):
            with socket.create_connection(split_address(pump.address), timeout=10) as sock:
                assert bool(sock.recv(1)) is is_served
    assert len(asked) == 2


@pytest.mark.parametrize("state", [State.HELLO, State.READY])
def test_a_fault_of_ours_with_a_known_peer_is_not_hidden_though_its_stream_is_closed_by_then(state):
    class Faulty(Mock):
        def on_lost(self, *unused):
            raise KeyError("a fault")

    ours, theirs = socket.socketpair()
    with theirs, ours:
        ours.setblocking(False)
        stream = Stream(Loop(), ours, Faulty(), 0, dialled=False, tls=None, now=0.0)
        stream.state, stream.counters.control_bytes_sent = state, 1
        theirs.close()
        with pytest.raises(KeyError) if state is State.READY else contextlib.nullcontext():
            stream.on_ready(selectors.EVENT_READ, 1.0)
        assert stream.closed


def test_a_peer_that_takes_connections_and_ends_them_costs_its_transfers_and_no_others(pumps, sites):
    """As one does that is being started again."""
    east = pumps.client(pumps.start("east", tls=tls(sites, "east")))
    west_config = pumps.start("west", tls=tls(sites, "west"))
    west = pumps.client(west_config)
    third = pumps.client(pumps.start("third", tls=tls(sites, "third")))
    src, dst = pumps.memory(east, 1 << 16), pumps.memory(west, 1 << 16, fill=0)
    grant = west.grant_lease(1, 0, [(dst.ctypes.data, 1 << 16)], 60).grant
    address = split_address(west.address)
    pumps.kill("west")
    for said in (b"", b"\x15\x03\x03\x00\x02\x02\x28", b"HTTP/1.0 400 Bad Request\r\n\r\n"):
        for resets in (False, True):
            with socket.create_server(address) as server, until_asked(server, said, resets) as taken:
                transfer = east.submit(
                    grant, [src.ctypes.data], [dst.ctypes.data], [1 << 16],
                    kind=TransferKind.KV, deadline_s=1.0, last=True,
                )  # fmt: skip
                assert not transfer.wait(K_WAIT_S).ok
            assert taken
    outcome, landed, _ = send(pumps, east, third)
    assert (outcome.ok, landed) == (True, True), pumps.log("east")
    assert "Traceback" not in pumps.log("east")


@contextlib.contextmanager
def until_asked(server: socket.socket, said: bytes, resets: bool) -> Iterator[list[int]]:
    """Somebody takes each connection, hears its first bytes, says so much and goes."""
    taken: list[int] = []
    server.settimeout(0.2)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), server.accept()[0] as sock:
                sock.settimeout(1)
                taken.append(len(sock.recv(4096)))
                sock.sendall(said)
                if resets:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()


def test_an_expired_certificate_gets_nothing(pumps, sites, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(sites / "east", old)
    (old / keys.K_SITE_FILE).unlink()
    (old / keys.K_AUTHORITY_CERTIFICATE).unlink()
    (old / keys.K_AUTHORITY_KEY).unlink()
    before = K_NOW - datetime.timedelta(days=40)
    keys.create_site(old, "east", days=10, authority_days=10000, now=before)
    west_keys = tmp_path / "west"
    shutil.copytree(sites / "west", west_keys)
    keys.trust(west_keys, old / keys.K_AUTHORITY_CERTIFICATE)
    west = pumps.client(pumps.start("west", tls=tls(tmp_path, "west")))
    east = pumps.client(
        pumps.start("east", tls={"site_file": old / keys.K_SITE_FILE, "authorities": [old / keys.K_TRUSTED]})
    )
    outcome, _, touched = send(pumps, east, west, deadline_s=15.0)
    assert outcome.reason is FailureReason.PEER_UNTRUSTED
    assert not touched


def test_a_trusted_site_cannot_pose_as_another_nor_write_to_anothers_lease(pumps, sites):
    west = pumps.client(pumps.start("west", tls=tls(sites, "west")))
    third = pumps.client(pumps.start("third", tls=tls(sites, "third")))
    # A lease for the east alone: the third site shows the right token, and is refused.
    outcome, _, touched = send(pumps, third, west, lease_site="east")
    assert outcome.reason is FailureReason.LEASE_MISMATCH
    assert not touched
    # A pump that calls itself east with the third site's certificate.
    poser = pumps.client(pumps.start("east", tls=tls(sites, "third")))
    outcome, _, touched = send(pumps, poser, west, deadline_s=3.0)
    assert not outcome.ok
    assert not touched


def test_only_sites_that_are_named_may_connect_where_some_are(pumps, sites):
    west = pumps.client(pumps.start("west", tls=tls(sites, "west", only=["east"])))
    east = pumps.client(pumps.start("east", tls=tls(sites, "east")))
    third = pumps.client(pumps.start("third", tls=tls(sites, "third")))
    assert send(pumps, east, west)[0].ok
    assert not send(pumps, third, west, deadline_s=3.0)[0].ok


def test_a_rotation_drops_no_transfer_and_serves_the_next_stream(pumps, sites, tmp_path):
    folder = tmp_path / "west"
    shutil.copytree(sites / "west", folder)
    east = pumps.client(pumps.start("east", tls=tls(sites, "east"), faults={"cut_every_blocks": 40}))
    west = pumps.client(pumps.start("west", tls=tls(tmp_path, "west"), faults={"pause_copy_s": 0.005}))
    src, dst = pumps.memory(east, 1 << 24), pumps.memory(west, 1 << 24, fill=0)
    lease = west.grant_lease(1, 0, [(dst.ctypes.data, len(dst))], 60)
    offsets = np.arange(0, len(src), 32768, dtype=np.uint64)
    transfer = east.submit(
        lease.grant, src.ctypes.data + offsets, dst.ctypes.data + offsets[::-1], np.full(len(offsets), 32768),
        kind=TransferKind.KV, deadline_s=30, last=True,
    )  # fmt: skip
    while not dst.any():
        time.sleep(0.002)
    keys.rotate_site(folder, days=20, now=K_NOW)
    assert transfer.wait(K_WAIT_S).ok
    assert np.array_equal(dst.reshape(-1, 32768)[::-1], src.reshape(-1, 32768))
    third = pumps.client(pumps.start("third", tls=tls(sites, "third")))
    assert send(pumps, third, west)[0].ok
    assert "new certificates are in force" in pumps.log("west")


def test_plaintext_off_loopback_needs_the_explicit_flag(pumps):
    from prfaas.model.errors import MachineError
    from prfaas.pump.server import Pump

    with pytest.raises(MachineError, match="allow_plaintext"):
        Pump(pumps.config("west", listen="0.0.0.0:0", advertise="127.0.0.1"))
    open_pump = Pump(pumps.config("west", listen="0.0.0.0:0", advertise="127.0.0.1", allow_plaintext=True))
    assert open_pump.address == f"127.0.0.1:{open_pump._listener.getsockname()[1]}"
    open_pump.close()


def test_plaintext_is_warned_of_once_a_host_and_not_for_every_host_there_is(caplog):
    trust = Trust(PumpConfig(site="east", allow_plaintext=True))
    for _ in range(2):
        for number in range(3000):
            assert trust.plaintext_allowed(f"10.1.{number >> 8}.{number & 255}")
    assert len(caplog.messages) == 1024
    assert len(set(caplog.messages)) == 1024
