"""Many small pieces of memory as a few spans of it.

The kernel takes 0.3 us for each piece that it copies between processes, whatever its length: for the pieces
of 64 to 128 bytes that unequal tensor parallelism makes, twenty times the copying itself. Where the pieces
lie close together, what lies between them is copied with them, and the pieces are picked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prfaas.transfer.plans import join_runs
from prfaas.transfer.segments import U64, rows
from prfaas.transfer.strides import Strides

K_GAP_BYTES = 1024
"""Most between two pieces of one span: more takes longer to copy, there and back, than a piece of its own.
Less than a page, so that a span can be read where its pieces can."""
K_LEAST_PIECES = 16
K_FEWER = 4
"""How many times fewer the spans must be than the pieces."""
K_MOST_BYTES = 8 << 20
"""Of all spans together."""

K_LARGE_BYTES = 16 * 1024
"""A piece that is copied on its own."""
K_PIECES_A_CHANGE = 64
K_SHARE_BYTES = 1 << 20
"""Of spans of runs at a time: what stays in a core's own cache between its reading and its writing."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Spans:
    """Pieces of one length (the first and the last may be shorter: a block's cuts) and the spans that hold
    them."""

    rows: U64
    """Rows (address, length) of the spans."""
    total_bytes: int
    _at: NDArray[np.int64] | int
    """Of each piece, in the spans one after the other; or from each to the next, where all are alike."""
    _lengths: tuple[int, int, int]
    """Of the first piece, of those between, of the last."""

    @classmethod
    def of(cls, pieces: U64) -> Spans | None:
        """None: copied one by one they cost no more."""
        n = pieces.shape[0]
        if n < K_LEAST_PIECES:
            return None
        # Each a column of its own, which numpy takes faster than one of rows.
        start, length = pieces[:, 0].copy(), pieces[:, 1].copy()
        first, inner, last = (int(length[i]) for i in (0, 1, -1))
        if max(first, last) > inner or bool((length[1:-1] != inner).any()):
            return None
        steps = start[1:] - start[:-1]
        step = int(steps[0])
        if first == last == inner and inner <= step <= inner + K_GAP_BYTES and bool((steps == step).all()):
            size = step * (n - 1) + inner
            whole = np.array([[start[0], size]], dtype=np.uint64)
            return cls(whole, size, step, (first, inner, last)) if size <= K_MOST_BYTES else None
        # What lies before the piece before, or over it, wraps round and is far away.
        breaks = np.flatnonzero(steps - length[:-1] > K_GAP_BYTES) + 1
        if (breaks.size + 1) * K_FEWER > n:
            return None
        begin, end = np.concatenate(([0], breaks)), np.append(breaks, n)
        sizes = start[end - 1] + length[end - 1] - start[begin]
        total_bytes = int(sizes.sum())
        if total_bytes > K_MOST_BYTES:
            return None
        before = np.cumsum(sizes) - sizes
        at = (start - np.repeat(start[begin] - before, end - begin)).astype(np.int64)
        return cls(np.stack((start[begin], sizes), axis=1), total_bytes, at, (first, inner, last))

    def gather(self, spans: Bytes, pieces: Bytes) -> None:
        """The pieces out of the spans, one after the other."""
        first, inner, last = self._lengths
        if isinstance(self._at, int):
            _items(pieces, inner)[:] = _every(spans, inner, self._at)
            return
        pieces[:first] = spans[self._at[0] :][:first]
        _items(pieces[first : pieces.size - last], inner)[:] = _anywhere(spans, inner)[self._at[1:-1]]
        pieces[pieces.size - last :] = spans[self._at[-1] :][:last]

    def scatter(self, pieces: Bytes, spans: Bytes) -> None:
        """The pieces into the spans; what lies between stays."""
        first, inner, last = self._lengths
        if isinstance(self._at, int):
            _every(spans, inner, self._at)[:] = _items(pieces, inner)
            return
        spans[self._at[0] :][:first] = pieces[:first]
        _anywhere(spans, inner)[self._at[1:-1]] = _items(pieces[first : pieces.size - last], inner)
        spans[self._at[-1] :][:last] = pieces[pieces.size - last :]


class Alike(NamedTuple):
    """So many runs of the same step, size and number of pieces."""

    n_runs: int
    step: int
    size: int
    n_pieces: int

    @property
    def extent(self) -> int:
        """Of each, from its first byte to its last."""
        return self.step * (self.n_pieces - 1) + self.size


@dataclass(frozen=True)
class Share:
    """Some of a block's runs: their spans, copied one after the other."""

    rows: U64
    """Rows (address, length) of the spans."""
    runs: list[Alike]
    """What lies in the spans; nothing where they are the pieces."""
    payload_bytes: int
    span_bytes: int

    def gather(self, spans: Bytes, pieces: Bytes) -> None:
        """The pieces out of the spans, one after the other."""
        for inside, items in self._each(spans, pieces):
            items[:] = inside

    def scatter(self, pieces: Bytes, spans: Bytes) -> None:
        """The pieces into the spans; what lies between stays."""
        for inside, items in self._each(spans, pieces):
            inside[:] = items

    def _each(self, spans: Bytes, pieces: Bytes) -> Iterator[tuple[NDArray[np.void], NDArray[np.void]]]:
        at = piece_at = 0
        for run in self.runs:
            n_runs, step, size, count = run
            end, piece_end = at + n_runs * run.extent, piece_at + n_runs * count * size
            inside = np.ndarray(
                shape=(n_runs, count), dtype=np.dtype((np.void, size)), buffer=spans[at:end].data,
                strides=(run.extent, step),
            )  # fmt: skip
            yield inside, _items(pieces[piece_at:piece_end], size).reshape(n_runs, count)
            at, piece_at = end, piece_end


