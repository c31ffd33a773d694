"""Small pieces copied as spans: the same bytes, and nothing between them changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prfaas.pump.memory import Buffer, OwnerMemory
from prfaas.pump.spans import (
    K_FEWER,
    K_GAP_BYTES,
    K_LARGE_BYTES,
    K_LEAST_PIECES,
    K_MOST_BYTES,
    K_SHARE_BYTES,
    Bytes,
    Spans,
    pays,
    shares,
)
from prfaas.pump_client.guard import GuardTable
from prfaas.transfer.segments import U64, Ranges
from prfaas.transfer.strides import Strides


def rows(starts: list[int], lengths: list[int], base: int = 0) -> U64:
    return np.stack((np.array(starts) + base, lengths), axis=1).astype(np.uint64)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[U64, int]:
    """Pieces as a block has them, and the size of the memory they lie in."""
    size = draw(st.integers(1, 130))
    n = draw(st.integers(K_LEAST_PIECES, 80))
    near, far = st.integers(0, K_GAP_BYTES), st.integers(K_GAP_BYTES + 1, 3 * K_GAP_BYTES)
    if draw(st.booleans()):  # of tokens that follow on
        lengths, gaps = [size] * n, [draw(st.integers(0, K_GAP_BYTES + 1))] * n
    else:
        lengths = [draw(st.integers(1, size)), *[size] * (n - 2), draw(st.integers(1, size))]
        gaps = draw(st.lists(st.one_of(*[near] * 9, far), min_size=n, max_size=n))
    starts, at = [], 0
    for gap, length in zip(gaps, lengths, strict=True):
        starts.append(at + gap)
        at += gap + length
    return rows(starts, lengths), at


def noise(size: int) -> Bytes:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


@given(pieces())
def test_what_is_gathered_and_scattered_is_the_pieces_and_nothing_else(case: tuple[U64, int]) -> None:
    cut, size = case
    memory = noise(size)
    wanted = np.concatenate([memory[a : a + n] for a, n in cut.tolist()])
    spans = Spans.of(cut)
    if spans is None:
        breaks = sum(
            b - (a + n) > K_GAP_BYTES for (a, n), (b, _) in zip(cut.tolist(), cut[1:].tolist(), strict=False)
        )
        assert (breaks + 1) * K_FEWER > len(cut)
        return
    held = np.concatenate([memory[a : a + n] for a, n in spans.rows.tolist()])
    assert held.size == spans.total_bytes
    found = np.empty_like(wanted)
    spans.gather(held, found)
    assert (found == wanted).all()

    changed = memory.copy()
    for a, n in cut.tolist():
        changed[a : a + n] ^= 0xFF
    spans.scatter(wanted ^ 0xFF, held)
    for a, n in spans.rows.tolist():
        assert (held[:n] == changed[a : a + n]).all()
        held = held[n:]


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [
        ([128 * i for i in range(K_LEAST_PIECES - 1)], [64] * (K_LEAST_PIECES - 1)),
        ([128 * i for i in range(20)], [64] * 10 + [63] + [64] * 9),
        ([128 * i for i in range(20)][::-1], [64] * 20),
        ([4096 * i for i in range(20)], [64] * 20),
        ([0, *[32] * 19], [64] * 20),
        ([2**63 * (i % 2) + 128 * i for i in range(20)], [64] * 20),
        ([(1 << 20) * i for i in range(20)], [1 << 20] * 20),
    ],
    ids=["few", "unequal", "backwards", "far apart", "over one another", "at both ends of memory", "large"],
)
def test_pieces_that_are_better_copied_one_by_one_are(starts: list[int], lengths: list[int]) -> None:
    assert sum(lengths) > K_MOST_BYTES or lengths[0] < K_GAP_BYTES
    pieces = np.array([starts, lengths], dtype=np.uint64).T
    assert Spans.of(np.ascontiguousarray(pieces)) is None


@pytest.fixture
def memory() -> Iterator[tuple[OwnerMemory, tuple[int, int]]]:
    """This process's own, and a guard."""
    with closing(GuardTable()) as guards, closing(OwnerMemory(os.getpid(), os.dup(guards.fd))) as owner:
        yield owner, guards.take()


def test_slices_of_every_token_are_read_and_written_in_place(
    memory: tuple[OwnerMemory, tuple[int, int]],
) -> None:
    owner, guard = memory
    pool, out = Buffer(1 << 16), Buffer(1 << 16)
    pool.bytes[:] = noise(1 << 16)
    before = pool.bytes.copy()
    own = [64 + 256 * i for i in range(256)]
    cut = rows(own, [128] * 256, pool.address)
    owner.read(guard, cut, out.address)
    tokens = before.reshape(256, 256)
    assert (out.bytes[: 1 << 15] == tokens[:, 64:192].reshape(-1)).all()

    out.bytes[: 1 << 15] ^= 0xFF
    for alone in (None, Ranges([(pool.address, 1 << 16)]), Ranges(cut)):
        pool.bytes[:] = before
        owner.write(guard, cut, out.address, alone)
        wanted = before.copy().reshape(256, 256)
        wanted[:, 64:192] ^= 0xFF
        assert (pool.bytes == wanted.reshape(-1)).all()


