"""A door that decides at each start: what it has in time, and that it never beats who knows what comes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas.planner import Job, Resources, clairvoyant_bound
from prfaas_testbed.claim.starts import at_each_start


def job(arrival_s: float, deadline_s: float, local_s: float, prfaas_s: float = 9.0) -> Job:
    return Job(arrival_s, deadline_s, local_s, prfaas_s, 0.0)


def test_the_long_one_gives_way_to_two_short_ones_that_came_after_it() -> None:
    # The instance is busy until 1; of what waits then, two fit before their deadlines without the long one.
    busy = job(0.0, 1.0, 1.0)
    long, short, other = job(0.1, 4.0, 3.0), job(0.5, 3.5, 1.0), job(0.6, 3.6, 1.0)
    assert at_each_start([busy, long, short, other], 1, 0) == 3 / 4
    # Bound when it came, the long one would have made both late.
    assert at_each_start([busy, long], 1, 0) == 1.0


def test_what_is_late_anyway_starts_where_nobody_else_waits() -> None:
    hopeless, next_one = job(0.0, 0.5, 1.0), job(0.1, 5.0, 1.0)
    assert at_each_start([hopeless, next_one], 1, 0) == 1 / 2
    # It isn't preempted: who comes meanwhile waits for its end.
    assert at_each_start([hopeless, job(0.1, 1.9, 1.0)], 1, 0) == 0.0


def test_an_instance_is_taken_that_is_in_time() -> None:
    assert at_each_start([job(0.0, 1.0, 2.0, 0.9)], 1, 1) == 1.0
    assert at_each_start([job(0.0, 1.0, 2.0, 1.1)], 1, 1) == 0.0
    with pytest.raises(ValueError, match="nothing to play"):
        at_each_start([], 1, 1)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.floats(0.05, 4), st.floats(0.05, 4), st.floats(0.1, 5)),
        min_size=1, max_size=25,
    ),
    st.integers(1, 3),
    st.integers(0, 2),
)  # fmt: skip
def test_it_never_has_more_than_who_knows_what_comes(
    found: list[tuple[float, float, float, float]], local: int, far: int
) -> None:
    jobs = [Job(at_s, at_s + left_s, local_s, far_s, 0.0) for at_s, local_s, far_s, left_s in found]
    bound = clairvoyant_bound(jobs, Resources(local, far, 1e12), bin_s=0.25)
    assert at_each_start(jobs, local, far) <= bound.share + 1e-6
