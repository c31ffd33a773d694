"""A server's memory, as its pump reads and writes it: process_vm_readv and process_vm_writev, as MPI's CMA
does.

The server's interpreter takes no part, so its loop isn't delayed, and a server that is stopped holds nobody
up. The kernel asks for the same user, and under Yama's ptrace_scope 1 for the server's leave (PR_SET_PTRACER,
which pump_client gives). Every copy is under a guard (pump_client/guard.py).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable
from functools import cache

import numpy as np

from prfaas.pump.spans import K_MOST_BYTES, Bytes, Spans, pays, shares
from prfaas.pump_client.guard import K_TABLE_BYTES, K_WORD
from prfaas.transfer.segments import U64, Ranges, Single
from prfaas.transfer.strides import Pieces, Strides

K_IOV_MAX = 1024
K_IOVECS = struct.Struct("=QQQQ")
"""One of ours and one of theirs."""
K_WRITABLE = 0x200
"""PyBUF_WRITE."""

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_writev = _libc.process_vm_writev
for _call in (_readv, _writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong
    ]  # fmt: skip
_memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.restype = ctypes.py_object
_memory_view.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]


class Withdrawn(Exception):
    """The guard was withdrawn: nothing was copied."""


class Gone(Exception):
    """The memory or its process isn't there any more."""


class Buffer:
    """A buffer of ours, page-aligned, with its address."""

    def __init__(self, size_bytes: int) -> None:
        self._map = mmap.mmap(-1, size_bytes)
        self.view = memoryview(self._map)
        self.bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.address = int(self.bytes.ctypes.data)


@cache
def _spare() -> Buffer:
    """For spans, one at a time."""
    return Buffer(K_MOST_BYTES)


def _at(address: int, size_bytes: int) -> Bytes:
    """Bytes of ours. (An array type of ctypes' would be made anew for each size.)"""
    return np.frombuffer(_memory_view(address, size_bytes, K_WRITABLE), dtype=np.uint8)


