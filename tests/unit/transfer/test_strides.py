"""Runs of pieces at equal distances: the same bytes as row by row, and as strictly refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prfaas.model.errors import LocalProtocolError, RemoteProtocolError
from prfaas.transfer.plans import K_PIECES_MAX, K_RUNS_MAX, StridedPlan
from prfaas.transfer.segments import U64, Ranges, fault_of_iov
from prfaas.transfer.strides import (
    K_LEAST_MEAN_PIECES,
    K_LEAST_PIECES,
    Pieces,
    StridedSegments,
    Strides,
    holds,
    rows_of,
)
from prfaas.transfer.tables import (
    K_STRIDES,
    K_STRIDES_ROW,
    K_STRIDES_TABLE,
    decode_table,
    encode_table,
)

K_SOURCE, K_DESTINATION = 1 << 20, 1 << 40
K_TOP = 1 << 64
K_WRAPPING = [*range(0, 12800, 128), *(20_000 + i * ((1 << 62) + 16) for i in range(4))]
"""Four that follow on, of which the lengths together are 64 modulo 2^64."""
K_MOST_GROUPS = 3 * 4 * 2
"""Of equal steps: of three layers with four stretches each, and between them."""

Columns = tuple[list[int], list[int], list[int]]


@st.composite
def slices(draw: st.DrawFn) -> Columns:
    """Source, destination and length of each slice: some layers, of each some stretches of tokens."""
    source: list[int] = []
    destination: list[int] = []
    length: list[int] = []
    here, there = K_SOURCE, K_DESTINATION
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from([1, 7, 64, 100]))
        steps = [size + draw(st.sampled_from([0, 1, size, 300])) for _ in range(2)]
        for _ in range(draw(st.integers(1, 4))):
            n = draw(st.sampled_from([1, 2, 3, 40, 150, 300]))
            for _ in range(n):
                source.append(here)
                destination.append(there)
                length.append(size)
                here, there = here + steps[0], there + steps[1]
            here += draw(st.sampled_from([0, 5, 5000]))
            there += draw(st.sampled_from([0, 5, 5000]))
    return source, destination, length


def columns(case: Columns) -> list[U64]:
    return [np.array(column, dtype=np.uint64) for column in case]


def each_byte(pieces: Pieces) -> U64:
    """Its address."""
    rows = rows_of(pieces)
    length = rows[:, 1].astype(np.int64)
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    at: U64 = np.repeat(rows[:, 0], length) + within.astype(np.uint64)
    return at


def moves(source: U64, destination: U64, length: U64) -> list[list[int]]:
    """Where each byte comes from, and where it goes."""
    return [each_byte(np.stack((at, length), axis=1)).tolist() for at in (source, destination)]


@given(slices())
def test_runs_say_the_same_bytes_as_the_segments_that_they_were_found_in(case: Columns) -> None:
    wanted = columns(case)
    found = StridedSegments.found(*wanted)
    if found is None:
        assert (
            len(case[0]) < K_LEAST_MEAN_PIECES * K_MOST_GROUPS / 2 or len(case[0]) < K_LEAST_PIECES
        )  # few, for so many stretches
        return
    again = StridedSegments.from_bytes(found.to_bytes())
    assert moves(*again.columns()) == moves(*wanted)
    assert again.source.total_bytes == sum(case[2])


@pytest.mark.parametrize(("n", "layers"), [(K_LEAST_PIECES, 1), (512, 60), (20_000, 1)])
def test_slices_of_tokens_that_follow_on_are_a_run_a_layer(n: int, layers: int) -> None:
    token = np.arange(n, dtype=np.uint64) * np.uint64(128)
    layer = np.repeat(np.arange(layers, dtype=np.uint64) << np.uint64(24), n)
    every = np.tile(token, layers) + layer
    found = StridedSegments.found(every, every // np.uint64(2), np.full(n * layers, 64, np.uint64))
    assert found is not None
    assert len(found.rows) == layers


@pytest.mark.parametrize(
    ("source", "destination", "length"),
    [
        (range(0, 6400, 128), range(0, 6400, 128), [64] * 50),
        (range(0, 12800, 128), range(0, 12800, 128), [5000] * 100),
        (range(0, 12800, 128), range(0, 12800, 128), [0] * 100),
        (range(0, 12800, 128), range(0, 3200, 32), [64] * 100),
        (range(12800, 0, -128), range(0, 12800, 128), [64] * 100),
        ([128 * i * i for i in range(100)], range(0, 12800, 128), [64] * 100),
        (range(0, 12800, 128), [*range(0, 6400, 128), *range(64, 6464, 128)], [64] * 100),
        (range(0, 12800, 128), range(K_TOP - 6400, K_TOP + 6400, 128), [64] * 100),
        (range(0, 12800, 128), range(0, 12800, 128), [64] * 99),
        (range(0, 12800, 128), range(0, 12800, 128), [1 << 63, 1 << 63] * 50),
        (K_WRAPPING, K_WRAPPING, [64] * 100 + [(1 << 62) + 16] * 4),
        (range(0, 100 << 33, 1 << 33), range(0, 12800, 128), [64] * 100),
    ],
    ids=["few", "large", "empty", "over one another", "backwards", "unequal", "through one another",
         "past the end of memory", "of unequal number", "huge", "together as if short", "far apart"],
)  # fmt: skip
def test_what_is_no_run_is_told_row_by_row(source: range, destination: range, length: list[int]) -> None:
    rows = [
        np.array([x % K_TOP for x in column], dtype=np.uint64) for column in (source, destination, length)
    ]
    assert StridedSegments.found(*rows) is None


@given(slices(), st.sampled_from([64, 100, 512, 1000, 3000, 100_000]), st.integers(0, 9))
def test_blocks_of_runs_carry_every_byte_exactly_once(case: Columns, block_bytes: int, more: int) -> None:
    rows = columns(case)
    found = StridedSegments.found(*rows)
    if found is None:
        return
    plan = StridedPlan(found, block_bytes + more)
    sources, destinations = [], []
    for block in range(plan.n_blocks):
        piece = plan.block(block)
        assert 0 < piece.payload_bytes == plan.block_bytes(block) <= block_bytes + more
        assert isinstance(piece.destination, Strides)
        assert piece.destination.fault(overlap_is_fault=True) is None
        at = each_byte(piece.destination)
        for version in (2, 3):
            table = encode_table(piece.destination, version)
            assert (each_byte(decode_table(table, version, piece.payload_bytes)) == at).all()
        sources.append(each_byte(piece.source))
        destinations.append(at)
    assert [np.concatenate(sources).tolist(), np.concatenate(destinations).tolist()] == moves(*rows)
    assert plan.total_bytes == sum(case[2])


def test_a_block_of_runs_has_so_many_pieces_that_its_receiver_takes_it() -> None:
    n = 3 * K_PIECES_MAX
    at = np.arange(n, dtype=np.uint64) * np.uint64(4)
    found = StridedSegments.found(at, at * np.uint64(2), np.full(n, 4, np.uint64))
    assert found is not None
    plan = StridedPlan(found, 2 << 20)
    assert plan.n_blocks == 3
    for block in range(3):
        piece = plan.block(block)
        pieces = decode_table(encode_table(piece.destination, 3), 3, piece.payload_bytes)
        assert isinstance(pieces, Strides)
        assert pieces.n_pieces == K_PIECES_MAX


def test_a_peer_of_an_older_version_gets_rows_or_nothing() -> None:
    run = one_run(K_DESTINATION, 128, 64, K_RUNS_MAX)
    assert rows_of(decode_table(encode_table(run, 2), 2, 64 * K_RUNS_MAX)).tolist() == run.rows.tolist()
    with pytest.raises(LocalProtocolError, match="version 2"):
        encode_table(one_run(K_DESTINATION, 128, 64, K_RUNS_MAX + 1), 2)
    with pytest.raises(RemoteProtocolError):
        decode_table(encode_table(run, 3), 2, 64 * K_RUNS_MAX)


def one_run(start: int, step: int, size: int, count: int) -> Strides:
    return Strides(*(np.array([x], dtype=np.uint64) for x in (start, step, size, count)))


def table(*runs: tuple[int, int, int, int]) -> bytes:
    """Of (start, step, size, count)."""
    return K_STRIDES_TABLE.pack(K_STRIDES, len(runs)) + np.array(list(runs), K_STRIDES_ROW).tobytes()


@pytest.mark.parametrize(
    ("runs", "payload_bytes"),
    [
        ([], 0),
        ([(4096, 128, 64, 0)], 0),
        ([(4096, 128, 0, 9)], 0),
        ([(4096, 128, 64, 10)], 639),
        ([(4096, 128, 64, 10)], 641),
        ([(4096, 63, 64, 10)], 640),
        ([(4096, 0, 64, 2)], 128),
        ([(4096, 128, 64, 10), (4096 + 64, 128, 64, 10)], 1280),
        ([(4096, 128, 64, 10), (4096 + 9 * 128 + 63, 64, 64, 1)], 704),
        ([(K_TOP - 640, 128, 64, 10)], 640),
        ([(K_TOP - 63, 64, 64, 1)], 64),
        ([(4096, 2, 1, K_PIECES_MAX + 1)], K_PIECES_MAX + 1),
        ([(4096, 2, 1, (1 << 32) - 1)] * 9, 9 * ((1 << 32) - 1)),
        ([(4096, (1 << 32) - 1, (1 << 32) - 1, (1 << 32) - 1)] * 2, 2),
        ([(8192 * i, 64, 64, 1) for i in range(K_RUNS_MAX + 1)], 64 * (K_RUNS_MAX + 1)),
    ],
    ids=["none", "no pieces", "empty", "more than the payload", "less than the payload", "over one another",
         "one place twice", "through one another", "touched by the next run's", "past the end of memory",
         "last past the end", "too many pieces", "far too many", "of sizes that wrap", "too many runs"],
)  # fmt: skip
def test_impossible_tables_of_runs_are_refused(
    runs: list[tuple[int, int, int, int]], payload_bytes: int
) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_table(table(*runs), 3, payload_bytes)


words = st.one_of(st.integers(0, 200), st.sampled_from([(1 << 31), (1 << 32) - 1]))
starts = st.one_of(st.integers(0, 5000), st.integers(K_TOP - 5000, K_TOP - 1))


@given(
    st.lists(st.tuples(starts, words, words, words), min_size=1, max_size=4),
    st.binary(max_size=2),
    st.integers(-1, 1),
)
def test_any_table_of_runs_is_refused_or_is_sound(
    runs: list[tuple[int, int, int, int]], more: bytes, off_by: int
) -> None:
    payload_bytes = sum(size * count for _, _, size, count in runs) + off_by
    try:
        pieces = decode_table(table(*runs) + more, 3, payload_bytes)
    except RemoteProtocolError:
        return
    assert isinstance(pieces, Strides)
    rows = pieces.rows
    assert not more
    assert int(rows[:, 1].sum()) == payload_bytes
    assert fault_of_iov(rows, overlap_is_fault=True) is None


@given(st.binary(max_size=60), st.integers(0, 1 << 22))
def test_tables_of_garbage_that_begin_as_runs_do_are_refused_or_sound(
    data: bytes, payload_bytes: int
) -> None:
    try:
        pieces = decode_table(bytes([K_STRIDES]) + data, 3, payload_bytes)
    except RemoteProtocolError:
        return
    assert isinstance(pieces, Strides)
    assert fault_of_iov(pieces.rows, overlap_is_fault=True) is None


@given(
    st.lists(st.one_of(st.integers(0, 300), st.integers(0, K_TOP - 1)), min_size=6, max_size=18),
    st.binary(max_size=1),
)
def test_what_a_server_tells_of_runs_is_refused_or_is_sound(numbers: list[int], more: bytes) -> None:
    data = np.array(numbers, dtype="<u8").tobytes() + more
    try:
        segments = StridedSegments.from_bytes(data)
    except LocalProtocolError:
        return
    assert len(data) % 48 == 0
    assert fault_of_iov(segments.destination.spans, overlap_is_fault=True) is None
    if segments.source.n_pieces <= 10_000:
        assert fault_of_iov(segments.source.rows, overlap_is_fault=False) is None
        assert fault_of_iov(segments.destination.rows, overlap_is_fault=True) is None


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=8),
    st.integers(0, 200), st.integers(1, 9), st.integers(0, 30), st.integers(1, 9),
)  # fmt: skip
@example([(0, 8), (16, 8)], 0, 8, 8, 2)
def test_a_run_is_held_where_each_of_its_pieces_is(
    regions: list[tuple[int, int]], start: int, size: int, gap: int, count: int
) -> None:
    ranges, run = Ranges(regions), one_run(start, size + gap, size, count)
    inside = {a + i for a, n in regions for i in range(n)}
    assert holds(ranges, run) == all(at in inside for at in each_byte(run).tolist())
