"""The parser of servers' answers: however the bytes are cut, the same answer; what isn't HTTP is told."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.router.sse import EventCutter
from prfaas.router.upstream import Connection, ConnectionCut, NotHttp, UpstreamError


class Wire:
    """A transport that keeps what it is told."""

    def __init__(self) -> None:
        self.sent = b""
        self.aborted = self.paused = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


def connected() -> tuple[Connection, Wire]:
    connection, wire = Connection(), Wire()
    connection.connection_made(wire)  # type: ignore[arg-type]
    connection.send(b"POST / HTTP/1.1\r\n\r\n")
    return connection, wire


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(ends)]


def chunked(pieces: list[bytes], trailer: bytes = b"") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n" + trailer + b"\r\n"


def data_of(chunks: bytes) -> bytes:
    """Of whole chunks, one after another."""
    found = b""
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        end = int(size, 16)
        assert rest[end : end + 2] == b"\r\n"
        found, chunks = found + rest[:end], rest[end + 2 :]
    return found


def sized(pieces: list[bytes]) -> bytes:
    body = b"".join(pieces)
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def read(connection: Connection, feeds: list[bytes], *, lose: bool = False) -> bytes:
    async def main() -> bytes:
        reader = asyncio.ensure_future(connection.whole())
        await asyncio.sleep(0)
        for feed in feeds:
            connection.data_received(feed)
            await asyncio.sleep(0)
        if lose:
            connection.connection_lost(None)
        return await asyncio.wait_for(reader, 1)

    return asyncio.run(main())


K_PIECES = st.lists(st.binary(max_size=40), max_size=6)
K_PLACES = st.lists(st.integers(min_value=0, max_value=10_000), max_size=12)


@given(pieces=K_PIECES, places=K_PLACES, trailer=st.sampled_from([b"", b"X: y\r\n"]))
def test_a_chunked_answer_is_the_same_however_it_is_cut(
    pieces: list[bytes], places: list[int], trailer: bytes
) -> None:
    connection, _ = connected()
    assert read(connection, cut(chunked(pieces, trailer), places)) == b"".join(pieces)
    assert connection.status == 200
    assert connection.reusable


@given(pieces=K_PIECES, places=K_PLACES)
def test_a_sized_answer_is_the_same_however_it_is_cut(pieces: list[bytes], places: list[int]) -> None:
    connection, _ = connected()
    assert read(connection, cut(sized(pieces), places)) == b"".join(pieces)
    assert connection.reusable


@given(pieces=K_PIECES, places=K_PLACES, takes=st.lists(st.booleans()), one_by_one=st.booleans())
def test_piped_bytes_are_the_answers_in_order_and_end_once(
    pieces: list[bytes], places: list[int], takes: list[bool], one_by_one: bool
) -> None:
    """Whole chunks may be taken as they stand, or refused; in any mixture the data is the same."""

    async def main() -> None:
        connection, _ = connected()
        got: list[bytes] = []
        ends: list[UpstreamError | None] = []
        turns = iter(takes)

        def on_chunk(chunks: bytes, start: int) -> bool:
            if not next(turns, True):
                return False
            last = chunks[start:-2]
            assert chunks.endswith(b"%x\r\n%b\r\n" % (len(last), last))
            got.append(data_of(chunks))
            return True

        if one_by_one:
            whole = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece]
            pairs = [b"".join(whole[place : place + 2]) for place in range(0, len(whole), 2)]
            feeds = [chunked([]).removesuffix(b"0\r\n\r\n"), *pairs, b"0\r\n\r\n"]
        else:
            feeds = cut(chunked(pieces), places)
        for feed in feeds[:1]:
            connection.data_received(feed)
        connection.pipe(got.append, ends.append, on_chunk)
        for feed in feeds[1:]:
            connection.data_received(feed)
        assert b"".join(got) == b"".join(pieces)
        assert ends == [None]

    asyncio.run(main())


@given(data=st.binary(max_size=300), places=K_PLACES)
def test_any_bytes_at_all_end_in_an_answer_or_an_error(data: bytes, places: list[int]) -> None:
    connection, _ = connected()
    try:
        read(connection, cut(data, places), lose=True)
    except (NotHttp, ConnectionCut):
        assert not connection.reusable


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 2000,
        b"x" * 100_000,
    ],
)
def test_what_breaks_the_rules_ends_the_connection(answer: bytes) -> None:
    connection, wire = connected()
    with pytest.raises(NotHttp):
        read(connection, [answer])
    assert wire.aborted


def test_an_answer_cut_short_is_told_and_one_until_close_is_whole() -> None:
    connection, _ = connected()
    with pytest.raises(ConnectionCut):
        read(connection, [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc"], lose=True)
    connection, _ = connected()
    assert read(connection, [b"HTTP/1.0 200 OK\r\n\r\nabc"], lose=True) == b"abc"
    assert not connection.reusable


def test_interim_answers_are_passed_over_and_bytes_nobody_asked_for_end_it() -> None:
    connection, wire = connected()
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert read(connection, [interim + sized([b"x"])]) == b"x"
    assert connection.reusable
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n")
    assert wire.aborted
    assert not connection.reusable


def test_a_stream_that_nobody_takes_stops_being_read() -> None:
    async def main() -> None:
        connection, wire = connected()
        connection.data_received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"x" * 65536
        for _ in range(20):
            connection.data_received(b"%x\r\n%b\r\n" % (len(piece), piece))
        assert wire.paused
        for _ in range(20):
            assert await connection.part() == piece
        assert not wire.paused

    asyncio.run(main())


def test_a_reader_that_is_cancelled_leaves_the_connection_to_be_closed() -> None:
    async def main() -> None:
        connection, wire = connected()
        reader: Any = asyncio.ensure_future(connection.head())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait({reader})
        assert not connection.reusable
        connection.close()
        assert wire.aborted

    asyncio.run(main())


@given(
    texts=st.lists(st.text(alphabet="ab", max_size=3), max_size=4),
    places=K_PLACES,
    together=st.integers(min_value=1, max_value=4),
)
def test_the_end_of_a_stream_is_seen_however_a_proxy_has_cut_it_into_chunks(
    texts: list[str], places: list[int], together: int
) -> None:
    """As the relay has it: chunks as they stand where the cutter lets them pass, else cut into events."""
    stream = b"".join(b"data: " + text.encode() + b"\n\n" for text in texts) + b"data: [DONE]\n\n"
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut(stream, places)]
    connection, _ = connected()
    cutter, out = EventCutter(), []

    def on_chunk(data: bytes, last: int) -> bool:
        passes = cutter.passes(data, last, len(data) - 2)
        if passes:
            out.append(data_of(data))
        return passes

    connection.data_received(chunked([]).removesuffix(b"0\r\n\r\n"))
    connection.pipe(lambda data: out.append(cutter.feed(data)), lambda error: None, on_chunk)
    for place in range(0, len(chunks), together):
        connection.data_received(b"".join(chunks[place : place + together]))
    assert b"".join(out) == stream
    assert cutter.done