class OwnerMemory:
    """One attached server's memory."""

    def __init__(self, pid: int, guard_fd: int, pause_copy_s: float = 0.0) -> None:
        if os.fstat(guard_fd).st_size < K_TABLE_BYTES:
            raise Gone("the guard table is too short")
        self._pid = pid
        self._fd = guard_fd
        self._map = mmap.mmap(guard_fd, K_TABLE_BYTES, prot=mmap.PROT_READ)
        self._local = np.empty((1, 2), dtype=np.uint64)
        self._local_at = int(self._local.ctypes.data)
        self._iovecs = Buffer(K_IOVECS.size)
        self._pause_copy_s = pause_copy_s

    def probe(self, address: int, expected: bytes) -> str | None:
        """Why this process can't be read; None: it can."""
        buffer = Buffer(mmap.PAGESIZE)
        pieces = np.array([[address, len(expected)]], dtype=np.uint64)
        try:
            self._move(_readv, pieces, buffer.address)
        except Gone as error:
            return str(error)
        return (
            None if bytes(buffer.view[: len(expected)]) == expected else "another process answers at this id"
        )

    def read(self, guard: tuple[int, int], pieces: Pieces, address: int) -> None:
        """Gather pieces of the server's memory to ours. Raises Withdrawn or Gone."""
        if isinstance(pieces, Strides) and not pays(pieces):
            pieces = pieces.rows
        self._hold(guard)
        try:
            if isinstance(pieces, Single):
                self._move_one(_readv, pieces, address)
                return
            if isinstance(pieces, Strides):
                self._read_runs(pieces, address)
                return
            spans = self._spans(pieces)
            if spans is None:
                self._move(_readv, pieces, address)
            else:
                spans.gather(_spare().bytes[: spans.total_bytes], _at(address, int(pieces[:, 1].sum())))
        finally:
            self._release(guard)

    def write(
        self, guard: tuple[int, int], pieces: Pieces, address: int, alone: Ranges | None = None
    ) -> None:
        """Scatter bytes of ours to pieces of the server's memory; `alone`: where nobody else writes
        meanwhile, so that what lies between pieces may be written as it was. Raises Withdrawn (none written)
        or Gone.
        """
        if isinstance(pieces, Strides):
            between = alone is not None and alone.holds(pieces.spans)
            if not between or self._pause_copy_s or not pays(pieces):
                pieces, alone = pieces.rows, alone if between else None
        self._hold(guard)
        try:
            if isinstance(pieces, Single):
                self._move_one(_writev, pieces, address)
                return
            if isinstance(pieces, Strides):
                self._write_runs(pieces, address)
                return
            spans = self._spans(pieces, alone) if alone is not None else None
            if self._pause_copy_s and pieces.shape[0] > 1:
                half = pieces.shape[0] // 2
                self._move(_writev, pieces[:half], address)
                time.sleep(self._pause_copy_s)
                self._move(_writev, pieces[half:], address + int(pieces[:half, 1].sum()))
            elif spans is not None:
                spans.scatter(_at(address, int(pieces[:, 1].sum())), _spare().bytes[: spans.total_bytes])
                self._move(_writev, spans.rows, _spare().address)
            else:
                self._move(_writev, pieces, address)
        finally:
            self._release(guard)

    def _read_runs(self, pieces: Strides, address: int) -> None:
        for share in shares(pieces):
            if share.runs:
                self._move(_readv, share.rows, _spare().address)
                share.gather(_spare().bytes[: share.span_bytes], _at(address, share.payload_bytes))
            else:
                self._move(_readv, share.rows, address)
            address += share.payload_bytes

    def _write_runs(self, pieces: Strides, address: int) -> None:
        for share in shares(pieces):
            if share.runs:
                self._move(_readv, share.rows, _spare().address)
                share.scatter(_at(address, share.payload_bytes), _spare().bytes[: share.span_bytes])
                self._move(_writev, share.rows, _spare().address)
            else:
                self._move(_writev, share.rows, address)
            address += share.payload_bytes

    def _spans(self, pieces: U64, within: Ranges | None = None) -> Spans | None:
        """Spans that hold the pieces, read to the spare buffer; None where they don't pay or aren't `within`.
        Raises Gone.
        """
        spans = Spans.of(pieces)
        if spans is None or (within is not None and not within.holds(spans.rows)):
            return None
        self._move(_readv, spans.rows, _spare().address)
        return spans

    def _hold(self, guard: tuple[int, int]) -> None:
        slot, word = guard
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, K_WORD.size, slot * K_WORD.size)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise Withdrawn from None
        if K_WORD.unpack_from(self._map, slot * K_WORD.size)[0] != word:
            self._release(guard)
            raise Withdrawn

    def _release(self, guard: tuple[int, int]) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, K_WORD.size, guard[0] * K_WORD.size)

    def _move_one(self, call: Callable[..., int], piece: Single, address: int) -> None:
        K_IOVECS.pack_into(self._iovecs.view, 0, address, piece.size, *piece)
        self._moved(call(self._pid, self._iovecs.address, 1, self._iovecs.address + 16, 1, 0), piece.size)

    def _moved(self, got: int, want: int) -> None:
        if got != want:
            code = ctypes.get_errno() if got < 0 else errno.EFAULT
            raise Gone(f"memory of process {self._pid}: {os.strerror(code)}")

    def _move(self, call: Callable[..., int], pieces: U64, address: int) -> None:
        remote = np.ascontiguousarray(pieces)
        local, remote_at = self._local, int(remote.ctypes.data)
        for at in range(0, remote.shape[0], K_IOV_MAX):
            n = min(K_IOV_MAX, remote.shape[0] - at)
            want = int(remote[at : at + n, 1].sum())
            local[0, 0], local[0, 1] = address, want
            self._moved(call(self._pid, self._local_at, 1, remote_at + 16 * at, n, 0), want)
            address += want

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)
