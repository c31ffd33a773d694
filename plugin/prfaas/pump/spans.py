"""Many small pieces of memory as a few spans of it.

The kernel takes 0.3 us for each piece that it copies between processes, whatever its length: for the pieces
of 64 to 128 bytes that unequal tensor parallelism makes, twenty times the copying itself. Where the pieces
lie close together, what lies between them is copied with them, and the pieces are picked here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prfaas.transfer.segments import U64

K_GAP_BYTES = 1024
"""Most between two pieces of one span: more takes longer to copy, there and back, than a piece of its own.
Less than a page, so that a span can be read where its pieces can."""
K_LEAST_PIECES = 16
K_FEWER = 4
"""How many times fewer the spans must be than the pieces."""
K_MOST_BYTES = 8 << 20
"""Of all spans together."""

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
