"""Scattered memory: lists of (source, destination, length), cut into blocks, and the tables that blocks
carry.

An *iov* is an (n, 2) array of uint64, a row (address, length) each: the kernel's struct iovec, so that a
gather or a scatter of thousands of pieces is one system call. All checks are on whole arrays and hold for
addresses up to 2^64.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prfaas.model.errors import LocalProtocolError, RemoteProtocolError
from prfaas.transfer.frames import K_BLOCK_MAX_BYTES

U64 = NDArray[np.uint64]

K_RUNS_MAX = 4096
"""Most pieces in one block; with 16 bytes each a table stays within K_TABLE_MAX_BYTES."""
K_TRANSFER_MAX_BYTES = 1 << 44
K_TABLE = struct.Struct("<BIQ")
K_SIZE = struct.Struct("<I")
K_EQUAL_LENGTHS, K_EQUAL_STRIDES, K_WIDE = 1, 2, 4


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
    return _rows(a, n)


def _rows(start: U64, length: U64) -> U64:
    pieces = np.empty((start.size, 2), dtype=np.uint64)
    pieces[:, 0], pieces[:, 1] = start, length
    return pieces


def fault_of_iov(pieces: U64, *, overlap_is_fault: bool) -> str | None:
    """What is wrong with the pieces themselves: empty, past 2^64, or one over another. None: nothing."""
    return _fault_of(pieces[:, 0], pieces[:, 1], overlap_is_fault=overlap_is_fault)


def _fault_of(start: U64, length: U64, *, overlap_is_fault: bool) -> str | None:
    """By column: numpy takes a column of its own several times faster than one of rows."""
    if start.size == 0:
        return "no pieces"
    if start.size == 1:
        address, size = int(start[0]), int(length[0])
        return (
            "an empty piece"
            if not size
            else "a piece past the end of memory"
            if address + size >> 64
            else None
        )
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
        self.add(regions)

    def add(self, regions: Sequence[tuple[int, int]] | U64) -> None:
        """Add (address, length) rows; the same one may be added twice. Raises LocalProtocolError, changing
        nothing.
        """
        rows = [(int(a), int(n)) for a, n in regions]
        for address, length in rows:
            if address < 0 or length <= 0 or address + length > (1 << 64) - 1:
                raise LocalProtocolError(f"a region of {length} bytes at {address:#x}")
        self._regions += rows
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
        self._start = np.array([r[0] for r in joined], dtype=np.uint64)
        self._end = np.array([r[1] for r in joined], dtype=np.uint64)

    @property
    def regions(self) -> list[tuple[int, int]]:
        return list(self._regions)

    @property
    def total_bytes(self) -> int:
        return int((self._end - self._start).sum())

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


@dataclass(frozen=True)
class Piece:
    """One block: the bytes it takes from the source, and where they go."""

    source: U64
    destination: U64
    payload_bytes: int


class Plan:
    """A transfer's segments as blocks 0..n_blocks-1, fixed at the start so that a resent block is the same
    block.

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
            fault = _fault_of(start, size, overlap_is_fault=overlap)
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
        self._at = np.zeros(size.size + 1, dtype=np.int64)
        np.cumsum(size.view(np.int64), out=self._at[1:])
        self.total_bytes = int(self._at[-1])
        cut = self._cuts(min(block_bytes, K_BLOCK_MAX_BYTES))
        self.n_blocks = len(cut) - 1
        # Of each block: its bytes, its segments, and what of the first and the last of them isn't its own.
        first = np.searchsorted(self._at, cut[:-1], side="right") - 1
        last = np.searchsorted(self._at, cut[1:], side="left")
        self._bytes: list[int] = (cut[1:] - cut[:-1]).tolist()
        self._first: list[int] = first.tolist()
        self._last: list[int] = last.tolist()
        self._skip: list[int] = (cut[:-1] - self._at[first]).tolist()
        self._spare: list[int] = (self._at[last] - cut[1:]).tolist()

    @property
    def source(self) -> U64:
        return _rows(self._src, self._size)

    @property
    def destination(self) -> U64:
        return _rows(self._dst, self._size)

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
            by_pieces = int(self._at[min(here + K_RUNS_MAX, len(self._at) - 1)])
            cuts.append(min(cuts[-1] + block_bytes, by_pieces))
        return np.array(cuts, dtype=np.int64)

    def block_bytes(self, block: int) -> int:
        return self._bytes[block]

    def block(self, block: int) -> Piece:
        first, last = self._first[block], self._last[block]
        size = self._size[first:last]
        src, dst = _rows(self._src[first:last], size), _rows(self._dst[first:last], size)
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


