"""How much the kernel holds unsent: little, unless a stream ran dry for want of us."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prfaas.transfer.slack import K_HALVES_S, K_LEAST_S, K_MOST_S, Slack


def test_it_begins_with_little():
    assert Slack().seconds(1000.0) == K_LEAST_S


def test_streams_that_run_dry_at_once_are_one_absence_and_each_absence_asks_for_more():
    slack, last_s = Slack(), K_LEAST_S
    for now in (10.0, 10.2, 10.4):
        # The first tells that every stream may hold more; who runs dry beside it has nothing new to tell.
        assert [slack.ran_dry(now + stream / 1000) for stream in range(4)] == [True, False, False, False]
        assert 1.4 * last_s < slack.seconds(now) < 1.6 * last_s
        last_s = slack.seconds(now)


def test_it_falls_again_to_what_it_began_with():
    slack = Slack()
    for i in range(20):
        slack.ran_dry(i / 10)
    assert slack.seconds(2.0) > 0.9 * K_MOST_S
    assert slack.seconds(2.0 + K_HALVES_S) < 0.55 * K_MOST_S
    assert slack.seconds(2.0 + 20 * K_HALVES_S) == K_LEAST_S


def test_an_absence_long_after_others_begins_from_what_is_left_of_them():
    slack = Slack()
    for i in range(20):
        slack.ran_dry(i / 10)
    slack.ran_dry(10_000.0)
    assert slack.seconds(10_000.0) < 2 * K_LEAST_S


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=50))
def test_whatever_happens_it_stays_between_its_bounds(happens):
    slack, now = Slack(), 0.0
    for later_s, dry in happens:
        now += later_s
        if dry:
            slack.ran_dry(now)
        assert K_LEAST_S <= slack.seconds(now) <= K_MOST_S
