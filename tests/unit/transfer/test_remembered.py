"""The last of many are known, and no more is held for them however many come."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.transfer.remembered import Remembered


@given(most=st.integers(2, 40), keys=st.lists(st.integers(0, 60), max_size=300))
def test_the_last_half_is_always_known_and_never_more_than_the_most(most: int, keys: list[int]) -> None:
    held: Remembered[int, int] = Remembered(most)
    for place, key in enumerate(keys):
        held.put(key, place)
        assert len(held) <= most
        last = dict.fromkeys(reversed(keys[: place + 1]))
        for recent in list(last)[: most // 2]:
            assert recent in held
            assert held.get(recent) == max(i for i, k in enumerate(keys[: place + 1]) if k == recent)
    assert all(held.get(key) is None for key in range(61) if key not in held)


def test_once_filled_it_takes_no_more_memory_however_many_come() -> None:
    """Not for a moment either: what a table is made anew of, beside the one before, stays the process's."""
    most, peaks = 8192, []
    tracemalloc.start()
    try:
        held: Remembered[int, None] = Remembered(most)
        for first in range(0, 12 * most, 2 * most):
            for key in range(first, first + 2 * most):
                held.put((1 << 40) + key, None)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    finally:
        tracemalloc.stop()
    assert max(peaks[1:]) < peaks[0] + 10_000


def test_fewer_than_two_are_no_memory() -> None:
    with pytest.raises(ValueError, match="at least two"):
        Remembered(1)