def encode_table(pieces: U64, version: int) -> bytes:
    """Where a block's bytes go. Version 1: the iov as it is. Version 2: equal lengths and strides once, else
    4 bytes.
    """
    if version < 2:
        return pieces.tobytes()
    n = pieces.shape[0]
    if n == 1:
        address, size = pieces[0].tolist()
        return K_TABLE.pack(K_EQUAL_LENGTHS, 1, address) + K_SIZE.pack(size)
    starts, lengths = pieces[:, 0], pieces[:, 1]
    steps = (starts[1:] - starts[:-1]).view(np.int64)
    mode, parts = 0, []
    if bool((lengths == lengths[0]).all()):
        mode |= K_EQUAL_LENGTHS
        parts.append(lengths[:1].astype("<u4").tobytes())
    else:
        parts.append(lengths.astype("<u4").tobytes())
    if n > 1 and bool((steps == steps[0]).all()):
        mode |= K_EQUAL_STRIDES
        parts.append(steps[:1].astype("<i8").tobytes())
    elif n > 1:
        wide = bool((steps != steps.astype(np.int32)).any())
        mode |= K_WIDE if wide else 0
        parts.append(steps.astype("<i8" if wide else "<i4").tobytes())
    return K_TABLE.pack(mode, n, int(starts[0])) + b"".join(parts)


def decode_table(table: bytes | bytearray | memoryview, version: int, payload_bytes: int) -> U64:
    """Inverse of encode_table. Raises RemoteProtocolError unless the pieces add up to the payload, none of
    them empty, none past the end of memory, none over another.
    """
    start, length = _decode_plain(table) if version < 2 else _decode_compact(table)
    # Of at most K_RUNS_MAX lengths below 2^32 the sum is exact, so none is longer than the payload.
    if int(length.sum()) != payload_bytes:
        raise RemoteProtocolError("a table that doesn't add up to its payload")
    fault = _fault_of(start, length, overlap_is_fault=True)
    if fault is not None:
        raise RemoteProtocolError(f"a table with {fault}")
    return _rows(start, length)


def _decode_plain(table: bytes | bytearray | memoryview) -> tuple[U64, U64]:
    if not table or len(table) % 16 or len(table) > 16 * K_RUNS_MAX:
        raise RemoteProtocolError(f"a table of {len(table)} bytes")
    pieces = np.frombuffer(table, dtype="<u8").reshape(-1, 2).astype(np.uint64)
    if bool((pieces[:, 1] > K_BLOCK_MAX_BYTES).any()):
        raise RemoteProtocolError("a piece longer than a block")
    return pieces[:, 0], pieces[:, 1]


def _decode_compact(table: bytes | bytearray | memoryview) -> tuple[U64, U64]:
    if len(table) < K_TABLE.size:
        raise RemoteProtocolError(f"a table of {len(table)} bytes")
    mode, n, base = K_TABLE.unpack_from(table)
    if not 0 < n <= K_RUNS_MAX or mode & ~7:
        raise RemoteProtocolError(f"a table of {n} pieces, mode {mode}")
    n_lengths = 1 if mode & K_EQUAL_LENGTHS else n
    n_steps = 0 if n == 1 else 1 if mode & K_EQUAL_STRIDES else n - 1
    step = "<i8" if mode & (K_EQUAL_STRIDES | K_WIDE) else "<i4"
    steps_at = K_TABLE.size + 4 * n_lengths
    if len(table) != steps_at + n_steps * int(step[-1]):
        raise RemoteProtocolError(f"a table of {len(table)} bytes for {n} pieces")
    length = np.empty(n, dtype=np.uint64)
    length[:] = np.frombuffer(table, dtype="<u4", count=n_lengths, offset=K_TABLE.size)
    steps = np.frombuffer(table, dtype=step, count=n_steps, offset=steps_at).astype(np.int64).view(np.uint64)
    # Addresses are modulo 2^64, as the encoder's differences are; a wrap is found by the overlap check.
    if n_steps == 1:
        return np.uint64(base) + steps * np.arange(n, dtype=np.uint64), length
    start = np.full(n, base, dtype=np.uint64)
    start[1:] += np.cumsum(steps, dtype=np.uint64)
    return start, length
