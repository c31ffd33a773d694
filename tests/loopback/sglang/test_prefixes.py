"""Servers give each other prefixes: two stores, each beside a pump of its own site, and what they ask each
other by HTTP. SGLang's caches aren't there: what they would copy in is put into the stores."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prfaas.config.pump import PumpConfig, split_address
from prfaas.pump_client import LocalPumpClient
from prfaas.sglang.passage import Passage
from prfaas.sglang.prefixes import face
from prfaas.sglang.prefixes.exchange import (
    K_GIVE,
    K_TAKE,
    Exchange,
    Given,
    Own,
    Refused,
    Same,
    Take,
    Taken,
    address_of,
)
from prfaas.sglang.prefixes.pools import K_PAGES, K_STATES
from prfaas.sglang.prefixes.store import Key, PrefixStore
from prfaas.sglang.staging import HostMemory, Staging

K_PAGE_TOKENS = 4
K_PAGE_BYTES, K_STATE_BYTES = 3000, 70_000
K_STORE_BYTES = 1 << 20
K_PROMPT = list(range(1, 1 + 50 * K_PAGE_TOKENS))


def keys_of(ids: Sequence[int]) -> list[Key]:
    """One a whole page, each of all that is before it too."""
    ends = range(K_PAGE_TOKENS, len(ids) + 1, K_PAGE_TOKENS)
    return [hashlib.sha256(repr(ids[:end]).encode()).digest()[:16] for end in ends]


def content(pool: str, key: Key) -> bytes:
    size = K_PAGE_BYTES if pool == K_PAGES else K_STATE_BYTES
    return ((pool.encode() + key) * size)[:size]


@dataclass
class Rank:
    """One rank of one server."""

    store: PrefixStore
    client: LocalPumpClient
    exchange: Exchange
    face: face.Face

    def put(self, pool: str, keys: Sequence[Key]) -> None:
        size = K_PAGE_BYTES if pool == K_PAGES else K_STATE_BYTES
        chunk = self.store.room(pool, keys, size, 0.0)
        assert chunk is not None
        ctypes.memmove(chunk.address, b"".join(content(pool, key) for key in keys), chunk.size_bytes)
        self.store.keep(chunk)

    def has(self, pool: str, keys: Sequence[Key]) -> bool:
        size = K_PAGE_BYTES if pool == K_PAGES else K_STATE_BYTES
        with self.store.reading(pool, keys) as runs:
            found = b"".join(ctypes.string_at(run.address, run.count * size) for run in runs)
        return found == b"".join(content(pool, key) for key in keys)


@dataclass
class Server:
    ranks: list[Rank]
    listen: str

    @property
    def first(self) -> Rank:
        return self.ranks[0]

    def close(self) -> None:
        for rank in self.ranks:
            rank.face.close()
            rank.client.close()


def free_ports(n: int, begin: int = 21000) -> int:
    """The first of so many neighbours that nobody has."""
    for first in range(begin, begin + 3000, 7):
        try:
            held = [socket.create_server(("127.0.0.1", first + at)) for at in range(n)]
        except OSError:
            continue
        for one in held:
            one.close()
        return first
    raise AssertionError("no ports are free")


def server_of(
    folder: Path, site: str, hybrid: bool, ranks: int = 1, listen_port: int = 0, **differs: Any
) -> Server:
    """`listen_port`: the pump's; 0: any."""
    fields = {"site": site, "control_socket": folder / f"{site}.sock", "idle_exit_s": 2}
    fields["listen"] = f"127.0.0.1:{listen_port}"
    config = PumpConfig.model_validate(fields)
    sizes = {K_PAGES: K_PAGE_BYTES} | ({K_STATES: K_STATE_BYTES} if hybrid else {})
    same: dict[str, Any] = {
        "model": "m", "page_tokens": K_PAGE_TOKENS, "item_bytes": sizes, "ranks": ranks, **differs
    }  # fmt: skip
    listen = f"127.0.0.1:{free_ports(ranks)}"
    found = []
    for rank in range(ranks):
        memory = Staging(K_STORE_BYTES, HostMemory())
        store = PrefixStore(memory)
        client = LocalPumpClient.open(config, name=f"{site} {rank}")
        client.register([(memory.address, memory.size_bytes)])
        exchange = Exchange(Own(Same(**same), rank, listen), client, store, keys_of, face.ask)
        served = face.Face(address_of(listen, rank), exchange.take, exchange.give)
        found.append(Rank(store, client, exchange, served))
    return Server(found, listen)


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def hybrid(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "hybrid")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, hybrid: bool) -> Iterator[tuple[Server, Server]]:
    folder = tmp_path_factory.mktemp("sites")
    east, west = server_of(folder, "east", hybrid), server_of(folder, "west", hybrid)
    yield east, west
    east.close()
    west.close()


