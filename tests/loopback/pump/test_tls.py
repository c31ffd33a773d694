"""Both ways to do TLS keep TlsEnd's word, with each other too."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from prfaas.pump import keys, openssl
from prfaas.pump.tls import TlsContext, TlsEnd

K_NOW = datetime.datetime.now(datetime.UTC)
K_DATA = random.Random(5).randbytes(3_000_001)
K_WANT = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
BOTH = pytest.mark.parametrize(("dials", "listens"), list(itertools.product(("native", "ssl"), repeat=2)))


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("east", "west", "stranger"):
        keys.create_site(folder / name, name, days=2, authority_days=3, now=K_NOW)
    for name, other in (("east", "west"), ("west", "east"), ("stranger", "west")):
        keys.trust(folder / name, folder / other / keys.K_AUTHORITY_CERTIFICATE)
    return folder


@pytest.fixture
def connect(sites: Path, monkeypatch: pytest.MonkeyPatch):
    """Two ends of one connection, by the ways that are named."""
    socks: list[socket.socket] = []

    def connected(dials: str, listens: str, site: str = "east") -> tuple[TlsEnd, TlsEnd]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            pair = [socket.create_connection(listener.getsockname()), listener.accept()[0]]
        ends = []
        for sock, way, name in zip(pair, (dials, listens), (site, "west"), strict=True):
            assert openssl.is_usable()
            with monkeypatch.context() as patched:
                patched.setattr(openssl, "is_usable", lambda way=way: way == "native")
                folder = sites / name
                context = TlsContext(
                    server=sock is pair[1],
                    site_file=folder / keys.K_SITE_FILE,
                    authorities=[folder / keys.K_TRUSTED],
                )
            sock.setblocking(False)
            ends.append(context.end(sock, dialled=sock is pair[0]))
            assert isinstance(ends[-1], openssl.End) is (way == "native")
            socks.append(ends[-1].sock)
        return ends[0], ends[1]

    yield connected
    for sock in socks:
        sock.close()


def turns(*steps: Callable[[], bool]) -> None:
    """Each step again and again, in turns, until it says that it is done."""
    left, rounds = list(steps), 0
    while left:
        rounds += 1
        assert rounds < 200_000
        for step in list(left):
            try:
                if step():
                    left.remove(step)
            except (*K_WANT, BlockingIOError):
                continue


def shake(*ends: TlsEnd) -> None:
    turns(*((lambda end=end: end.do_handshake() is None) for end in ends))  # type: ignore[func-returns-value]


def pour(source: TlsEnd, target: TlsEnd, data: bytes, most: int) -> bytes:
    view, got, chunk = memoryview(data), bytearray(), memoryview(bytearray(most))
    sent = 0

    def send() -> bool:
        nonlocal sent
        if sent < len(view):
            sent += source.send(view[sent : sent + most])
        return sent == len(view) and source.flush()

    def receive() -> bool:
        n = target.recv_into(chunk[: min(most, len(view) - len(got))])
        got.extend(chunk[:n])
        return len(got) == len(view)

    turns(send, receive)
    return bytes(got)


@BOTH
def test_every_byte_arrives_both_ways_and_each_end_is_told_the_others_site(connect, dials, listens):
    ends = connect(dials, listens)
    shake(*ends)
    for end, site in zip(ends, ("west", "east"), strict=True):
        names = [value for kind, value in end.getpeercert()["subjectAltName"] if kind == "DNS"]
        assert keys.site_in_names(names) == site
    for source, target in (ends, ends[::-1]):
        for most in (100_000, 5_000_000):
            assert pour(source, target, K_DATA, most) == K_DATA


@BOTH
def test_a_stranger_is_refused_by_name_of_the_reason(connect, dials, listens):
    dialler, listener = connect(dials, listens, site="stranger")
    with pytest.raises(ssl.SSLError) as refused:
        shake(dialler, listener)
    assert refused.value.verify_message in (
        "self-signed certificate in certificate chain", "unable to get local issuer certificate",
    )  # fmt: skip


@BOTH
def test_an_error_holds_no_memory_that_was_to_be_read_into(connect, dials, listens):
    dialler, listener = connect(dials, listens, site="stranger")
    with pytest.raises(ssl.SSLError):
        shake(dialler, listener)
    buffer = memoryview(bytearray(100))
    with pytest.raises(ssl.SSLError) as refused:
        turns(lambda: dialler.recv_into(buffer) > 0)
    assert "UNKNOWN_CA" in str(refused.value).upper()
    buffer.release()  # BufferError if the traceback, which is still here, had any of it


K_CYCLES = """
import gc, socket, sys
from pathlib import Path
from prfaas.pump import openssl

