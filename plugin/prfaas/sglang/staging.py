"""Host memory between a pump and caches that a pump can't reach: GPU memory.

The sender copies a chunk out of its pages into staging and sends from there; the receiver leases staging
instead of pages, laid out as the pages' pieces one after the other, tells the sender which is where, and
copies into the pages when all has landed. `Staging` hands out the memory and does the copies; `Places`
translates addresses.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prfaas.model.errors import LocalProtocolError, MachineError, RemoteProtocolError
from prfaas.sglang.planning import U64, Segments

K_ALIGN_BYTES = 256
K_PART_OF_POOL = 4
"""No transfer takes more than this part of the pool, so that several fit."""


class Places:
    """Where pieces of a peer's pages lie in its staging: rows (page address, length, staging address)."""

    def __init__(self, rows: U64) -> None:
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        self.rows = rows
        self._start, self._end, self._staging = rows[:, 0], rows[:, 0] + rows[:, 1], rows[:, 2]

    @classmethod
    def laid_out(cls, pieces: U64, staging: int) -> Places:
        """`pieces`, rows (address, length), one after the other from `staging` on."""
        before = np.concatenate(([0], np.cumsum(pieces[:-1, 1]))).astype(np.uint64)
        return cls(np.stack((pieces[:, 0], pieces[:, 1], np.uint64(staging) + before), axis=1))

    def translate(self, addresses: U64, lengths: U64) -> U64:
        """Staging addresses of what would go to pages. Raises LocalProtocolError for what no piece holds
        whole.
        """
        where = np.searchsorted(self._start, addresses, side="right").astype(np.int64) - 1
        if bool((where < 0).any()) or bool((addresses + lengths > self._end[where]).any()):
            raise LocalProtocolError("a destination outside of what the peer has leased")
        return self._staging[where] + (addresses - self._start[where])

    def to_bytes(self) -> bytes:
        return self.rows.astype("<u8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Places:
        """Raises RemoteProtocolError."""
        if not data or len(data) % 24:
            raise RemoteProtocolError(f"a table of places of {len(data)} bytes")
        return cls(np.frombuffer(data, dtype="<u8").reshape(-1, 3).astype(np.uint64))


@dataclass(frozen=True)
class Run:
    """Pieces of one length, each a step from the one before, in pages and in host memory."""

    page: int
    host: int
    length: int
    count: int = 1
    page_step: int = 0
    host_step: int = 0


def runs(pages: U64, lengths: U64, host: U64) -> Iterator[Run]:
    """The pieces, in order, as few runs. Slices for unequal tensor parallelism are a piece for each token,
    layer, K and V: a copy for each would take longer than their bytes."""
    n = int(lengths.size)
    page_steps, host_steps = (np.diff(one.view(np.int64)) for one in (pages, host))
    length = lengths.view(np.int64)
    alike = (length[1:] == length[:-1]) & (page_steps >= length[1:]) & (host_steps >= length[1:])
    goes_on = (
        alike[1:] & alike[:-1] & (page_steps[1:] == page_steps[:-1]) & (host_steps[1:] == host_steps[:-1])
    )
    begin = 0
    for last in [*(np.flatnonzero(~goes_on) + 1).tolist(), n - 1] if n else ():
        # Up to `last` all steps are one, but perhaps for the one from a piece that is done with.
        if begin == last and last < n - 1:
            continue
        one = Run(int(pages[begin]), int(host[begin]), int(length[begin]))
        if begin == last or not alike[begin]:
            yield one
            begin += 1
            if begin <= last == n - 1:
                yield Run(int(pages[last]), int(host[last]), int(length[last]))
            continue
        steps = {"page_step": int(page_steps[begin]), "host_step": int(host_steps[begin])}
        yield replace(one, count=last + 1 - begin, **steps)
        begin = last + 1


class Memory(ABC):
    """The memory that pages lie in."""

    @abstractmethod
    def adopt(self, address: int, size_bytes: int) -> None:
        """Make host memory fit for fast copies."""

    @abstractmethod
    def abandon(self, address: int) -> None:
        """What `adopt` did is undone: the memory may go, and other memory may be adopted where it was."""

    @abstractmethod
    def copy_out(self, pages: U64, lengths: U64, host: U64) -> None:
        """From pages to host memory; returns when it is there, after all that has been queued to write the
        pages.
        """

    @abstractmethod
    def copy_in(self, host: U64, lengths: U64, pages: U64) -> None:
        """From host memory to pages; returns when it is there."""


class HostMemory(Memory):
    """Pages in this process's own memory: staging isn't needed, and used only where it is asked for."""

    def adopt(self, address: int, size_bytes: int) -> None:
        pass

    def abandon(self, address: int) -> None:
        pass

    def copy_out(self, pages: U64, lengths: U64, host: U64) -> None:
        for run in runs(pages, lengths, host):
            _pieces(run.host, run, run.host_step)[:] = _pieces(run.page, run, run.page_step)

    def copy_in(self, host: U64, lengths: U64, pages: U64) -> None:
        self.copy_out(host, lengths, pages)


def _pieces(address: int, run: Run, step: int) -> NDArray[np.void]:
    return np.asarray(_HostArray(address, run.length, run.count, step))


class _HostArray:
    """Raw memory as numpy takes it in."""

    def __init__(self, address: int, length: int, count: int, step: int) -> None:
        self.__array_interface__ = {
            "shape": (count,),
            "typestr": f"|V{length}",
            "data": (address, False),
            "strides": (step,),
            "version": 3,
        }


class CudaMemory(Memory):
    """Pages on a GPU. Copies run on a stream of their own."""

    def __init__(self, gpu: int) -> None:
        import torch

        self._torch, self._gpu = torch, gpu
        self._stream = torch.cuda.Stream(device=gpu)
        self._host: Any = None
        self._host_address = 0

    def adopt(self, address: int, size_bytes: int) -> None:
        # Registered, not allocated, by CUDA: the pump reads ordinary memory of this process
        # (process_vm_readv).
        status = int(self._torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0))
        if status != 0:
            raise MachineError(f"{size_bytes} bytes of staging can't be pinned: CUDA error {status}")
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
        self._host, self._host_address = self._torch.from_numpy(array), address

    def abandon(self, address: int) -> None:
        self._torch.cuda.cudart().cudaHostUnregister(address)

    def copy_out(self, pages: U64, lengths: U64, host: U64) -> None:
        self._copy(pages, lengths, host, out=True)

    def copy_in(self, host: U64, lengths: U64, pages: U64) -> None:
        self._copy(pages, lengths, host, out=False)

    def _copy(self, pages: U64, lengths: U64, host: U64, out: bool) -> None:
        torch = self._torch
        with torch.cuda.device(self._gpu), torch.cuda.stream(self._stream):
            for run in runs(pages, lengths, host):
                shape, begin = (run.count, run.length), run.host - self._host_address
                here = self._host.as_strided(shape, (run.host_step or run.length, 1), begin)
                there = torch.as_tensor(_CudaArray(run), device=f"cuda:{self._gpu}")
                (here if out else there).copy_(there if out else here, non_blocking=True)
        self._stream.synchronize()


