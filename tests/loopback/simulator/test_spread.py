"""Several sweeps in one process, and results that are long: neither meddles with what isn't its own."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from prfaas.simulator.sweep import spread


def test_the_end_of_a_sweep_ends_no_process_but_its_own() -> None:
    first = spread(time.sleep, [0, 600, 600], workers=2)
    next(first)
    second = spread(time.sleep, [0, 1, 0, 1], workers=2)
    next(second)
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(2,))
    other.start()
    first.close()
    assert len(list(second)) == 3
    other.join()
    assert other.exitcode == 0


def test_a_long_result_is_never_half_way_in_the_pipe_that_all_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from half_sent import result_of

    assert [len(one) for one in spread(result_of, [10, 1_000_000, 10], workers=2)] == [10, 1_000_000, 10]