context = openssl.Context(Path(sys.argv[1]), [Path(sys.argv[2])])
for _ in range(30):
    for kind, sock in zip((openssl.DiallingEnd, openssl.ListeningEnd), socket.socketpair()):
        end = kind(sock, context)
        end.itself = end
del end, sock
sys.exit(0 if gc.collect() else "there was nothing to collect")
"""


def test_ends_that_only_know_each_other_are_collected(sites: Path) -> None:
    """In a process of its own: what went wrong here ended it."""
    words = [sys.executable, "-W", "ignore::ResourceWarning", "-X", "faulthandler", "-c", K_CYCLES]
    words += [str(sites / "east" / keys.K_SITE_FILE), str(sites / "east" / keys.K_TRUSTED)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@BOTH
def test_a_byte_that_was_changed_on_the_way_ends_the_connection(connect, dials, listens):
    dialler, listener = connect(dials, listens)
    shake(dialler, listener)
    with pytest.raises(K_WANT):
        listener.recv_into(memoryview(bytearray(16)))
    raw = socket.socket(fileno=socket.dup(dialler.sock.fileno()))
    with raw:
        raw.send(b"\x17\x03\x03\x00\x20" + bytes(32))  # the form of a record, and nobody's key
        with pytest.raises(ssl.SSLError) as found:
            turns(lambda: listener.recv_into(memoryview(bytearray(16))) > 0)
    assert "MAC" in found.value.reason


@BOTH
def test_the_end_of_a_connection_is_told_as_no_bytes_after_all_that_came_before(connect, dials, listens):
    dialler, listener = connect(dials, listens)
    shake(dialler, listener)
    turns(lambda: dialler.send(memoryview(b"last words")) == 10)
    dialler.sock.shutdown(socket.SHUT_WR)
    chunk = memoryview(bytearray(100))
    turns(lambda: listener.recv_into(chunk) == 10)
    assert bytes(chunk[:10]) == b"last words"
    assert listener.recv_into(chunk) == 0


@BOTH
def test_what_was_taken_off_the_socket_and_not_read_is_pending(connect, dials, listens):
    dialler, listener = connect(dials, listens)
    shake(dialler, listener)
    turns(lambda: dialler.send(memoryview(bytes(50_000))) > 0 and dialler.flush())
    chunk = memoryview(bytearray(100))
    turns(lambda: listener.recv_into(chunk) > 0)
    assert listener.pending()
    rest = memoryview(bytearray(50_000))
    got = 100

    def read() -> bool:
        nonlocal got
        got += listener.recv_into(rest)
        return got == 50_000

    turns(read)
    assert not listener.pending()


def plain_bytes(raw: bytearray) -> int:
    """In whole records of TLS 1.3, each with a header of 5 bytes, its type and a tag of 16."""
    at = found = 0
    while at + 5 <= len(raw) and at + 5 + (body := int.from_bytes(raw[at + 3 : at + 5])) <= len(raw):
        at, found = at + 5 + body, found + body - 17
    return found


@BOTH
def test_a_reader_is_never_told_to_wait_for_more_bytes_than_the_rest_of_what_it_reads_takes(
    connect, dials, listens, sites
):
    """A relay hands the records over by pieces of any length; the last piece of each must be waited for by no
    more than it has.
    """
    dialler, listener = connect(dials, listens)
    shake(dialler, listener)
    # From here on what the dialler says is caught, and comes to the listener through another connection.
    relay, ours = socket.socketpair()
    caught = socket.socket(fileno=socket.dup(listener.sock.fileno()))
    listener.sock, was = ours, listener.sock
    ours.setblocking(False)
    caught.setblocking(False)
    order = random.Random(7)
    with relay, ours, caught, was:
        for _ in range(40):
            size = order.choice([1, 700, 16_384, 16_385, 40_000, 90_000])
            raw = bytearray()
            sent = 0
            while sent < size:
                until = sent + order.choice([900, 16_384, 50_000])
                sent += dialler.send(memoryview(bytes(size))[sent:until])
            dialler.flush()
            while plain_bytes(raw) < size:
                with contextlib.suppress(BlockingIOError):
                    raw += caught.recv(1 << 20)
            rest = memoryview(raw)
            buffer, got = memoryview(bytearray(size)), 0
            while got < size:
                piece = rest[: order.choice([1, 5, 300, 5_000, 70_000])]
                relay.sendall(piece)
                rest = rest[len(piece) :]
                with contextlib.suppress(*K_WANT):
                    got += listener.recv_into(buffer[got:])
                if got < size:
                    told = listener.bytes_before(size - got)
                    assert 1 <= told <= len(rest)
                    if listens == "native":
                        assert len(rest) - told <= 22 * (size // 900 + 2)
            assert not rest


@BOTH
def test_a_full_socket_is_told_and_what_was_offered_then_comes_once(connect, dials, listens):
    dialler, listener = connect(dials, listens)
    shake(dialler, listener)
    data = memoryview(K_DATA * 4)
    sent = 0
    with contextlib.suppress(*K_WANT):
        while sent < len(data):
            sent += dialler.send(data[sent : sent + 1_000_000])
    held = sent
    assert held < len(data)
    got = bytearray()
    chunk = memoryview(bytearray(200_000))

    def send() -> bool:
        nonlocal sent
        if sent < len(data):
            sent += dialler.send(data[sent : sent + 1_000_000])
        return sent == len(data) and dialler.flush()

    def receive() -> bool:
        n = listener.recv_into(chunk)
        got.extend(chunk[:n])
        return len(got) == len(data)

    turns(receive_some(listener, got, held // 2), send, receive)
    assert got == data


def receive_some(listener: TlsEnd, got: bytearray, enough: int) -> Callable[[], bool]:
    def receive() -> bool:
        got.extend(memoryview(chunk)[: listener.recv_into(chunk)])
        return len(got) >= enough

    chunk = memoryview(bytearray(3_000))
    return receive


@BOTH
def test_a_connection_that_is_reset_is_an_error_of_the_system(connect, dials, listens):
    dialler, listener = connect(dials, listens)
    shake(dialler, listener)
    listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    listener.sock.close()
    with pytest.raises(OSError, match=r"reset|[Bb]roken pipe|EOF"):
        turns(lambda: not dialler.send(memoryview(bytes(100_000))))


@BOTH
def test_what_is_offered_after_the_end_goes_to_no_other_file(connect, dials, listens, tmp_path):
    """The descriptor's number may be another's by then."""
    dialler, listener = connect(dials, listens)
    shake(dialler, listener)
    number = dialler.sock.fileno()
    dialler.sock.close()
    with open(tmp_path / "other", "w+b") as other:
        os.dup2(other.fileno(), number)
        for call in (
            lambda: dialler.send(memoryview(bytes(1000))),
            lambda: dialler.recv_into(memoryview(bytearray(10))),
        ):
            with pytest.raises(OSError):
                call()
        os.close(number)
        assert other.seek(0, 2) == 0


def test_without_one_of_openssls_names_pumps_use_ssl(monkeypatch):
    monkeypatch.setattr(openssl, "K_NEEDED", (*openssl.K_NEEDED, "SSL_no_such_call"))
    assert not openssl.is_usable()
    assert openssl.version() == ssl.OPENSSL_VERSION


K_CONNECTIONS = 12


@pytest.fixture
def many(sites: Path):
    """Connections of one context at each end, as a pump's are, and what a pair of ends holds in the mean."""
    contexts = [
        TlsContext(
            server=server,
            site_file=sites / name / keys.K_SITE_FILE,
            authorities=[sites / name / keys.K_TRUSTED],
        )
        for server, name in ((False, "east"), (True, "west"))
    ]
    pairs = []
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for _ in range(K_CONNECTIONS):
                socks = socket.create_connection(listener.getsockname()), listener.accept()[0]
                for sock in socks:
                    sock.setblocking(False)
                pairs.append([c.end(s, dialled=s is socks[0]) for c, s in zip(contexts, socks, strict=True)])
        held_bytes = (tracemalloc.get_traced_memory()[0] - before) / K_CONNECTIONS
    finally:
        tracemalloc.stop()
    yield pairs, held_bytes
    for end in itertools.chain(*pairs):
        end.sock.close()


