"""Other programs' connections between two real pumps: whole both ways, only to what is exposed, only by sites
that are trusted.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import socketserver
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from prfaas.config.pump import PumpConfig, split_address
from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import FailureReason, LeaseGrant, TransferKind
from prfaas.pump import keys
from prfaas.pump.forwarding import K_SPARES
from prfaas.pump.server import Pump
from prfaas.pump_client import messages as m
from prfaas.pump_client.standing import Standing
from prfaas.transfer import frames as f

K_NOW = datetime.datetime.now(datetime.UTC)
K_PATIENCE_S = 20.0


class Echo(socketserver.BaseRequestHandler):
    """Sends everything back once its peer has said all, then ends."""

    def handle(self) -> None:
        data = bytearray()
        while piece := self.request.recv(1 << 16):
            data += piece
        self.request.sendall(data)


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"you asked for {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Deaf(socketserver.BaseRequestHandler):
    """Reads nothing until told to."""

    go_on = threading.Event()

    def handle(self) -> None:
        self.go_on.wait(K_PATIENCE_S)
        n = 0
        while piece := self.request.recv(1 << 16):
            n += len(piece)
        self.request.sendall(str(n).encode())


@pytest.fixture
def serve() -> Iterator:
    """Starts a server of a handler on loopback; answers its port."""
    servers: list[socketserver.BaseServer] = []

    def start(handler: type) -> int:
        kind = HTTPServer if issubclass(handler, BaseHTTPRequestHandler) else socketserver.ThreadingTCPServer
        server = kind(("127.0.0.1", 0), handler)
        server.daemon_threads = True  # type: ignore[union-attr]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory):
    """Keys of east and west, which trust each other, and of a stranger whom nobody trusts."""
    folder = tmp_path_factory.mktemp("keys")
    for site in ("east", "west", "stranger"):
        keys.create_site(folder / site, site, days=30, authority_days=60, now=K_NOW)
    for site in ("east", "west", "stranger"):
        for peer in ("east", "west"):
            keys.trust(folder / site, folder / peer / keys.K_AUTHORITY_CERTIFICATE)
    return folder


def tls(folder, site: str) -> dict[str, object]:
    files = {"site_file": folder / site / keys.K_SITE_FILE, "authorities": [folder / site / keys.K_TRUSTED]}
    return {"tls": files}


def call(address: str) -> socket.socket:
    return socket.create_connection(split_address(address), timeout=K_PATIENCE_S)


def all_of(sock: socket.socket) -> bytes:
    data = bytearray()
    while piece := sock.recv(1 << 16):
        data += piece
    return bytes(data)


def is_cut_off(address: str) -> bool:
    """Whether a connection is reset, or ended, without a byte of anybody's."""
    try:
        with call(address) as sock:
            return not all_of(sock)
    except ConnectionError:
        return True


def test_a_connection_crosses_encrypted_and_whole_with_its_ends(pumps, sites, serve):
    east = pumps.client(pumps.start("east", **tls(sites, "east")))
    west = pumps.client(pumps.start("west", **tls(sites, "west")))
    port = serve(Echo)
    east.expose("127.0.0.1", port)
    address = west.forward(east.address, "127.0.0.1", port, site="east")
    assert address == west.forward(east.address, "127.0.0.1", port)
    for size in (0, 1, 5_000_000):  # the last is several windows
        sent = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        with call(address) as sock:
            threading.Thread(target=lambda s=sock, d=sent: (s.sendall(d), s.shutdown(socket.SHUT_WR))).start()
            assert all_of(sock) == sent
    figures = west.stats()["forwards"]
    assert figures["opened"] == 3
    assert figures["failed"] == 0
    pumps.until(lambda: not west.stats()["forwards"]["connections"] and not east.stats()["forwarded_in"])
    assert west.stats()["forwards"]["tcp_bytes_sent"] > 5_000_000


