"""The tables that blocks carry: where a block's bytes go."""

from __future__ import annotations

import struct

import numpy as np

from prfaas.model.errors import LocalProtocolError, RemoteProtocolError
from prfaas.transfer.frames import K_BLOCK_MAX_BYTES
from prfaas.transfer.plans import K_PIECES_MAX, K_RUNS_MAX
from prfaas.transfer.segments import U64, Single, fault_of, rows
from prfaas.transfer.strides import Pieces, Strides

K_TABLE = struct.Struct("<BIQ")
K_ONE = struct.Struct("<BIQI")
"""A whole table of one piece, from version 2 on; no other has as many bytes."""
K_PLAIN_ROW = struct.Struct("<QQ")
K_EQUAL_LENGTHS, K_EQUAL_STRIDES, K_WIDE, K_STRIDES = 1, 2, 4, 8
K_STRIDES_TABLE = struct.Struct("<BI")
K_STRIDES_ROW = np.dtype([("start", "<u8"), ("step", "<u4"), ("size", "<u4"), ("count", "<u4")])
K_STRIDES_VERSION = 3
"""The first whose tables may tell runs of pieces at equal distances."""


def encode_table(pieces: Pieces, version: int) -> bytes:
    """Where a block's bytes go. Version 1: the iov as it is. Version 2: equal lengths and strides once, else
    4 bytes. Version 3: runs, too.

    Raises LocalProtocolError for runs of more pieces than an older version can tell.
    """
    if isinstance(pieces, Strides):
        if version >= K_STRIDES_VERSION:
            return _encode_strides(pieces)
        if pieces.n_pieces > K_RUNS_MAX:
            raise LocalProtocolError(
                f"a block of {pieces.n_pieces} pieces, and version {version} knows blocks of {K_RUNS_MAX}"
            )
        pieces = pieces.rows
    if isinstance(pieces, Single):
        return K_PLAIN_ROW.pack(*pieces) if version < 2 else K_ONE.pack(K_EQUAL_LENGTHS, 1, *pieces)
    if version < 2:
        return pieces.tobytes()
    n = pieces.shape[0]
    if n == 1:
        return encode_table(Single(*pieces[0].tolist()), version)
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


def _encode_strides(pieces: Strides) -> bytes:
    table = np.empty(pieces.start.size, K_STRIDES_ROW)
    for name in ("start", "step", "size", "count"):
        table[name] = getattr(pieces, name)
    return K_STRIDES_TABLE.pack(K_STRIDES, table.size) + table.tobytes()


def decode_table(table: bytes | bytearray | memoryview, version: int, payload_bytes: int) -> Pieces:
    """Inverse of encode_table. Raises RemoteProtocolError unless the pieces add up to the payload, none of
    them empty, none past the end of memory, none over another; nor any run through another.
    """
    if version >= K_STRIDES_VERSION and table and table[0] == K_STRIDES:
        return _decode_strides(table, payload_bytes)
    if version >= 2 and len(table) == K_ONE.size:
        return _decode_one(table, payload_bytes)
    start, length = _decode_plain(table) if version < 2 else _decode_compact(table)
    # Of at most K_RUNS_MAX lengths below 2^32 the sum is exact, so none is longer than the payload.
    if int(length.sum()) != payload_bytes:
        raise RemoteProtocolError("a table that doesn't add up to its payload")
    fault = fault_of(start, length, overlap_is_fault=True)
    if fault is not None:
        raise RemoteProtocolError(f"a table with {fault}")
    return rows(start, length)


def _decode_strides(table: bytes | bytearray | memoryview, payload_bytes: int) -> Strides:
    n = K_STRIDES_TABLE.unpack_from(table)[1] if len(table) >= K_STRIDES_TABLE.size else 0
    if not 0 < n <= K_RUNS_MAX or len(table) != K_STRIDES_TABLE.size + n * K_STRIDES_ROW.itemsize:
        raise RemoteProtocolError(f"a table of {len(table)} bytes for {n} runs")
    told = np.frombuffer(table, K_STRIDES_ROW, offset=K_STRIDES_TABLE.size)
    pieces = Strides(*(told[name].astype(np.uint64) for name in ("start", "step", "size", "count")))
    # Of K_RUNS_MAX counts below 2^32 the sum is exact; of sizes below 2^32, so often, the bytes are too.
    if pieces.n_pieces > K_PIECES_MAX:
        raise RemoteProtocolError(f"a table of {pieces.n_pieces} pieces")
    if pieces.total_bytes != payload_bytes:
        raise RemoteProtocolError("a table that doesn't add up to its payload")
    fault = pieces.fault(overlap_is_fault=True)
    if fault is not None:
        raise RemoteProtocolError(f"a table with {fault}")
    return pieces


def _decode_one(table: bytes | bytearray | memoryview, payload_bytes: int) -> Single:
    mode, n, address, size = K_ONE.unpack(table)
    if n != 1 or mode & ~7:
        raise RemoteProtocolError(f"a table of {n} pieces, mode {mode}")
    piece = Single(address, size)
    if size != payload_bytes:
        raise RemoteProtocolError("a table that doesn't add up to its payload")
    fault = piece.fault()
    if fault is not None:
        raise RemoteProtocolError(f"a table with {fault}")
    return piece


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