@pytest.fixture
def sites(both: tuple[Server, Server]) -> tuple[Server, Server]:
    for server in both:
        server.first.store.clear()
    return both


def fill(server: Server, ids: Sequence[int], hybrid: bool) -> None:
    for rank in server.ranks:
        rank.put(K_PAGES, keys_of(ids))
        if hybrid:
            rank.put(K_STATES, keys_of(ids)[-1:])


def take(west: Server, east: Server, ids: list[int], within_s: float = 10.0) -> Taken:
    """As the router asks."""
    body = msgspec.json.encode(Take(input_ids=ids, giver=east.listen, within_s=within_s))
    return msgspec.json.decode(face.ask(west.listen, K_TAKE, body, within_s + 5), type=Taken)


def test_what_east_has_is_wests_too_afterwards_to_the_byte(
    sites: tuple[Server, Server], hybrid: bool
) -> None:
    east, west = sites
    fill(east, K_PROMPT, hybrid)
    moved_bytes = 50 * K_PAGE_BYTES + hybrid * K_STATE_BYTES
    assert take(west, east, [*K_PROMPT, 7]) == Taken(tokens=len(K_PROMPT), moved_bytes=moved_bytes)
    assert west.first.has(K_PAGES, keys_of(K_PROMPT))
    assert not hybrid or west.first.has(K_STATES, keys_of(K_PROMPT)[-1:])
    assert take(west, east, K_PROMPT) == Taken(tokens=len(K_PROMPT), moved_bytes=0)


def test_only_what_is_missing_crosses(sites: tuple[Server, Server], hybrid: bool) -> None:
    east, west = sites
    fill(east, K_PROMPT, hybrid)
    west.first.put(K_PAGES, keys_of(K_PROMPT)[:20])
    moved = take(west, east, K_PROMPT).moved_bytes
    assert moved == 30 * K_PAGE_BYTES + hybrid * K_STATE_BYTES
    assert west.first.has(K_PAGES, keys_of(K_PROMPT))


def test_pages_from_the_beginning_on_are_of_use_and_of_a_hybrid_model_none_without_the_state(
    sites: tuple[Server, Server], hybrid: bool
) -> None:
    east, west = sites
    fill(east, K_PROMPT[:80], hybrid)
    if hybrid:
        with pytest.raises(Refused, match="no state at its end is here") as caught:
            take(west, east, K_PROMPT)
        assert caught.value.status == 409
        assert west.first.store.held == {}
    else:
        assert take(west, east, K_PROMPT) == Taken(tokens=80, moved_bytes=20 * K_PAGE_BYTES)
        assert west.first.store.held == {K_PAGES: 20}


def test_two_requests_with_one_prefix_bring_it_once(sites: tuple[Server, Server], hybrid: bool) -> None:
    east, west = sites
    fill(east, K_PROMPT, hybrid)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: take(west, east, K_PROMPT), range(6)))
    assert {one.tokens for one in found} == {len(K_PROMPT)}
    assert sum(one.moved_bytes > 0 for one in found) == 1


