"""Segments, blocks and tables: every byte once, and nothing outside of what was registered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.errors import LocalProtocolError, RemoteProtocolError
from prfaas.transfer.plans import K_RUNS_MAX, Plan
from prfaas.transfer.segments import Ranges, Single, fault_of_iov, iov
from prfaas.transfer.strides import holds, rows_of
from prfaas.transfer.tables import decode_table, encode_table

K_TOP = 1 << 64


@st.composite
def layouts(draw):
    """(lengths, source gaps, destination gaps, order of destinations)."""
    lengths = draw(st.lists(st.integers(1, 700), min_size=1, max_size=30))
    gaps = draw(st.lists(st.sampled_from([0, 0, 1, 64]), min_size=len(lengths), max_size=len(lengths)))
    order = draw(st.permutations(range(len(lengths))))
    return lengths, gaps, order


def place(lengths, gaps, order, base):
    """Addresses without overlap, laid out in `order`."""
    at, addresses = base, [0] * len(lengths)
    for i in order:
        addresses[i] = at
        at += lengths[i] + gaps[i]
    return addresses


@given(layouts(), st.integers(1, 1500))
def test_blocks_carry_every_byte_of_every_segment_exactly_once(layout, block_bytes):
    lengths, gaps, order = layout
    src = place(lengths, gaps, range(len(lengths)), 1000)
    dst = place(lengths, gaps, order, 1 << 40)
    plan = Plan(src, dst, lengths, block_bytes)
    wanted = {d + k: s + k for s, d, n in zip(src, dst, lengths, strict=True) for k in range(n)}
    got: dict[int, int] = {}
    for block in range(plan.n_blocks):
        piece = plan.block(block)
        assert 0 < piece.payload_bytes == plan.block_bytes(block) <= block_bytes
        sources = [int(a) + k for a, n in rows_of(piece.source) for k in range(int(n))]
        destinations = [int(a) + k for a, n in rows_of(piece.destination) for k in range(int(n))]
        assert len(sources) == len(destinations) == piece.payload_bytes
        for s, d in zip(sources, destinations, strict=True):
            assert d not in got
            got[d] = s
    assert got == wanted
    assert plan.total_bytes == sum(lengths)


def test_blocks_of_tiny_segments_are_cut_by_their_number():
    n = 3 * K_RUNS_MAX + 5
    at = np.arange(n, dtype=np.uint64) * np.uint64(128)
    plan = Plan(at, at + np.uint64(1 << 40), np.full(n, 64), 1 << 20)
    assert plan.n_blocks == 4
    assert all(len(rows_of(plan.block(b).destination)) <= K_RUNS_MAX for b in range(plan.n_blocks))


def test_a_hundred_thousand_segments_make_one_plan():
    n = 100_000
    at = np.random.default_rng(1).permutation(n).astype(np.uint64) * np.uint64(4096)
    plan = Plan(at + np.uint64(1 << 20), at + np.uint64(1 << 40), np.full(n, 4096), 256 * 1024)
    assert plan.total_bytes == n * 4096
    assert sum(plan.block_bytes(b) for b in range(plan.n_blocks)) == plan.total_bytes
    assert (plan.source[:, 0] - np.uint64(1 << 20) == plan.destination[:, 0] - np.uint64(1 << 40)).all()
    assert (np.sort(plan.source[:, 0]) == np.sort(at) + np.uint64(1 << 20)).all()


@given(layouts(), st.sampled_from([1, 2]), st.integers(0, 1 << 50))
def test_tables_say_at_the_receiver_what_they_said_at_the_sender(layout, version, base):
    lengths, gaps, order = layout
    pieces = iov(place(lengths, gaps, order, base), lengths)
    decoded = decode_table(encode_table(pieces, version), version, sum(lengths))
    assert rows_of(decoded).tolist() == pieces.tolist()


@pytest.mark.parametrize("version", [1, 2, 3])
@given(address=st.integers(0, K_TOP - 1), size=st.integers(1, 1 << 22))
def test_one_piece_is_told_and_judged_as_a_row_of_one(version, address, size):
    one, row = Single(address, size), iov([address], [size])
    table = encode_table(one, version)
    assert table == encode_table(row, version)
    fault = fault_of_iov(row, overlap_is_fault=True)
    if fault is not None:
        with pytest.raises(RemoteProtocolError, match=fault):
            decode_table(table, version, size)
        return
    assert rows_of(decode_table(table, version, size)).tolist() == row.tolist()
    with pytest.raises(RemoteProtocolError, match="add up"):
        decode_table(table, version, size + 1)


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 50)), max_size=6),
    st.integers(0, 260), st.integers(1, 60),
)  # fmt: skip
def test_one_piece_is_held_where_a_row_of_one_is(regions, address, size):
    ranges = Ranges(regions)
    assert holds(ranges, Single(address, size)) is holds(ranges, iov([address], [size]))
    for start, _ in regions[:2]:
        ranges.remove([start])
        assert holds(ranges, Single(address, size)) is holds(ranges, iov([address], [size]))


@given(st.binary(max_size=200), st.sampled_from([1, 2]), st.integers(0, 1 << 22))
def test_tables_of_garbage_are_refused_or_are_sound(table, version, payload_bytes):
    try:
        pieces = decode_table(table, version, payload_bytes)
    except RemoteProtocolError:
        return
    assert int(rows_of(pieces)[:, 1].sum()) == payload_bytes
    assert fault_of_iov(rows_of(pieces), overlap_is_fault=True) is None


@pytest.mark.parametrize(
    ("sources", "destinations", "lengths"),
    [
        ([], [], []),
        ([0], [0], [0]),
        ([0, 10], [0, 10], [5]),
        ([0], [K_TOP - 4], [8]),
        ([K_TOP - 4], [0], [8]),
        ([0, 100], [0, 4], [8, 8]),
        ([0, 100], [50, 50], [8, 8]),
        ([0], [0], [1 << 63]),
        ([0, 1 << 50], [0, 1 << 60], [1 << 43, 1 << 44]),
        ([-1], [0], [8]),
        ([0.5], [0], [8]),
        ([K_TOP], [0], [8]),
        (["a"], [0], [8]),
        ([None], [0], [8]),
    ],
)
def test_impossible_segments_are_refused(sources, destinations, lengths):
    with pytest.raises(LocalProtocolError):
        Plan(sources, destinations, lengths, 1 << 20)


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 330), st.integers(1, 60)), min_size=1, max_size=5),
)
def test_ranges_hold_exactly_what_lies_within_them(regions, pieces):
    ranges = Ranges(regions)
    inside = {a + k for a, n in regions for k in range(n)}
    asked = iov([a for a, _ in pieces], [n for _, n in pieces])
    assert ranges.holds(asked) == all(a + k in inside for a, n in pieces for k in range(n))
    assert ranges.total_bytes == len(inside)


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=12, unique_by=lambda r: r[0]
    )
)
def test_a_removed_region_no_longer_counts(regions):
    ranges = Ranges(regions)
    gone, *left = regions
    ranges.remove([gone[0]])
    inside = {a + k for a, n in left for k in range(n)}
    assert ranges.total_bytes == len(inside)


@pytest.mark.parametrize("region", [(0, 0), (-1, 5), (K_TOP - 2, 4), (5, -1)])
def test_impossible_regions_are_refused_and_change_nothing(region):
    ranges = Ranges([(10, 10)])
    with pytest.raises(LocalProtocolError):
        ranges.add([(100, 5), region])
    assert ranges.total_bytes == 10


def test_a_piece_that_wraps_past_the_top_is_a_fault():
    pieces = iov([K_TOP - 8], [16])
    assert fault_of_iov(pieces, overlap_is_fault=True) == "a piece past the end of memory"
