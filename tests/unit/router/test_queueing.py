"""What a server has of ours in prefill, in seconds by prediction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.router.queueing import PrefillQueue


def test_what_is_worked_off_counts_from_when_the_server_began() -> None:
    queue = PrefillQueue()
    assert queue.backlog_s(5.0) == 0.0
    first = queue.add(2.0, 10.0)
    second = queue.add(1.0, 11.0)
    assert queue.backlog_s(11.5) == pytest.approx(1.5)
    # The first takes longer than predicted: no more than the longest can be done.
    assert queue.backlog_s(14.0) == pytest.approx(1.0)
    queue.remove(first, 14.0)
    assert queue.backlog_s(14.0) == pytest.approx(1.0)
    assert queue.backlog_s(14.75) == pytest.approx(0.25)
    queue.remove(second, 15.0)
    queue.remove(second, 15.0)
    assert (queue.backlog_s(15.0), len(queue)) == (0.0, 0)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 5), st.booleans()), max_size=30))
def test_a_backlog_is_never_more_than_what_is_there(steps: list[tuple[float, float, bool]]) -> None:
    queue, there, now = PrefillQueue(), {}, 0.0
    for prefill_s, passed_s, ends in steps:
        now += passed_s
        if ends and there:
            key = next(iter(there))
            del there[key]
            queue.remove(key, now)
        else:
            there[queue.add(prefill_s, now)] = prefill_s
        assert -1e-9 <= queue.backlog_s(now) <= sum(there.values()) + 1e-9
        assert len(queue) == len(there)
