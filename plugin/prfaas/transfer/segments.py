"""Scattered memory: lists of addresses and lengths, and memory that somebody may use.

An *iov* is an (n, 2) array of uint64, a row (address, length) each: the kernel's struct iovec, so that a
gather or a scatter of thousands of pieces is one system call. All checks are on whole arrays and hold for
addresses up to 2^64.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prfaas.model.errors import LocalProtocolError

U64 = NDArray[np.uint64]

K_TRANSFER_MAX_BYTES = 1 << 44


class Single(NamedTuple):
    """One piece, as most blocks are over a far link: arrays of one row cost several times what numbers do."""

    address: int
    size: int

    @property
    def rows(self) -> U64:
        return np.array([self], dtype=np.uint64)

    def fault(self) -> str | None:
        """As fault_of says it."""
        if not self.size:
            return "an empty piece"
        return "a piece past the end of memory" if self.address + self.size >> 64 else None


def as_u64(values: ArrayLike) -> U64:
    """Whole numbers from 0 to 2^64-1 as uint64. Raises LocalProtocolError for anything else."""
    if isinstance(values, np.ndarray) and values.dtype == np.uint64:
        return np.ascontiguousarray(values)
    try:
        array = np.asarray(values)
        if array.size == 0:
            return np.empty(0, np.uint64)
        if array.dtype.kind == "i" and bool((array < 0).any()):
            raise LocalProtocolError("a negative address or length")
        if array.dtype.kind not in "iu":
            # Mixed magnitudes near 2^63 make numpy choose floats or objects: take them one by one, exactly.
            return np.array([_exact(x) for x in values], dtype=np.uint64)  # type: ignore[union-attr]
        return np.ascontiguousarray(array, dtype=np.uint64)
    except (OverflowError, ValueError, TypeError) as error:
        raise LocalProtocolError(f"an address or length is no whole number below 2^64: {error}") from None


def _exact(value: object) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise LocalProtocolError(f"{value!r} is no address or length")
    return int(value)


def iov(addresses: ArrayLike, lengths: ArrayLike) -> U64:
    """Rows (address, length)."""
    a, n = as_u64(addresses), as_u64(lengths)
    if a.ndim != 1 or a.shape != n.shape:
        raise LocalProtocolError(f"{a.size} addresses and {n.size} lengths")
    return rows(a, n)


def rows(start: U64, length: U64) -> U64:
    """`iov`, of columns that are sound."""
    pieces = np.empty((start.size, 2), dtype=np.uint64)
    pieces[:, 0], pieces[:, 1] = start, length
    return pieces


def fault_of_iov(pieces: U64, *, overlap_is_fault: bool) -> str | None:
    """What is wrong with the pieces themselves: empty, past 2^64, or one over another. None: nothing."""
    return fault_of(pieces[:, 0], pieces[:, 1], overlap_is_fault=overlap_is_fault)


def fault_of(start: U64, length: U64, *, overlap_is_fault: bool) -> str | None:
    """By column: numpy takes a column of its own several times faster than one of rows."""
    if start.size == 0:
        return "no pieces"
    if start.size == 1:
        return Single(int(start[0]), int(length[0])).fault()
    if not length.min():
        return "an empty piece"
    end = start + length
    if bool((end < start).any()):
        return "a piece past the end of memory"
    if overlap_is_fault:
        if bool((start[1:] >= end[:-1]).all()):
            return None
        order = np.argsort(start, kind="stable")
        if bool((start[order][1:] < end[order][:-1]).any()):
            return "one piece over another"
    return None


class Ranges:
    """Memory somebody may use: a sorted set of ranges without overlap, joined where they touch."""

    def __init__(self, regions: Sequence[tuple[int, int]] | U64 = ()) -> None:
        self._regions: list[tuple[int, int]] = []
        self._start = np.empty(0, np.uint64)
        self._end = np.empty(0, np.uint64)
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.add(regions)

    def add(self, regions: Sequence[tuple[int, int]] | U64) -> None:
        """Add (address, length) rows; the same one may be added twice. Raises LocalProtocolError, changing
        nothing.
        """
        added = [(int(a), int(n)) for a, n in regions]
        for address, length in added:
            if address < 0 or length <= 0 or address + length > (1 << 64) - 1:
                raise LocalProtocolError(f"a region of {length} bytes at {address:#x}")
        self._regions += added
        self._join()

    def remove(self, addresses: Sequence[int]) -> None:
        """Forget the regions added at these addresses, each once for every time it is named; unknown ones are
        ignored.
        """
        left = list(self._regions)
        for address in addresses:
            for i, (a, _) in enumerate(left):
                if a == address:
                    del left[i]
                    break
        self._regions = left
        self._join()

    def _join(self) -> None:
        joined: list[list[int]] = []
        for address, length in sorted(self._regions):
            if joined and address <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], address + length)
            else:
                joined.append([address, address + length])
        self._starts, self._ends = [r[0] for r in joined], [r[1] for r in joined]
        self._start = np.array(self._starts, dtype=np.uint64)
        self._end = np.array(self._ends, dtype=np.uint64)

    @property
    def regions(self) -> list[tuple[int, int]]:
        return list(self._regions)

    @property
    def total_bytes(self) -> int:
        return int((self._end - self._start).sum())

    def holds_one(self, piece: Single) -> bool:
        where = bisect_right(self._starts, piece.address) - 1
        return where >= 0 and piece.address + piece.size <= self._ends[where]

    def holds(self, pieces: U64) -> bool:
        """Whether every piece (already free of faults) lies within one range."""
        return self.holds_columns(pieces[:, 0], pieces[:, 1])

    def holds_columns(self, start: U64, length: U64) -> bool:
        """`holds`, of addresses and lengths."""
        if self._start.size == 0:
            return False
        # Most often one range holds them all.
        first, end = start.min(), (start + length).max()
        where = int(np.searchsorted(self._start, first, side="right")) - 1
        if where >= 0 and bool(end <= self._end[where]):
            return True
        if where < 0 or self._start.size == 1:
            return False
        each = np.searchsorted(self._start, start, side="right").astype(np.int64) - 1
        return not bool((each < 0).any()) and bool((start + length <= self._end[each]).all())

    def holds_all(self, other: Ranges) -> bool:
        return other._start.size > 0 and self.holds(
            np.stack((other._start, other._end - other._start), axis=1)
        )