@pytest.mark.parametrize("hybrid", ["dense"], indirect=True, scope="module")
def test_what_cannot_be_is_refused_with_its_reason_and_leaves_nothing(
    sites: tuple[Server, Server], tmp_path: Path
) -> None:
    east, west = sites
    with pytest.raises(Refused, match="none of it is here"):
        take(west, east, K_PROMPT)
    fill(east, K_PROMPT, False)
    for status, body, words in (
        (400, b"{", "truncated"),
        (400, b'{"input_ids": "x", "giver": "y:1"}', "Expected `array`"),
        (400, b'{"input_ids": [1], "giver": "y:1", "within_s": 1e9}', "within_s"),
        (400, b'{"input_ids": [1,2,3,4], "giver": "nowhere"}', "'nowhere' is not host:port"),
        (502, b'{"input_ids": [1,2,3,4], "giver": "127.0.0.1:9"}', "refused"),
    ):
        with pytest.raises(Refused, match=words) as caught:
            face.ask(west.listen, K_TAKE, body, 5.0)
        assert caught.value.status == status
    with pytest.raises(Refused, match="ask /prfaas/take_prefix"):
        face.ask(west.listen, "/other", b"{}", 5.0)
    other = server_of(tmp_path, "other", False, model="n", page_tokens=8)
    try:
        with pytest.raises(Refused, match="caches are others: model: m, taker n; page_tokens: 4, taker 8"):
            take(other, east, K_PROMPT)
    finally:
        other.close()
    # More than the store holds: no room, and nothing is evicted for it.
    west.first.put(K_PAGES, [b"mine"])
    long = list(range(K_PAGE_TOKENS * (1 + K_STORE_BYTES // K_PAGE_BYTES)))
    with pytest.raises(Refused, match="no room") as caught:
        take(west, east, long)
    assert caught.value.status == 503
    assert west.first.store.held == {K_PAGES: 1}
    assert take(west, east, K_PROMPT).tokens == len(K_PROMPT)


@pytest.mark.parametrize("hybrid", ["hybrid"], indirect=True, scope="module")
def test_a_giver_that_says_nothing_or_lies_costs_the_time_given_and_leaves_nothing(
    sites: tuple[Server, Server],
) -> None:
    _, west = sites
    with socket.create_server(("127.0.0.1", 0)) as silent:
        east = Server([], f"127.0.0.1:{silent.getsockname()[1]}")
        began_s = time.monotonic()
        with pytest.raises(Refused, match="timed out"):
            take(west, east, K_PROMPT, within_s=0.5)
        assert time.monotonic() - began_s < 5
        assert west.first.store.held == {}
        answer = msgspec.msgpack.encode(Given(pages=50, state=True, sent_bytes=1))

        def lie() -> None:
            silent.settimeout(10)
            silent.accept()[0].close()  # the first one's, late
            with silent.accept()[0] as sock:
                sock.recv(1 << 20)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n"
                sock.sendall(head.encode() + answer)

        lying = threading.Thread(target=lie)
        lying.start()
        with pytest.raises(Refused, match="not whole in time"):
            take(west, east, K_PROMPT, within_s=1.0)
        lying.join()
    assert west.first.store.held == {}


@pytest.mark.parametrize("hybrid", ["hybrid"], indirect=True, scope="module")
@pytest.mark.parametrize("whose", ["east", "west"])
def test_a_prefix_is_whole_though_a_pump_stands_still_and_is_killed_while_it_is_brought(
    tmp_path: Path, whose: str, hybrid: bool
) -> None:
    # Ports of their own: another pump is started where one was, as operators' are.
    first = free_ports(2, 24000)
    east, west = (
        server_of(tmp_path, site, hybrid, listen_port=first + at) for at, site in enumerate(("east", "west"))
    )
    try:
        fill(east, K_PROMPT, hybrid)
        pid = pump_of(tmp_path / f"{whose}.sock")
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            taking = pool.submit(take, west, east, K_PROMPT, 20.0)
            time.sleep(0.3)
            assert not taking.done()
            os.kill(pid, signal.SIGKILL)
            assert taking.result().tokens == len(K_PROMPT)
        assert west.first.has(K_PAGES, keys_of(K_PROMPT))
        assert west.first.has(K_STATES, keys_of(K_PROMPT)[-1:])
    finally:
        east.close()
        west.close()


def pump_of(control: Path) -> int:
    """The process that serves there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(control))
        pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def test_of_many_questions_at_once_so_many_are_taken_and_the_rest_cut_off_until_some_end(
    both: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(face, "K_CONNECTIONS", 3)
    listen = f"127.0.0.1:{free_ports(1)}"
    small = face.Face(listen, lambda asking: Taken(tokens=7, moved_bytes=0), both[0].first.exchange.give)
    body = msgspec.json.encode(Take(input_ids=[1], giver=listen))
    with ExitStack() as silent:
        for _ in range(3):
            silent.enter_context(socket.create_connection(split_address(listen)))
        with pytest.raises(Refused, match=r"Disconnected|reset|Broken pipe"):
            face.ask(listen, K_TAKE, body, 5.0)
    answered_soon(listen, body)
    # Where no thread can be had, a question costs itself alone.
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    for _ in range(4):
        with pytest.raises(Refused, match=r"Disconnected|reset|Broken pipe"):
            face.ask(listen, K_TAKE, body, 5.0)
    monkeypatch.undo()
    answered_soon(listen, body)
    small.close()


def answered_soon(listen: str, body: bytes) -> None:
    """Those that have ended are noticed within moments."""
    deadline_s = time.monotonic() + 10
    while True:
        try:
            assert b'"tokens":7' in face.ask(listen, K_TAKE, body, 5.0)
            return
        except Refused:
            assert time.monotonic() < deadline_s


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_taker_that_goes_before_its_answer_leaves_no_traceback(
    sites: tuple[Server, Server], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    asked, gone = threading.Event(), threading.Event()

    def slowly(asking: Take) -> Taken:
        asked.set()
        gone.wait(10)
        return Taken(tokens=0, moved_bytes=0)

    listen = f"127.0.0.1:{free_ports(1)}"
    slow = face.Face(listen, slowly, slowly)
    with caplog.at_level("DEBUG", logger=face.__name__):
        with socket.create_connection(split_address(listen)) as sock:
            body = msgspec.json.encode(Take(input_ids=[1], giver=listen))
            sock.sendall(f"POST {K_TAKE} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            assert asked.wait(10)
            # Reset at once: what is written afterwards fails.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.set()
        deadline_s = time.monotonic() + 10
        while "went without its answer" not in caplog.text:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    slow.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("hybrid", ["hybrid"], indirect=True, scope="module")
def test_each_rank_takes_its_own_part_from_the_same_rank(tmp_path: Path, hybrid: bool) -> None:
    east, west = server_of(tmp_path, "east", True, ranks=2), server_of(tmp_path, "west", True, ranks=2)
    try:
        fill(east, K_PROMPT, True)
        moved_bytes = 2 * (50 * K_PAGE_BYTES + K_STATE_BYTES)
        assert take(west, east, K_PROMPT) == Taken(tokens=len(K_PROMPT), moved_bytes=moved_bytes)
        for rank in west.ranks:
            assert rank.has(K_PAGES, keys_of(K_PROMPT))
        # Of use is what all of them have.
        east.ranks[1].store.clear()
        other = [9, *K_PROMPT]
        fill(Server(east.ranks[:1], ""), other, True)
        with pytest.raises(Refused):
            take(west, east, other)
    finally:
        east.close()
        west.close()


@pytest.mark.parametrize("hybrid", ["dense"], indirect=True, scope="module")
def test_a_giver_asked_for_what_it_cannot_read_says_so(sites: tuple[Server, Server]) -> None:
    east, _ = sites
    same = east.first.exchange._own.same
    question = {
        "same": msgspec.to_builtins(same), "pages": [b"a"], "state": None, "grant": "nonsense",
        "page_address": 0, "state_address": 0, "within_s": 1.0,
    }  # fmt: skip
    with pytest.raises(Refused, match="grant") as caught:
        face.ask(east.listen, K_GIVE, msgspec.msgpack.encode(question), 5.0)
    assert caught.value.status == 400


@pytest.mark.parametrize("hybrid", ["dense"], indirect=True, scope="module")
def test_with_control_a_peer_that_a_pump_is_named_for_is_asked_through_the_pumps_or_not_at_all(
    sites: tuple[Server, Server],
) -> None:
    east, west = sites
    fill(east, K_PROMPT, False)
    east.first.client.expose(*split_address(east.listen))
    wanted = Take(input_ids=K_PROMPT, giver=east.listen, within_s=10.0)
    exchange = west.first.exchange

    def asking(pumps: dict[str, str]) -> Exchange:
        leads = Passage(west.first.client, pumps)
        ask = face.asker(leads, [west.listen])
        return Exchange(exchange._own, west.first.client, west.first.store, keys_of, ask)

    with pytest.raises(Refused, match=re.escape(east.listen)) as caught:
        asking({"127.0.0.1": "127.0.0.1:9"}).take(wanted)  # no pump is there, and nobody dials it otherwise
    assert caught.value.status == 502
    assert west.first.store.held == {}
    named = {"127.0.0.1": east.first.client.address}
    assert Passage(west.first.client, named).address(east.listen) != east.listen
    assert asking(named).take(wanted).tokens == len(K_PROMPT)
    # A server's own ranks are where they are.
    west.first.store.clear()
    question = msgspec.json.encode(wanted)
    assert face.asker(Passage(west.first.client, {"127.0.0.1": "127.0.0.1:9"}), [west.listen])(
        west.listen, K_TAKE, question, 15.0
    )
