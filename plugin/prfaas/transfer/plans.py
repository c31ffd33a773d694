"""A transfer's segments as blocks, fixed at the start so that a resent block is the same block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prfaas.model.errors import LocalProtocolError
from prfaas.transfer.frames import K_BLOCK_MAX_BYTES
from prfaas.transfer.segments import K_TRANSFER_MAX_BYTES, U64, Single, as_u64, fault_of, rows
from prfaas.transfer.strides import Pieces, StridedSegments

K_RUNS_MAX = 4096
"""Most rows in one block's table; with 16 bytes each it stays within K_TABLE_MAX_BYTES."""
K_PIECES_MAX = 65536
"""Most pieces in one block, where runs of them are one row each."""


@dataclass(frozen=True)
class Piece:
    """One block: the bytes it takes from the source, and where they go."""

    source: Pieces
    destination: Pieces
    payload_bytes: int


class Blocks(ABC):
    """Items of known lengths, one after the other, cut into blocks 0..n_blocks-1 of at most K_RUNS_MAX items
    each.
    """

    def __init__(self, item_bytes: U64, block_bytes: int) -> None:
        self._at = np.zeros(item_bytes.size + 1, dtype=np.int64)
        np.cumsum(item_bytes.view(np.int64), out=self._at[1:])
        self.total_bytes = int(self._at[-1])
        cut = self._cuts(min(block_bytes, K_BLOCK_MAX_BYTES))
        self.n_blocks = len(cut) - 1
        # Of each block: its bytes, its items, and what of the first and the last of them isn't its own.
        first = np.searchsorted(self._at, cut[:-1], side="right") - 1
        last = np.searchsorted(self._at, cut[1:], side="left")
        self._bytes: list[int] = (cut[1:] - cut[:-1]).tolist()
        self._first: list[int] = first.tolist()
        self._last: list[int] = last.tolist()
        self._skip: list[int] = (cut[:-1] - self._at[first]).tolist()
        self._spare: list[int] = (self._at[last] - cut[1:]).tolist()

    def _cuts(self, block_bytes: int) -> NDArray[np.int64]:
        """Offsets where blocks begin, and the total."""
        even = np.append(np.arange(0, self.total_bytes, block_bytes, dtype=np.int64), self.total_bytes)
        first = np.searchsorted(self._at, even[:-1], side="right")
        last = np.searchsorted(self._at, even[1:], side="left")
        if bool((last - first < K_RUNS_MAX).all()):
            return even
        cuts = [0]
        while cuts[-1] < self.total_bytes:
            here = int(np.searchsorted(self._at, cuts[-1], side="right")) - 1
            by_items = int(self._at[min(here + K_RUNS_MAX, len(self._at) - 1)])
            cuts.append(min(cuts[-1] + block_bytes, by_items))
        return np.array(cuts, dtype=np.int64)

    def block_bytes(self, block: int) -> int:
        return self._bytes[block]

    @abstractmethod
    def block(self, block: int) -> Piece: ...


