"""Pieces at equal distances, told by run: with unequal tensor parallelism a slice of each token, thousands of
them as far from each other as tokens are.

A run is its first address, the step from each piece to the next, their size and their count: a few bytes
where rows take 16 for each piece, which for pieces of 64 bytes cost more than the bytes themselves. A run's
pieces rise and never overlap, and its *span* is all from its first byte to its last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prfaas.model.errors import LocalProtocolError
from prfaas.transfer.segments import K_TRANSFER_MAX_BYTES, U64, Ranges, Single, as_u64, fault_of, rows

K_LEAST_PIECES = 64
"""With fewer in all, rows are as good."""
K_LEAST_MEAN_PIECES = 8
"""With fewer in a run, too."""
K_MOST_SIZE_BYTES = 4096
"""Of larger pieces rows cost little."""
K_STEP_MAX = (1 << 32) - 1
K_SEGMENTS_MAX = 1 << 24
"""Most pieces of one transfer."""
K_COLUMNS = 6


@dataclass(frozen=True)
class Strides:
    """Runs at one end."""

    start: U64
    step: U64
    size: U64
    count: U64

    @property
    def n_pieces(self) -> int:
        return int(self.count.sum())

    @property
    def total_bytes(self) -> int:
        return int((self.size * self.count).sum())

    @property
    def spans(self) -> U64:
        """Rows (address, length)."""
        return rows(self.start, _extent(self.step, self.size, self.count))

    @property
    def rows(self) -> U64:
        """Each piece, (address, length)."""
        return rows(_each(self.start, self.step, self.count), np.repeat(self.size, self.count.view(np.int64)))

    def fault(self, *, overlap_is_fault: bool) -> str | None:
        """What is wrong with the runs themselves. `overlap_is_fault`: runs through one another are one, too,
        though their pieces may lie clear.
        """
        if not self.start.size:
            return "no pieces"
        if not self.count.min() or not self.size.min():
            return "an empty piece"
        if int(self.count.max()) > K_SEGMENTS_MAX or self.n_pieces > K_SEGMENTS_MAX:
            return f"more than {K_SEGMENTS_MAX} pieces"
        if int(self.size.max()) > K_TRANSFER_MAX_BYTES or int(self.step.max()) > K_STEP_MAX:
            return "too long a piece or a step"
        if bool(((self.step < self.size) & (self.count > 1)).any()):
            return "one piece over another"
        # No step, size or count is so large now that an extent would wrap round.
        spans = self.spans
        return fault_of(spans[:, 0], spans[:, 1], overlap_is_fault=overlap_is_fault)


Pieces = U64 | Strides | Single
"""Where bytes lie: rows (address, length), or runs, or one piece."""


def rows_of(pieces: Pieces) -> U64:
    """Each piece, (address, length)."""
    return pieces if isinstance(pieces, np.ndarray) else pieces.rows


def payload_bytes(pieces: Pieces) -> int:
    if isinstance(pieces, Single):
        return pieces.size
    return pieces.total_bytes if isinstance(pieces, Strides) else int(pieces[:, 1].sum())


def holds(ranges: Ranges, pieces: Pieces) -> bool:
    """Whether every piece (already free of faults) lies within one range."""
    if isinstance(pieces, Single):
        return ranges.holds_one(pieces)
    if not isinstance(pieces, Strides):
        return ranges.holds(pieces)
    # What lies between pieces may be somebody else's.
    return ranges.holds(pieces.spans) or ranges.holds(pieces.rows)


@dataclass(frozen=True)
class StridedSegments:
    """Runs from a source to a destination: rows (source, destination, step there, step here, size, count) as
    they are told to a pump. [runs, K_COLUMNS].
    """

    rows: U64

    @classmethod
    def found(cls, source: U64, destination: U64, size: U64) -> StridedSegments | None:
        """The segments as runs; None where that is no gain, or something is at fault."""
        n = size.size
        if not (n >= K_LEAST_PIECES and source.shape == destination.shape == size.shape == (n,)):
            return None
        if int(size.max()) > K_MOST_SIZE_BYTES:
            return None
        src_step, dst_step = source[1:] - source[:-1], destination[1:] - destination[:-1]
        goes_on = (src_step[1:] == src_step[:-1]) & (dst_step[1:] == dst_step[:-1])
        alike = size[1:] == size[:-1]
        if not alike.all():
            goes_on &= alike[1:] & alike[:-1]
        breaks = np.flatnonzero(~goes_on)
        # Between two runs lies a step of its own.
        if (breaks.size + 1) * K_LEAST_MEAN_PIECES > 2 * n:
            return None
        heads = _heads(np.concatenate(([0], breaks + 1)), np.append(breaks, n - 2))
        count = np.diff(np.append(heads, n)).astype(np.uint64)
        at = np.minimum(heads, n - 2)
        found = np.stack(
            (source[heads], destination[heads], src_step[at], dst_step[at], size[heads], count), axis=1
        )
        alone = count == 1
        found[alone, 2:4] = found[alone, 4:5]
        close = (found[:, 2] == found[:, 4]) & (found[:, 3] == found[:, 4])
        found[close, 4] *= found[close, 5]
        found[close, 2:4] = np.minimum(found[close, 4:5], K_STEP_MAX)
        found[close, 5] = 1
        segments = cls(found)
        return segments if segments.fault() is None else None

    @classmethod
    def from_bytes(cls, data: bytes) -> StridedSegments:
        """Inverse of to_bytes. Raises LocalProtocolError for runs that are at fault."""
        if not data or len(data) % (8 * K_COLUMNS):
            raise LocalProtocolError(f"{len(data)} bytes of runs")
        segments = cls(np.frombuffer(data, dtype="<u8").astype(np.uint64).reshape(-1, K_COLUMNS))
        fault = segments.fault()
        if fault is not None:
            raise LocalProtocolError(fault)
        return segments

    def to_bytes(self) -> bytes:
        return self.rows.astype("<u8").tobytes()

    @property
    def size(self) -> U64:
        return self.rows[:, 4].copy()

    @property
    def count(self) -> U64:
        return self.rows[:, 5].copy()

    @property
    def source(self) -> Strides:
        return Strides(self.rows[:, 0], self.rows[:, 2], self.size, self.count)

    @property
    def destination(self) -> Strides:
        return Strides(self.rows[:, 1], self.rows[:, 3], self.size, self.count)

    def columns(self) -> tuple[U64, U64, U64]:
        """Source, destination and length of each segment."""
        src, dst = self.source.rows, self.destination.rows
        return src[:, 0].copy(), dst[:, 0].copy(), src[:, 1].copy()

    def fault(self) -> str | None:
        for name, end, overlap in (("source", self.source, False), ("destination", self.destination, True)):
            fault = end.fault(overlap_is_fault=overlap)
            if fault is not None:
                return f"{name}: {fault}"
        if float((self.size * self.count).sum(dtype=np.float64)) > float(K_TRANSFER_MAX_BYTES):
            return f"more than {K_TRANSFER_MAX_BYTES} bytes in one transfer"
        return None


def segments_told(
    sources: ArrayLike, destinations: ArrayLike, lengths: ArrayLike
) -> tuple[bytes, bytes, bytes, bytes]:
    """Segments as a server tells them to its pump: their columns, or instead of them their runs. Raises
    LocalProtocolError for what is no address or length.
    """
    src, dst, size = as_u64(sources), as_u64(destinations), as_u64(lengths)
    runs = StridedSegments.found(src, dst, size)
    if runs is not None:
        return b"", b"", b"", runs.to_bytes()
    return src.tobytes(), dst.tobytes(), size.tobytes(), b""


def _heads(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each run's first piece. `first`, `last`: groups of equal steps, of which the i-th leads from piece i to
    the next.

    A group of several is a run; a step alone leads from a run, or from a piece alone, to the next.
    """
    several = last > first
    after_run = np.concatenate(([False], several[:-1]))
    heads = first[several | ~after_run]
    return heads if several[-1] else np.append(heads, last[-1] + 1)


def _extent(step: U64, size: U64, count: U64) -> U64:
    extent: U64 = step * (count - np.uint64(1)) + size
    return extent


def _each(start: U64, step: U64, count: U64) -> U64:
    """Each piece's address."""
    n = count.view(np.int64)
    within = np.arange(int(n.sum()), dtype=np.int64) - np.repeat(np.cumsum(n) - n, n)
    each: U64 = np.repeat(start, n) + np.repeat(step, n) * within.view(np.uint64)
    return each
