"""Frames: what is sent is what is read, and garbage never gets past the header or the message."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.errors import RemoteProtocolError
from prfaas.transfer import frames as f


def headers():
    return st.builds(
        f.Header,
        version=st.just(2),
        type=st.sampled_from([t for t in f.FrameType if t not in (f.FrameType.HELLO, f.FrameType.BLOCK)]),
        flags=st.integers(0, 65535),
        body_bytes=st.integers(0, f.K_CONTROL_MAX_BYTES),
        table_bytes=st.just(0),
        transfer_id=st.integers(0, (1 << 64) - 1),
        block_id=st.integers(0, (1 << 32) - 1),
        body_crc=st.integers(0, (1 << 32) - 1),
    )


@given(headers())
def test_a_header_reads_as_it_was_written(header):
    assert f.Header.from_bytes(header.to_bytes(), 2) == header


@given(headers(), st.integers(0, f.K_HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_of_a_header_is_found(header, bit):
    data = bytearray(header.to_bytes())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError):
        f.Header.from_bytes(data, 2)


def block_header(body, table, version=2):
    return f.Header(version, f.FrameType.BLOCK, 0, body, table, 1, 0, 0).to_bytes()


@pytest.mark.parametrize(
    ("body", "table"),
    [
        (0, 0),
        (100, 0),
        (100, 100),
        (50, 100),
        (f.K_BLOCK_MAX_BYTES + 101, 100),
        (1 << 31, 8),
        (1 << 20, 1 << 18),
    ],
)
def test_blocks_with_impossible_lengths_are_refused(body, table):
    with pytest.raises(RemoteProtocolError):
        f.Header.from_bytes(block_header(body, table), 2)


def test_only_hello_may_come_first_and_only_first():
    hello = f.control_frame(1, f.FrameType.HELLO, b"x")[: f.K_HEADER_BYTES]
    ack = f.control_frame(2, f.FrameType.ACK, b"x")[: f.K_HEADER_BYTES]
    assert f.Header.from_bytes(hello, None).type is f.FrameType.HELLO
    for data, version in ((hello, 2), (ack, None), (ack, 1)):
        with pytest.raises(RemoteProtocolError):
            f.Header.from_bytes(data, version)


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [((1, 2), (1, 2), 2), ((1, 2), (1, 1), 1), ((2, 3), (1, 2), 2), ((2, 9), (3, 4), 4)],
)
def test_peers_agree_on_the_newest_version_both_speak(ours, theirs, agreed):
    assert f.agree_version(ours, theirs) == f.agree_version(theirs, ours) == agreed


@pytest.mark.parametrize("theirs", [(3, 4), (0, 0), (2, 1)])
def test_peers_without_a_common_version_part(theirs):
    with pytest.raises(RemoteProtocolError):
        f.agree_version((1, 2), theirs)


@given(
    st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1)), min_size=1, max_size=50)
)
def test_acknowledgements_read_as_they_were_written(blocks):
    assert f.decode_acks(f.ack_body(blocks)) == blocks


@pytest.mark.parametrize("kind", [f.Hello, f.Open, f.Refuse, f.Window, f.LedgerMessage])
@given(body=st.binary(max_size=200))
def test_bodies_of_garbage_are_refused_or_are_messages(kind, body):
    try:
        message = f.decode_message(body, kind)
    except RemoteProtocolError:
        return
    assert isinstance(message, kind)


def test_a_hundred_thousand_garbled_headers_raise_nothing_else():
    rng = random.Random(7)
    good = f.control_frame(2, f.FrameType.OPEN, b"x" * 40)[: f.K_HEADER_BYTES]
    refused = 0
    for i in range(100_000):
        data = bytearray(good) if i % 2 else bytearray(rng.randbytes(f.K_HEADER_BYTES))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        try:
            f.Header.from_bytes(data, 2)
        except RemoteProtocolError:
            refused += 1
    # Flips of one byte can cancel out, which leaves the header as it was.
    assert refused > 99_000


def test_a_message_of_a_newer_version_with_unknown_fields_is_read():
    import msgspec

    fields = {"reason": "deadline", "detail": "x", "colour": "blue"}
    assert f.decode_message(msgspec.msgpack.encode(fields), f.Refuse) == f.Refuse("deadline", "x")