class _CudaArray:
    """A run's pages as torch takes raw GPU memory in."""

    def __init__(self, run: Run) -> None:
        self.__cuda_array_interface__ = {
            "shape": (run.count, run.length),
            "typestr": "|u1",
            "data": (run.page, False),
            "strides": (run.page_step or run.length, 1),
            "version": 3,
        }


class Staging:
    """A region of host memory, handed out first fit; thread-safe."""

    def __init__(self, size_bytes: int, memory: Memory) -> None:
        self.size_bytes, self.memory = size_bytes, memory
        self._map = mmap.mmap(-1, size_bytes)
        self.address = int(np.frombuffer(self._map, dtype=np.uint8).ctypes.data)
        memory.adopt(self.address, size_bytes)
        self._free: list[tuple[int, int]] = [(0, size_bytes)]
        self._taken: dict[int, int] = {}
        self._changed = threading.Condition()

    def close(self) -> None:
        """Nothing is copied from here on. The region itself stays as long as this object: whoever may still
        hold an address of it reads memory that is there."""
        self.memory.abandon(self.address)

    @property
    def free_bytes(self) -> int:
        with self._changed:
            return sum(length for _, length in self._free)

    def take(self, size_bytes: int, timeout_s: float = 0.0) -> int | None:
        """Address of that much memory; None if it hasn't become free in time. Raises LocalProtocolError when
        there never is so much."""
        wanted = -(-max(size_bytes, 1) // K_ALIGN_BYTES) * K_ALIGN_BYTES
        if wanted > self.size_bytes:
            raise LocalProtocolError(f"{size_bytes} bytes of staging wanted, there are {self.size_bytes}")
        with self._changed:
            found = self._fit(wanted)
            if found is None and timeout_s > 0:
                self._changed.wait_for(lambda: self._fits(wanted), timeout_s)
                found = self._fit(wanted)
            if found is None:
                return None
            self._taken[found] = wanted
            return self.address + found

    def _fits(self, wanted: int) -> bool:
        return any(length >= wanted for _, length in self._free)

    def _fit(self, wanted: int) -> int | None:
        for i, (offset, length) in enumerate(self._free):
            if length >= wanted:
                self._free[i : i + 1] = [(offset + wanted, length - wanted)] if length > wanted else []
                return offset
        return None

    def give(self, address: int) -> None:
        """Give back what `take` gave. Raises KeyError for anything else, so nothing is given back twice."""
        with self._changed:
            offset = address - self.address
            insort(self._free, (offset, self._taken.pop(offset)))
            joined: list[tuple[int, int]] = []
            for begin, length in self._free:
                if joined and joined[-1][0] + joined[-1][1] == begin:
                    joined[-1] = (joined[-1][0], joined[-1][1] + length)
                else:
                    joined.append((begin, length))
            self._free = joined
            self._changed.notify_all()

    def copy_out(self, segments: Segments, staging: int) -> Segments:
        """The segments' bytes in staging, one after the other; the same segments from there."""
        before = np.concatenate(([0], np.cumsum(segments.length[:-1]))).astype(np.uint64)
        host = np.uint64(staging) + before
        self.memory.copy_out(segments.source, segments.length, host)
        return Segments(host, segments.destination, segments.length)

    def copy_in(self, places: Places) -> None:
        """All pieces from staging to the pages they stand for."""
        rows = places.rows
        self.memory.copy_in(rows[:, 2], rows[:, 1], rows[:, 0])

    def parts(self, segments: Segments) -> Iterator[Segments]:
        """The segments in parts that each fit a share of the pool; a segment that is longer alone is cut."""
        most = self.size_bytes // K_PART_OF_POOL // K_ALIGN_BYTES * K_ALIGN_BYTES
        cut = cut_long(segments, most)
        end, begin, done = np.cumsum(cut.length), 0, 0
        while begin < len(cut):
            stop = int(np.searchsorted(end, np.uint64(done + most), side="right"))
            yield Segments(cut.source[begin:stop], cut.destination[begin:stop], cut.length[begin:stop])
            begin, done = stop, int(end[stop - 1])


def cut_long(segments: Segments, most: int) -> Segments:
    """The same bytes with no segment longer than `most`."""
    if not len(segments) or int(segments.length.max()) <= most:
        return segments
    pieces = -(-segments.length.astype(np.int64) // most)
    which = np.repeat(np.arange(len(segments)), pieces)
    nth = np.arange(which.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    skip = (nth * most).astype(np.uint64)
    left = segments.length[which] - skip
    length = np.minimum(left, np.uint64(most))
    return Segments(segments.source[which] + skip, segments.destination[which] + skip, length)
