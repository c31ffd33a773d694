"""Seconds without anything to send are counted once, and only while there was nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.transfer.starving import Starving


def test_it_starves_from_the_start_until_there_is_work() -> None:
    starving = Starving(10.0)
    starving.look(True, 10.5)
    assert starving.take_s(11.0) == pytest.approx(0.5)
    assert starving.take_s(12.0) == 0


def test_what_was_handed_over_lasts_a_while() -> None:
    starving = Starving(0.0)
    starving.look(True, 0.0)
    starving.look(False, 1.0, lasts_s=0.06)
    starving.look(False, 1.01, lasts_s=9.0)  # it counts from when the last was handed over
    starving.look(True, 1.1)
    assert starving.take_s(2.0) == pytest.approx(0.04)


def test_more_comes_before_what_was_handed_over_is_out() -> None:
    starving = Starving(0.0)
    starving.look(True, 0.0)
    starving.look(False, 1.0, lasts_s=0.06)
    starving.look(True, 1.05)
    assert starving.take_s(2.0) == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["work", "none", "take"]), st.floats(0, 1), st.floats(0, 1)), max_size=40
    )
)
def test_the_seconds_add_up_to_no_more_than_passed_and_to_all_without_work(
    steps: list[tuple[str, float, float]],
) -> None:
    starving, idle = Starving(0.0), Starving(0.0)
    now = total = before = without = 0.0
    has_work = False
    for what, step_s, lasts_s in steps:
        without += 0.0 if has_work else step_s
        now += step_s
        if what == "take":
            taken = starving.take_s(now)
            assert 0 <= taken <= now - before + 1e-9
            total, before = total + taken, now
        else:
            has_work = what == "work"
            starving.look(has_work, now, lasts_s)
    total += starving.take_s(now)
    assert total <= without + 1e-9
    assert idle.take_s(now) == pytest.approx(now)