class Plan(Blocks):
    """Blocks of segments that lie anywhere.

    Raises LocalProtocolError if the segments are at fault: empty, past the end of memory, destinations
    overlapping, arrays of different lengths.
    """

    def __init__(
        self, source: ArrayLike, destination: ArrayLike, length: ArrayLike, block_bytes: int
    ) -> None:
        src, dst, size = as_u64(source), as_u64(destination), as_u64(length)
        for name, start, overlap in (("source", src, False), ("destination", dst, True)):
            if start.ndim != 1 or start.shape != size.shape:
                raise LocalProtocolError(f"{name}: {start.size} addresses and {size.size} lengths")
            fault = fault_of(start, size, overlap_is_fault=overlap)
            if fault is not None:
                raise LocalProtocolError(f"{name}: {fault}")
        longest = int(size.max())
        if longest * size.size > K_TRANSFER_MAX_BYTES and (
            longest > K_TRANSFER_MAX_BYTES or float(size.sum(dtype=np.float64)) > float(K_TRANSFER_MAX_BYTES)
        ):
            raise LocalProtocolError(f"more than {K_TRANSFER_MAX_BYTES} bytes in one transfer")
        src_follows, dst_follows = _follows(src, size), _follows(dst, size)
        self._src_joins, self._dst_joins = bool(src_follows.any()), bool(dst_follows.any())
        if self._src_joins and self._dst_joins and bool((follows := src_follows & dst_follows).any()):
            # Neighbours that follow on at both ends become one segment.
            begin = np.flatnonzero(np.concatenate(([True], ~follows)))
            src, dst, size = src[begin], dst[begin], np.add.reduceat(size, begin)
            self._src_joins, self._dst_joins = (
                bool(_follows(src, size).any()),
                bool(_follows(dst, size).any()),
            )
        self._src, self._dst, self._size = src, dst, size
        super().__init__(size, block_bytes)

    @property
    def source(self) -> U64:
        return rows(self._src, self._size)

    @property
    def destination(self) -> U64:
        return rows(self._dst, self._size)

    def block(self, block: int) -> Piece:
        first, last = self._first[block], self._last[block]
        if last - first == 1:
            skip, size_bytes = self._skip[block], self._bytes[block]
            src_at, dst_at = int(self._src[first]) + skip, int(self._dst[first]) + skip
            return Piece(Single(src_at, size_bytes), Single(dst_at, size_bytes), size_bytes)
        size = self._size[first:last]
        src, dst = rows(self._src[first:last], size), rows(self._dst[first:last], size)
        skip, spare = self._skip[block], self._spare[block]
        if skip or spare:
            for part in (src, dst):
                part[0, 0] += skip
                part[0, 1] -= skip
                part[-1, 1] -= spare
        if self._src_joins:
            src = join_runs(src)
        if self._dst_joins:
            dst = join_runs(dst)
        return Piece(src, dst, self._bytes[block])


def _follows(start: U64, length: U64) -> NDArray[np.bool_]:
    """Of each piece but the first: whether it begins where the one before ends."""
    follows: NDArray[np.bool_] = start[1:] == start[:-1] + length[:-1]
    return follows


def join_runs(pieces: U64) -> U64:
    """Neighbours that follow on in memory as one run."""
    if pieces.shape[0] < 2:
        return pieces
    joined = pieces[1:, 0] == pieces[:-1, 0] + pieces[:-1, 1]
    if not bool(joined.any()):
        return pieces
    if bool(joined.all()):
        return np.array([[pieces[0, 0], pieces[:, 1].sum()]], dtype=np.uint64)
    begin = np.flatnonzero(np.concatenate(([True], ~joined)))
    return np.stack((pieces[begin, 0], np.add.reduceat(pieces[:, 1], begin)), axis=1)


class StridedPlan(Blocks):
    """Blocks of segments at equal distances: an item is a run of them."""

    def __init__(self, segments: StridedSegments, block_bytes: int) -> None:
        self._runs = segments.rows
        size, count = segments.size, segments.count
        most_bytes = K_PIECES_MAX * int(size.min())
        super().__init__(size * count, min(block_bytes, most_bytes))

    def block(self, block: int) -> Piece:
        first, last = self._first[block], self._last[block]
        skip, spare = self._skip[block], self._spare[block]
        if last - first == 1:
            parts = _part_of_run(self._runs[first], skip, spare)
        else:
            head, tail = self._runs[first], self._runs[last - 1]
            between = self._runs[first + 1 : last - 1]
            parts = np.concatenate((_part_of_run(head, skip, 0), between, _part_of_run(tail, 0, spare)))
        cut = StridedSegments(parts)
        return Piece(cut.source, cut.destination, self._bytes[block])


def _part_of_run(run: U64, skip: int, spare: int) -> U64:
    """A run without its first `skip` bytes and its last `spare` ones: pieces that are cut become runs of
    their own.
    """
    if not skip and not spare:
        return run[np.newaxis]
    src, dst, src_step, dst_step, size, count = run.tolist()
    first, begin = divmod(skip, size)
    last, end = divmod(size * count - spare, size)
    parts = []
    if first == last:
        parts.append((first, begin, end - begin, 1))
    else:
        if begin:
            parts.append((first, begin, size - begin, 1))
            first += 1
        if last > first:
            parts.append((first, 0, size, last - first))
        if end:
            parts.append((last, 0, end, 1))
    return np.array(
        [
            (src + src_step * i + at, dst + dst_step * i + at, src_step, dst_step, length, n)
            for i, at, length, n in parts
        ],
        dtype=np.uint64,
    )