def shares(pieces: Strides) -> Iterator[Share]:
    """A block's runs by how they are copied: as they are where their pieces follow on or lie far apart, else
    by spans of at most K_SHARE_BYTES together.
    """
    if _is_close(pieces):
        yield _solid([rows(pieces.start, pieces.size * pieces.count)])
        return
    plain: list[U64] = []
    near: list[tuple[U64, Alike]] = []
    near_bytes = 0
    for start, step, size, count in _alike(pieces):
        if count == 1 or size > K_LARGE_BYTES or not size < step <= size + K_GAP_BYTES:
            if near:
                yield _near(near)
                near, near_bytes = [], 0
            plain.append(_plain(start, step, size, count))
            continue
        if plain:
            yield _solid(plain)
            plain = []
        for begin, n in _short(start, step, size, count):
            extent, at = step * (n - 1) + size, 0
            while at < begin.size:
                fit = (K_SHARE_BYTES - near_bytes) // extent
                if not fit:
                    yield _near(near)
                    near, near_bytes = [], 0
                    continue
                some = begin[at : at + fit]
                near.append((some, Alike(some.size, step, size, n)))
                near_bytes += extent * some.size
                at += fit
    if near:
        yield _near(near)
    if plain:
        yield _solid(plain)


def pays(pieces: Strides) -> bool:
    """Whether copying by shares does: each change from run to run costs as much as some dozens of pieces."""
    return _is_close(pieces) or (_changes(pieces).size + 1) * K_PIECES_A_CHANGE <= pieces.n_pieces


def _is_close(pieces: Strides) -> bool:
    """Whether each run's pieces follow on."""
    return bool(((pieces.step == pieces.size) | (pieces.count == 1)).all())


def _changes(pieces: Strides) -> NDArray[np.int64]:
    """Runs that aren't like the one before."""
    other = np.zeros(pieces.start.size - 1, dtype=bool)
    for column in (pieces.step, pieces.size, pieces.count):
        other |= column[1:] != column[:-1]
    return np.flatnonzero(other) + 1


def _alike(pieces: Strides) -> Iterator[tuple[U64, int, int, int]]:
    """Neighbours of the same step, size and count: where each begins, and these."""
    columns = (pieces.step, pieces.size, pieces.count)
    first = np.concatenate(([0], _changes(pieces)))
    told = zip(first.tolist(), *(column[first].tolist() for column in columns), strict=True)
    ends = [*first[1:].tolist(), pieces.start.size]
    for (begin, step, size, count), end in zip(told, ends, strict=True):
        yield pieces.start[begin:end], step, size, count


def _short(start: U64, step: int, size: int, count: int) -> Iterator[tuple[U64, int]]:
    """Runs as runs of spans of at most K_SHARE_BYTES: where they begin, and their count."""
    most = (K_SHARE_BYTES - size) // step + 1
    if count <= most:
        yield start, count
        return
    whole, rest = divmod(count, most)
    parts = np.uint64(step * most) * np.arange(whole, dtype=np.uint64)
    for begin in start:
        yield begin + parts, most
        if rest:
            yield np.array([begin + np.uint64(step * most * whole)], dtype=np.uint64), rest


def _near(runs: list[tuple[U64, Alike]]) -> Share:
    spans = [rows(at, np.full(at.size, x.extent, dtype=np.uint64)) for at, x in runs]
    alike = [x for _, x in runs]
    payload_bytes = sum(x.n_runs * x.n_pieces * x.size for x in alike)
    every = np.concatenate(spans)
    return Share(every, alike, payload_bytes, int(every[:, 1].sum()))


def _plain(start: U64, step: int, size: int, count: int) -> U64:
    if count == 1 or step == size:
        return rows(start, np.full(start.size, size * count, dtype=np.uint64))
    each = start[:, np.newaxis] + np.uint64(step) * np.arange(count, dtype=np.uint64)
    return rows(each.reshape(-1), np.full(each.size, size, dtype=np.uint64))


def _solid(parts: list[U64]) -> Share:
    pieces = join_runs(np.concatenate(parts))
    n_bytes = int(pieces[:, 1].sum())
    return Share(pieces, [], n_bytes, n_bytes)


def _items(data: Bytes, size: int) -> NDArray[np.void]:
    return data.view(np.dtype((np.void, size)))


def _every(data: Bytes, size: int, step: int) -> NDArray[np.void]:
    """The items that begin a step apart, from the first byte to the last."""
    item = np.dtype((np.void, size))
    n = (data.size - size) // step + 1
    return np.ndarray(shape=(n,), dtype=item, buffer=data.data, strides=(step,))


def _anywhere(data: Bytes, size: int) -> NDArray[np.void]:
    """The item at each offset: they overlap, and pieces that don't are picked by offset."""
    item = np.dtype((np.void, size))
    return np.ndarray(shape=(data.size - size + 1,), dtype=item, buffer=data.data, strides=(1,))
