"""Peers by name: looking one up holds up nobody, and an old answer is better than none."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from prfaas.config.pump import split_address
from prfaas.pump.resolving import K_FRESH_S, Resolver
from prfaas.pump.server import Pump
from prfaas.transfer import frames as f

real = socket.getaddrinfo


class Names:
    """A name server: what it knows, and whether it answers at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: dict[str, str] = {}
        self.answers = threading.Event()
        self.answers.set()
        self.asked = 0
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)

    def look_up(self, host, port, *rest, flags=0, **more):
        if flags & socket.AI_NUMERICHOST or not host.endswith(".test"):
            return real(host, port, *rest, flags=flags, **more)
        self.asked += 1
        self.answers.wait(20)
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(self.known[host], port, *rest, **more)


@pytest.fixture
def names(monkeypatch):
    names = Names(monkeypatch)
    yield names
    names.answers.set()


def until(condition, turn=lambda: time.sleep(0.01)):
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        turn()


def found(resolver, host, now):
    """The answer, once there is one."""
    answers = []
    until(lambda: answers.append(resolver.find(host, 7, now)) or answers[-1] is not None)
    return answers[-1]


def test_a_name_server_that_does_not_answer_holds_up_nobody_and_the_peer_is_reached_when_it_does(
    pumps, names
):
    west = pumps.client(pumps.start("west")).address
    port = split_address(west)[1]
    names.known["slow.test"] = "127.0.0.1"
    names.answers.clear()
    pump = Pump(pumps.config("east", allow_plaintext=True))
    try:
        slow, plain = (pump.peer(a, pump.loop.now()) for a in (f"slow.test:{port}", west))
        longest_s = 0.0

        def turn():
            nonlocal longest_s
            began_s = time.monotonic()
            pump.loop.turn(0.01)
            longest_s = max(longest_s, time.monotonic() - began_s)

        slow.prepare(pump.loop.now())
        plain.prepare(pump.loop.now())
        until(lambda: plain.n_ready == 2, turn)
        assert names.asked == 1
        assert slow.n_ready == 0
        assert longest_s < 5
        names.answers.set()
        until(lambda: slow.n_ready == 2, turn)
    finally:
        pump.close()


def test_an_exposed_endpoint_by_name_is_looked_up_beside_the_loop_and_reached_when_it_is_known(pumps, names):
    names.known["backend.test"] = "127.0.0.1"
    names.answers.clear()
    with socket.create_server(("127.0.0.1", 0)) as backend:
        port = backend.getsockname()[1]
        pump = Pump(pumps.config("east", exposes=[f"backend.test:{port}"]))
        try:
            assert "still being looked up" in asked_to_forward(pump, port)
            assert pump.inbound.refusals == {"forward": 1}
            names.answers.set()
            until(lambda: pump.resolver.find("backend.test", port, pump.loop.now()))
            assert asked_to_forward(pump, port) == ""
            backend.settimeout(15)
            backend.accept()[0].close()
        finally:
            pump.close()


def asked_to_forward(pump: Pump, port: int) -> str:
    """What a peer's pump that asks for the port hears: why not, or nothing."""
    began_s = time.monotonic()
    with socket.create_connection(split_address(pump.address), timeout=15) as sock:
        hello = f.Hello(1, 2, b"sixteen bytes ok", "west", "127.0.0.1:1", 0, forwarding=True)
        sock.sendall(f.message_frame(1, f.FrameType.HELLO, hello))
        sock.sendall(f.message_frame(2, f.FrameType.FORWARD, f.Forward("backend.test", port)))
        sock.setblocking(False)
        said = b""

        def heard():
            nonlocal said
            pump.loop.turn(0.01)
            with contextlib.suppress(BlockingIOError):
                said += sock.recv(1 << 16)
            return len(pump.exposed) or b"looked up" in said

        until(heard)
    assert time.monotonic() - began_s < 5, "it waited for the name server"
    return said.decode(errors="replace") if b"looked up" in said else ""


def test_an_unknown_name_is_an_error_that_says_so_and_is_asked_about_again_later(names):
    resolver, now = Resolver(), time.monotonic()
    with pytest.raises(OSError, match="not known"):
        found(resolver, "nobody.test", now)
    with pytest.raises(OSError, match="not known"):
        resolver.find("nobody.test", 7, now)
    assert names.asked == 1
    names.known["nobody.test"] = "127.0.0.9"
    assert found(resolver, "nobody.test", now + 60)[1][0] == "127.0.0.9"


def test_a_name_that_moves_is_followed_and_one_that_is_lost_keeps_its_address(names):
    resolver, now = Resolver(), time.monotonic()
    names.known["west.test"] = "127.0.0.5"
    assert found(resolver, "west.test", now)[1][0] == "127.0.0.5"
    names.known["west.test"] = "127.0.0.6"
    later = now + K_FRESH_S + 1
    assert resolver.find("west.test", 7, later)[1][0] == "127.0.0.5", "the old one serves meanwhile"
    until(lambda: resolver.find("west.test", 7, later)[1][0] == "127.0.0.6")
    del names.known["west.test"]
    asked = names.asked
    last = later + K_FRESH_S + 1
    until(lambda: resolver.find("west.test", 7, last) and names.asked > asked)
    until(lambda: not resolver._asked)
    assert resolver.find("west.test", 7, last)[1][0] == "127.0.0.6"


def test_without_a_thread_an_old_address_serves_and_a_new_name_is_an_error_until_there_is_one(
    names, monkeypatch
):
    resolver, now = Resolver(), time.monotonic()
    names.known.update({"west.test": "127.0.0.5", "new.test": "127.0.0.6"})
    found(resolver, "west.test", now)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", no_thread)
        assert resolver.find("west.test", 7, now + K_FRESH_S + 1)[1][0] == "127.0.0.5"
        with pytest.raises(OSError, match="new thread"):
            resolver.find("new.test", 7, now)
    assert found(resolver, "new.test", now)[1][0] == "127.0.0.6"


def no_thread(thread):
    raise RuntimeError("can't start new thread")


def test_numbers_are_no_names(names):
    assert Resolver().find("::1", 7, 0.0) == (socket.AF_INET6, ("::1", 7, 0, 0))
    assert Resolver().find("10.0.0.1", 7, 0.0) == (socket.AF_INET, ("10.0.0.1", 7))
    assert names.asked == 0
