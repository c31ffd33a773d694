"""A busy Python loop inside a process that also transfers, as SGLang's scheduler is, and how late it runs.

Each round does a fixed amount of interpreter work, about a millisecond. What a round takes beyond the quiet
rounds of the same loop is delay: the interpreter lock held by others, or a core taken away. The kernel tells
the two apart: it counts for each thread how long it was ready to run and had no core.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np

K_ROUND_S = 1e-3
K_SLOW_S = 1.25 * K_ROUND_S
"""Of a round: what it waited for a core is asked for."""


class HostLoop:
    """Runs the loop in a thread of its own, from `start` to `stop`."""

    def __init__(self) -> None:
        self._begun, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._rounds_s: list[float] = []
        self._waits_s: list[float] = []
        self._size = 0
        """Of a round: the same in all that are compared."""

    def start(self, core: int | None = None) -> None:
        """Returns when it runs. `core`: what the loop keeps to; the process's other threads stay
        as they are.
        """
        self._core = core
        self._begun.clear()
        self._stopping.clear()
        self._rounds_s, self._waits_s = [], []
        self._thread = threading.Thread(target=self._run, name="host-loop", daemon=True)
        self._thread.start()
        self._begun.wait()

    def stop(self) -> dict[str, Any]:
        """Quantiles of a round's time in milliseconds, and how many rounds there were. `own_p99_ms` and
        `own_max_ms`: of the time without what it waited for a core; None where the kernel doesn't say.
        """
        assert self._thread is not None, "the loop isn't running"
        self._stopping.set()
        self._thread.join()
        rounds_ms = np.array(self._rounds_s) * 1e3
        names = {"p50": 50, "p90": 90, "p99": 99, "p999": 99.9}
        quantiles = {f"{name}_ms": float(np.percentile(rounds_ms, at)) for name, at in names.items()}
        own_ms = rounds_ms - np.array(self._waits_s) * 1e3
        told = not np.isnan(own_ms).any()
        return {
            **quantiles,
            "max_ms": float(rounds_ms.max()),
            "rounds": len(self._rounds_s),
            "own_p99_ms": float(np.percentile(own_ms, 99)) if told else None,
            "own_max_ms": float(own_ms.max()) if told else None,
        }

    def _run(self) -> None:
        if self._core is not None:
            os.sched_setaffinity(threading.get_native_id(), {self._core})
        if not self._size:
            self._size = _rounds_size()
        size = self._size
        clock, stopping, rounds_s, waits_s = time.perf_counter, self._stopping, self._rounds_s, self._waits_s
        waiting = _Waiting()
        before, waited_s = clock(), waiting.so_far_s()
        self._begun.set()
        while not (rounds_s and stopping.is_set()):
            _work(size)
            now = clock()
            rounds_s.append(now - before)
            if now - before > K_SLOW_S:
                # Only then: reading it gives the interpreter's lock away, and who does that every millisecond
                # has it back before any other thread has woken up.
                now_waited_s = waiting.so_far_s()
                waits_s.append(min(now - before, now_waited_s - waited_s))
                waited_s = now_waited_s
            else:
                waits_s.append(0.0)
            before = now
        waiting.close()


class _Waiting:
    """How long this thread has been ready to run without a core; NaN where the kernel doesn't count it."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._fd = -1

    def so_far_s(self) -> float:
        return int(os.pread(self._fd, 128, 0).split()[1]) * 1e-9 if self._fd >= 0 else float("nan")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def keep_off(core: int) -> None:
    """All threads of this process leave the core to the loop, wherever that runs."""
    for thread in os.listdir("/proc/self/task"):
        try:
            others = os.sched_getaffinity(int(thread)) - {core}
            if others:
                os.sched_setaffinity(int(thread), others)
        except OSError:
            continue  # it has just ended


def _work(size: int) -> int:
    total = 0
    for value in range(size):
        total += value & 7
    return total


def _rounds_size() -> int:
    """How many steps take about K_ROUND_S: the best of several tries by this thread's own processor time, for
    on a busy machine none may have a core to itself.
    """
    best = min(_timed(20_000) for _ in range(20))
    return max(1000, int(20_000 * K_ROUND_S / best))


def _timed(size: int) -> float:
    before = time.thread_time()
    _work(size)
    return time.thread_time() - before
