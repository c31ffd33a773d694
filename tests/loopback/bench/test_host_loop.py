"""How late a busy loop runs, and why: threads and processes that really compete with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from prfaas_testbed.bench.host_loop import HostLoop, keep_off

K_SECONDS = 0.6


@contextmanager
def loop_on(core: int) -> Iterator[dict[str, float]]:
    """A loop that runs meanwhile; what it found is there afterwards."""
    loop, found = HostLoop(), {}
    loop.start(core)
    try:
        yield found
    finally:
        found.update(loop.stop())


def a_core() -> int:
    if not os.path.exists("/proc/thread-self/schedstat"):
        pytest.skip("the kernel doesn't count what a thread waits for a core")
    return min(os.sched_getaffinity(0))


def test_a_core_taken_away_is_told_apart() -> None:
    core = a_core()
    program = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program]) as rival:
        try:
            with loop_on(core) as found:
                time.sleep(K_SECONDS)
        finally:
            rival.kill()
    assert found["own_p99_ms"] < 0.7 * found["p99_ms"]


def test_the_interpreter_lock_held_by_another_thread_is_the_process_own() -> None:
    cores, core = os.sched_getaffinity(0), a_core()
    if len(cores) < 2:
        pytest.skip("one core: whoever holds the lock has the core as well")

    held_ms: list[float] = []

    def hold() -> None:
        for _ in range(3):
            before_s = time.thread_time()
            sum(range(1 << 23))  # in one go: nobody else has the interpreter meanwhile
            held_ms.append((time.thread_time() - before_s) * 1e3)

    rival = threading.Thread(target=hold)
    try:
        with loop_on(core) as found:
            keep_off(core)
            rival.start()
            rival.join()
    finally:
        os.sched_setaffinity(0, cores)
    # The loop stood still all the while; that it also had to wait for a core then isn't for sure.
    assert found["own_max_ms"] > min(held_ms) / 2


def test_other_threads_leave_the_loops_core_to_it() -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    core, ended = min(cores), threading.Event()
    rest = threading.Thread(target=ended.wait)
    rest.start()
    try:
        keep_off(core)
        with loop_on(core):
            time.sleep(0.05)
            where = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
        assert where.count({core}) == 1
        assert sum(core in one for one in where) == 1
    finally:
        ended.set()
        rest.join()
        os.sched_setaffinity(0, cores)