def test_only_where_nobody_else_writes_is_what_lies_between_written_back(
    memory: tuple[OwnerMemory, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, guard = memory
    pool, out = Buffer(1 << 16), Buffer(1 << 16)
    cut = rows([256 * i for i in range(256)], [128] * 256, pool.address)
    written: list[int] = []
    move = owner._move

    def seen(call: object, pieces: U64, address: int) -> None:
        written.append(int(pieces[:, 1].sum()))
        move(call, pieces, address)  # type: ignore[arg-type]

    monkeypatch.setattr(owner, "_move", seen)
    owner.write(guard, cut, out.address, Ranges(cut))
    owner.write(guard, cut, out.address)
    assert written == [1 << 15] * 2
    owner.write(guard, cut, out.address, Ranges([(pool.address, 1 << 16)]))
    assert written[2:] == [(1 << 16) - 128] * 2


K_POOL_BYTES = 4 << 20
Runs = list[tuple[int, int, int, int]]


@st.composite
def runs(draw: st.DrawFn) -> Runs:
    """(start, step, size, count) of runs in a pool, rising."""
    found: Runs = []
    at = 0
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.sampled_from([1, 64, 100, 1000, K_LARGE_BYTES + 1, K_SHARE_BYTES + 1]))
        step = size + draw(st.sampled_from([0, 1, 64, K_GAP_BYTES, K_GAP_BYTES + 1, 5000]))
        count = draw(st.sampled_from([1, 2, 17, 300, 2000]))
        at += draw(st.integers(0, 9000))
        if at + step * count > K_POOL_BYTES:
            break
        again = draw(st.sampled_from([1, 1, 2, 30]))  # as pages of tokens are
        gap = draw(st.integers(0, 3000))
        for _ in range(again if at + again * (step * count + gap) <= K_POOL_BYTES else 1):
            found.append((at, step, size, count))
            at += step * count + gap
    return found or [(5, 128, 64, 20)]


def strides(found: Runs, base: int = 0) -> Strides:
    start, *others = np.array(found, dtype=np.uint64).T
    return Strides(start + np.uint64(base), *others)


@given(runs())
def test_shares_of_runs_are_the_pieces_in_their_order_a_cacheful_of_spans_at_a_time(found: Runs) -> None:
    at: list[NDArray[np.int64]] = []
    for share in shares(strides(found)):
        assert share.span_bytes == int(share.rows[:, 1].sum())
        spans = np.concatenate([np.arange(a, a + n) for a, n in share.rows.tolist()])
        if not share.runs:
            assert share.span_bytes == share.payload_bytes
            at.append(spans)
            continue
        assert share.span_bytes <= K_SHARE_BYTES
        inside = [
            np.tile(np.arange(run.step * (run.n_pieces - 1) + run.size) % run.step < run.size, run.n_runs)
            for run in share.runs
        ]
        at.append(spans[np.concatenate(inside)])
        assert at[-1].size == share.payload_bytes
    wanted = [np.arange(a, a + n) for a, n in strides(found).rows.tolist()]
    assert (np.concatenate(at) == np.concatenate(wanted)).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=runs())
def test_runs_are_read_and_written_in_place_and_what_lies_between_stays(
    memory: tuple[OwnerMemory, tuple[int, int]], pool: tuple[Buffer, Buffer], found: Runs
) -> None:
    owner, guard = memory
    held, out = pool
    cut = strides(found, held.address)
    held.bytes[:] = noise(K_POOL_BYTES)
    inside = np.zeros(K_POOL_BYTES, dtype=bool)
    for start, step, size, count in found:
        for i in range(count):
            inside[start + step * i :][:size] = True
    wanted = np.where(inside, held.bytes ^ 0xFF, held.bytes)
    owner.read(guard, cut, out.address)
    assert (out.bytes[: cut.total_bytes] == held.bytes[inside]).all()
    before = held.bytes.copy()
    out.bytes[: cut.total_bytes] ^= 0xFF
    for alone in (None, Ranges([(held.address, K_POOL_BYTES)]), Ranges(cut.rows)):
        held.bytes[:] = before
        owner.write(guard, cut, out.address, alone)
        assert (held.bytes == wanted).all()


@pytest.fixture(scope="module")
def pool() -> tuple[Buffer, Buffer]:
    return Buffer(K_POOL_BYTES), Buffer(K_POOL_BYTES)


def test_what_lies_between_a_runs_pieces_is_written_only_where_nobody_else_writes(
    memory: tuple[OwnerMemory, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, guard = memory
    held, out = Buffer(1 << 16), Buffer(1 << 16)
    cut = strides([(0, 256, 128, 256)], held.address)
    written: list[int] = []
    move = owner._move

    def seen(call: object, pieces: U64, address: int) -> None:
        written.append(int(pieces[:, 1].sum()))
        move(call, pieces, address)  # type: ignore[arg-type]

    monkeypatch.setattr(owner, "_move", seen)
    owner.write(guard, cut, out.address, Ranges(cut.rows))
    owner.write(guard, cut, out.address)
    assert written == [1 << 15] * 2
    owner.write(guard, cut, out.address, Ranges([(held.address, 1 << 16)]))
    assert written[2:] == [(1 << 16) - 128] * 2


def test_runs_that_each_differ_from_the_one_before_are_copied_piece_by_piece_if_short() -> None:
    def many(mean: int, step: int) -> Strides:
        return strides([(1 << 20 | i << 14, step, 64, mean + i % 2) for i in range(50)])

    assert pays(many(70, 128))
    assert not pays(many(20, 128))
    assert pays(many(20, 64))  # one stretch each
    assert pays(strides([(1 << 20 | i << 14, 128, 64, 20) for i in range(50)]))
