"""What the ends of pool engines do alike: the pool, its bytes, and batches one after the other."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from prfaas_testbed.bench.host_loop import HostLoop, keep_off
from prfaas_testbed.bench.worker import Handler

K_POLL_S = 0.0005
K_PIECE_BYTES = 4096


class Pool:
    """Ordinary memory, all of it touched, so that no page fault is timed."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._map = mmap.mmap(-1, size_bytes)
        self.view = np.frombuffer(self._map, np.uint8)
        self.view[:] = 0
        self.base = int(self.view.ctypes.data)

    def fill(self, value: int) -> None:
        self.view[:] = value

    def holds(self, value: int, size_bytes: int) -> bool:
        """Whether each of the first bytes is `value`."""
        return bool((self.view[:size_bytes] == value).all())

    def landed(self, offsets: list[int], segment_bytes: int, value: int, limit_s: float) -> float | None:
        """When the first and last byte of every segment were `value`, on CLOCK_MONOTONIC; None: not in
        `limit_s`.
        """
        heads = np.array(offsets, dtype=np.int64)
        places = np.concatenate([heads, heads + segment_bytes - 1])
        give_up_s = time.perf_counter() + limit_s
        while not (self.view[places] == value).all():
            if time.perf_counter() > give_up_s:
                return None
            time.sleep(K_POLL_S)
        return time.perf_counter()

    def count(self, offsets: list[int], segment_bytes: int, value: int) -> tuple[float, int]:
        """How many bytes of the segments are `value`, and when, on CLOCK_MONOTONIC. A piece of K_PIECE_BYTES
        counts with its last byte: some engines have hundreds of segments on their way at once.
        """
        ends = np.append(np.arange(K_PIECE_BYTES, segment_bytes, K_PIECE_BYTES), segment_bytes)
        places = np.add.outer(np.array(offsets, dtype=np.int64), ends - 1)
        now_s = time.perf_counter()
        there = self.view[places] == value
        return now_s, int((there * np.diff(ends, prepend=0)).sum())


def move_batches(
    write: Callable[[list[int]], None],
    offsets: list[int],
    segment_bytes: int,
    batch_segments: int,
    total_bytes: int,
    limit_s: float,
) -> dict[str, Any]:
    """Batches one after the other, as SGLang's transfer worker sends them, until the bytes or the time are
    up.
    """
    batches = [offsets[at : at + batch_segments] for at in range(0, len(offsets), batch_segments)]
    calls_s: list[float] = []
    moved, used, began_s = 0, time.process_time(), time.perf_counter()
    while moved < total_bytes and time.perf_counter() - began_s < limit_s:
        batch = batches[len(calls_s) % len(batches)]
        called_s = time.perf_counter()
        write(batch)
        calls_s.append(time.perf_counter() - called_s)
        moved += len(batch) * segment_bytes
    ended_s = time.perf_counter()
    return {
        "bytes": moved,
        "began_s": began_s,
        "ended_s": ended_s,
        "cpu_s": time.process_time() - used,
        "calls_s": calls_s,
    }


def common_handlers(pool: Callable[[], Pool]) -> dict[str, Handler]:
    """What every end answers, whatever its engine."""
    loop = HostLoop()
    return {
        "fill": lambda value: pool().fill(value),
        "holds": lambda **arguments: pool().holds(**arguments),
        "count": lambda **arguments: pool().count(**arguments),
        "landed": lambda **arguments: pool().landed(**arguments),
        "cpu_s": time.process_time,
        "keep_off": keep_off,
        "loop_start": loop.start,
        "loop_stop": loop.stop,
    }