def test_connections_of_one_context_each_get_their_own_bytes_though_all_come_at_once(many) -> None:
    pairs, _ = many
    shake(*itertools.chain(*pairs))
    wanted = [random.Random(place).randbytes(400_000) for place in range(K_CONNECTIONS)]
    got = [bytearray() for _ in pairs]
    chunk = memoryview(bytearray(50_000))
    sent = [0] * K_CONNECTIONS

    def send(place: int) -> bool:
        end, data = pairs[place][0], memoryview(wanted[place])
        if sent[place] < len(data):
            sent[place] += end.send(data[sent[place] : sent[place] + 50_000])
        return sent[place] == len(data) and end.flush()

    def receive(place: int) -> bool:
        n = pairs[place][1].recv_into(chunk)
        got[place].extend(chunk[:n])
        return len(got[place]) == len(wanted[place])

    places = range(K_CONNECTIONS)
    turns(*(partial(step, place) for place in places for step in (send, receive)))
    assert [bytes(one) for one in got] == wanted


def test_a_connection_holds_a_chunk_each_way_at_most_and_only_where_it_listens(many) -> None:
    """A pump has 64 to each of its peers."""
    pairs, held_bytes = many
    assert len(pairs) == K_CONNECTIONS
    assert held_bytes < 2 * 1.1 * openssl.K_CHUNK_BYTES