def test_the_configuration_forwards_and_exposes_without_any_server(pumps, serve):
    port = serve(Page)
    pumps.start("east", listen="127.0.0.1:0", exposes=[f"127.0.0.1:{port}"])
    east = pumps.client(pumps.config("east"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    # Another name of the same node: its port tells which endpoint is meant. And the pump by its name.
    pump = f"localhost:{split_address(east.address)[1]}"
    pumps.start("west", forwards=[{"listen": listen, "pump": pump, "to": f"192.0.2.1:{port}"}])
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path in ("/route", "/health"):
        with opener.open(f"http://{listen}{path}", timeout=K_PATIENCE_S) as answer:
            assert answer.read().decode() == f"you asked for {path}"


def refused_again(address, owner) -> bool:
    """Its pump rests after a failure, and asks its peer again after a while."""
    with contextlib.suppress(OSError):
        is_cut_off(address)
    return owner.stats()["inbound"]["refusals"]["forward"] >= 2


def test_what_is_not_exposed_is_refused_and_counted_and_harms_no_other(pumps, serve):
    east, west = pumps.client(pumps.start("east")), pumps.client(pumps.start("west"))
    port, hidden = serve(Echo), serve(Echo)
    east.expose("127.0.0.1", port)
    assert is_cut_off(west.forward(east.address, "127.0.0.1", hidden))
    assert east.stats()["inbound"]["refusals"]["forward"] == 1
    assert "isn't exposed" in pumps.log("west")
    pumps.until(lambda: refused_again(west.forward(east.address, "127.0.0.1", hidden), east))
    assert pumps.log("east").count("isn't exposed") == 1, "told once, not each time"
    assert "ended" not in pumps.log("east")
    with call(west.forward(east.address, "127.0.0.1", port)) as sock:
        sock.sendall(b"still here")
        sock.shutdown(socket.SHUT_WR)
        assert all_of(sock) == b"still here"


def test_what_a_server_exposed_goes_with_it(pumps, serve):
    east, west = pumps.client(pumps.start("east")), pumps.client(pumps.start("west"))
    server = pumps.client(pumps.config("east"))
    port = serve(Echo)
    server.expose("127.0.0.1", port)
    address = west.forward(east.address, "127.0.0.1", port)
    server.close()
    assert is_cut_off(address)


def test_a_stranger_reaches_nothing(pumps, sites, serve):
    east = pumps.client(pumps.start("east", **tls(sites, "east")))
    stranger = pumps.client(pumps.start("stranger", **tls(sites, "stranger")))
    port = serve(Echo)
    east.expose("127.0.0.1", port)
    assert is_cut_off(stranger.forward(east.address, "127.0.0.1", port))
    assert east.stats()["inbound"]["refusals"]["untrusted"] > 0
    assert east.stats()["forwarded_in"] == 0


def test_another_site_than_the_one_expected_is_not_talked_to(pumps, sites, serve):
    east = pumps.client(pumps.start("east", **tls(sites, "east")))
    west = pumps.client(pumps.start("west", **tls(sites, "west")))
    port = serve(Echo)
    east.expose("127.0.0.1", port)
    assert is_cut_off(west.forward(east.address, "127.0.0.1", port, site="north"))
    assert "'north' was expected" in pumps.log("west")


def test_a_server_that_reads_nothing_slows_its_own_connection_alone(pumps, serve):
    east, west = pumps.client(pumps.start("east")), pumps.client(pumps.start("west"))
    deaf, port = serve(Deaf), serve(Echo)
    for exposed in (deaf, port):
        east.expose("127.0.0.1", exposed)
    Deaf.go_on.clear()
    size = 64 << 20
    with call(west.forward(east.address, "127.0.0.1", deaf)) as slow:

        def fill() -> None:
            slow.sendall(bytes(size))
            slow.shutdown(socket.SHUT_WR)

        filling = threading.Thread(target=fill)
        filling.start()
        for _ in range(3):
            with call(west.forward(east.address, "127.0.0.1", port)) as sock:
                sock.sendall(b"not held up")
                sock.shutdown(socket.SHUT_WR)
                assert all_of(sock) == b"not held up"
        assert filling.is_alive(), "64 MiB went into somebody's memory"
        Deaf.go_on.set()
        assert int(all_of(slow)) == size
        filling.join(K_PATIENCE_S)


def test_a_server_that_ends_and_one_that_is_away_are_seen_as_such(pumps, serve):
    east, west = pumps.client(pumps.start("east")), pumps.client(pumps.start("west"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = int(free.getsockname()[1])
    east.expose("127.0.0.1", away)
    assert is_cut_off(west.forward(east.address, "127.0.0.1", away))
    pumps.until(lambda: not west.stats()["forwards"]["connections"] and not east.stats()["forwarded_in"])


def test_the_next_connection_finds_its_stream_open_and_a_stream_that_rests_goes_with_the_peers_pump(
    pumps, serve
):
    east, west = pumps.client(pumps.start("east")), pumps.client(pumps.start("west"))
    port = serve(Echo)
    east.expose("127.0.0.1", port)
    address = west.forward(east.address, "127.0.0.1", port)

    def opened() -> int:
        return int(east.stats()["inbound"]["streams_opened"])

    def echoed(text: bytes) -> bool:
        with call(address) as sock:
            sock.sendall(text)
            sock.shutdown(socket.SHUT_WR)
            return all_of(sock) == text

    assert west.stats()["forwards"]["spares"] == 0  # nobody has used it yet
    assert echoed(b"first")
    pumps.until(lambda: west.stats()["forwards"]["spares"] == K_SPARES and opened() == 1 + K_SPARES)
    for i in range(3):
        assert echoed(b"%d" % i)
        # Its own was open, and one more was opened behind it.
        pumps.until(lambda n=i: opened() == 2 + K_SPARES + n)
    assert west.stats()["forwards"]["failed"] == 0
    pumps.kill("east")
    pumps.until(lambda: west.stats()["forwards"]["spares"] == 0)


def test_streams_that_rest_take_no_connections_place_where_they_were_dialled(pumps, serve, monkeypatch):
    monkeypatch.setattr("prfaas.pump.forwarding.K_CONNECTIONS_MOST", 3)
    east, port = pumps.client(pumps.start("east")), serve(Echo)
    east.expose("127.0.0.1", port)
    with pumps.here("west") as pump, ExitStack() as open_ones:
        west = pumps.client(pump.config)
        address = west.forward(east.address, "127.0.0.1", port)
        for n in (1, 2, 3):
            open_ones.enter_context(call(address))
            pumps.until(lambda n=n: east.stats()["forwarded_in"] == n)
        assert is_cut_off(address)
        assert west.stats()["forwards"]["failed"] == 1


def test_streams_that_rest_take_no_connections_place_where_they_were_accepted(pumps, serve, monkeypatch):
    monkeypatch.setattr("prfaas.pump.inbound.K_FORWARDED_STREAMS", 2)
    port = serve(Echo)

    def opened(stack: ExitStack, to: str) -> socket.socket:
        sock = stack.enter_context(call(to))
        hello = f.Hello(1, 2, b"sixteen bytes ok", "west", "127.0.0.1:1", 0, forwarding=True)
        sock.sendall(f.message_frame(1, f.FrameType.HELLO, hello))
        return sock

    def says_hello(sock: socket.socket) -> bool:
        return f.Header.from_bytes(sock.recv(f.K_HEADER_BYTES), None).type is f.FrameType.HELLO

    with pumps.here("east", exposes=[f"127.0.0.1:{port}"]) as pump, ExitStack() as stack:
        # Accepted one by one: of two that come at once neither is the older.
        oldest = opened(stack, pump.address)
        pumps.until(lambda: sum(s.forwarding for s in pump.inbound.streams) == 1)
        second = opened(stack, pump.address)
        pumps.until(lambda: sum(s.forwarding for s in pump.inbound.streams) == 2)
        third = opened(stack, pump.address)
        with contextlib.suppress(ConnectionError):
            all_of(oldest)  # it ends
        for sock in (second, third):
            assert says_hello(sock)
            sock.sendall(f.message_frame(2, f.FrameType.FORWARD, f.Forward("127.0.0.1", port)))
        pumps.until(lambda: len(pump.exposed) == 2)
        fourth = opened(stack, pump.address)
        with contextlib.suppress(ConnectionError):
            all_of(fourth)
        assert len(pump.exposed) == 2


def test_a_connection_does_not_wait_for_a_stream_whose_opening_was_lost_long_ago(pumps):
    pump = Pump(pumps.config("west"))
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
            peer, now = "{}:{}".format(*silent.getsockname()), pump.loop.now()
            pump.forwards.open(peer, "", f.Forward("127.0.0.1", 1), "127.0.0.1:0", "a server")
            listener = next(iter(pump.forwards._shared.values()))
            pump.forwards.keep_spares(peer, "", now)
            for later_s, spares in ((0.1, K_SPARES - 1), (5.0, K_SPARES - 1)):
                ours, theirs = socket.socketpair()
                stack.enter_context(theirs)
                pump.forwards.carry(listener, ours, now + later_s)
                assert pump.forwards.stats(now)["spares"] == spares
            assert pump.forwards.n_carried == 2
    finally:
        pump.close()


def test_a_pump_that_is_ended_cuts_the_connections_that_it_carries_and_does_not_end_them(pumps):
    with socket.create_server(("127.0.0.1", 0)) as endpoint:
        endpoint.settimeout(K_PATIENCE_S)
        port = endpoint.getsockname()[1]
        east, west = pumps.client(pumps.start("east")), pumps.client(pumps.start("west"))
        east.expose("127.0.0.1", port)
        with call(west.forward(east.address, "127.0.0.1", port)) as sock:
            sock.sendall(b"half of it")
            server, _ = endpoint.accept()
            with server:
                server.settimeout(K_PATIENCE_S)
                assert server.recv(100) == b"half of it"
                os.kill(pumps.pid("east"), signal.SIGTERM)
                with pytest.raises(ConnectionResetError):
                    server.recv(100)


def test_after_its_pump_was_killed_the_same_port_leads_there_again(pumps, serve):
    config = pumps.start("west")
    east, west = pumps.client(pumps.start("east")), pumps.client(config, start=True)
    port = serve(Echo)
    east.expose("127.0.0.1", port)
    address = west.forward(east.address, "127.0.0.1", port)
    before = west.pump_pid
    pumps.kill("west")
    pumps.until(lambda: west.pump_pid != before)

    def again() -> bool:
        try:
            with call(address) as sock:
                sock.sendall(b"again")
                sock.shutdown(socket.SHUT_WR)
                return all_of(sock) == b"again"
        except ConnectionError:
            return False

    pumps.until(again)
    assert west.forward(east.address, "127.0.0.1", port) == address


def test_what_pumps_have_to_tell_each_other_goes_by_no_forwarded_connection(pumps, serve):
    east = pumps.client(pumps.start("east", faults={"pause_copy_s": 0.3}))
    west = pumps.client(pumps.start("west", block_bytes=65536))
    port = serve(Echo)
    east.expose("127.0.0.1", port)
    src, dst = pumps.memory(west, 1 << 18), pumps.memory(east, 1 << 18, fill=0)
    src[:] = 1
    with call(west.forward(east.address, "127.0.0.1", port)) as sock:  # east knows this stream of west first
        sock.sendall(b"before")
        pumps.until(lambda: east.stats()["forwarded_in"] == 1)
        lease = east.grant_lease(1, 0, [(dst.ctypes.data, dst.nbytes)], 60)
        # Small pieces in reverse, so that each block has many and its copy pauses half-way.
        offsets = np.arange(0, len(src), 1024, dtype=np.uint64)
        transfer = west.submit(
            lease.grant, src.ctypes.data + offsets, dst.ctypes.data + offsets[::-1],
            np.full(len(offsets), 1024), kind=TransferKind.KV, deadline_s=20, last=True,
        )  # fmt: skip
        pumps.until(dst.any)
        lease.revoke()  # which east tells west by some stream of west's
        assert transfer.wait(K_PATIENCE_S).reason is FailureReason.LEASE_ENDED
        sock.sendall(b" and after")
        sock.shutdown(socket.SHUT_WR)
        assert all_of(sock) == b"before and after"
    assert west.stats()["forwards"]["failed"] == 0


def test_a_callback_has_the_way_that_is_known_and_is_told_at_once_that_it_can_not_ask_for_another(
    pumps, serve
):
    """It runs on the thread that would hear the answer."""
    port = serve(Echo)
    east, west = pumps.client(pumps.start("east")), pumps.client(pumps.start("west"))
    known = west.forward(east.address, "127.0.0.1", port)
    nobody = LeaseGrant("127.0.0.1:1", 1, b"t", 1, 0, 1 << 20)
    src, found, done = pumps.memory(west, 4096), [], threading.Event()

    def ended(_):
        began_s = time.monotonic()
        found.append(west.forward(east.address, "127.0.0.1", port))
        for ask in (lambda: west.forward(east.address, "127.0.0.1", 1), west.stats):
            with pytest.raises(PrfaasError, match="a callback can't ask the pump"):
                ask()
        found.append(time.monotonic() - began_s)
        done.set()

    address, size = src.ctypes.data, len(src)
    sent = west.submit(nobody, [address], [address], [size], kind=TransferKind.KV, deadline_s=0.2, last=True)
    sent.add_done_callback(ended)
    assert done.wait(K_PATIENCE_S)
    assert found[0] == known
    assert found[1] < 1.0
    assert not west.in_callback


def test_an_endpoint_is_forwarded_as_long_as_one_of_those_who_asked_is_there(pumps, serve):
    east, west = pumps.client(pumps.start("east")), pumps.client(pumps.start("west"))
    other = pumps.client(pumps.config("west"))
    port = serve(Echo)
    east.expose("127.0.0.1", port)
    address = west.forward(east.address, "127.0.0.1", port)
    assert other.forward(east.address, "127.0.0.1", port) == address
    west.close()
    pumps.until(lambda: other.stats()["clients"] == 1)
    with call(address) as sock:
        sock.sendall(b"for the other")
        sock.shutdown(socket.SHUT_WR)
        assert all_of(sock) == b"for the other"
    other.close()
    third = pumps.client(pumps.config("west"))
    pumps.until(lambda: third.stats()["clients"] == 1)
    assert third.stats()["forwards"]["endpoints"] == 0
    with pytest.raises(ConnectionRefusedError):
        call(address).close()


def test_a_port_that_another_program_took_while_the_pump_was_away_is_not_given_again():
    standing = Standing(threading.RLock(), None)  # type: ignore[arg-type]
    asked = m.Forward(7, "192.0.2.1:7700", "", "192.0.2.1", 80)
    standing.add_forward(asked, "127.0.0.1:40001")
    standing.add_forward(m.Forward(8, "192.0.2.1:7700", "", "192.0.2.1", 81), "127.0.0.1:40002")
    assert b"127.0.0.1:40001" in standing.told_again(9)
    standing.hear(m.Reply(7, "forward 127.0.0.1:40001: Address already in use"))
    assert standing.forwarded("192.0.2.1:7700", "192.0.2.1", 80) is None
    told = standing.told_again(9)
    assert b"127.0.0.1:40001" not in told
    assert b"127.0.0.1:40002" in told, "nobody refused this one"
    assert standing.forwarded("192.0.2.1:7700", "192.0.2.1", 81) == "127.0.0.1:40002"


def test_two_forwards_on_one_port_are_refused_in_the_configuration():
    one = {"listen": "127.0.0.1:31000", "pump": "192.0.2.1:7700", "to": "192.0.2.1:80"}
    with pytest.raises(ValueError, match="two of them listen on"):
        PumpConfig.model_validate({"site": "west", "forwards": [one, {**one, "to": "192.0.2.1:81"}]})
    free = {**one, "listen": "127.0.0.1:0"}
    assert len(PumpConfig.model_validate({"site": "west", "forwards": [free, free]}).forwards) == 2


@pytest.mark.parametrize(
    ("listen", "said"), [("0.0.0.0:0", "loopback only"), ("127.0.0.1", "is not host:port")]
)
def test_a_forward_that_others_could_use_is_refused_in_the_configuration(listen, said):
    with pytest.raises(ValueError, match=said):
        PumpConfig.model_validate(
            {"site": "west", "forwards": [{"listen": listen, "pump": "192.0.2.1:7700", "to": "192.0.2.1:80"}]}
        )


def test_a_peer_that_is_no_address_is_refused_with_its_name(pumps):
    west = pumps.client(pumps.start("west"))
    with pytest.raises(PrfaasError, match="is not host:port"):
        west.forward("nowhere", "127.0.0.1", 1)
