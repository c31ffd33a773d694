"""The number of streams: grows while loss costs goodput, and only as long as growing helps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.transfer.streams import K_CALM_S, K_LOSS, StreamCount, block_bytes_for


def drive(
    count: StreamCount,
    seconds: float,
    per_stream_bps: float | Callable[[float], float],
    link_bps: float,
    loss: float | Callable[[float], float],
    rtt_s: float = 0.04,
    queue_s: float = 0.02,
    late_s: float = 0.0,
    **more: object,
):
    """Each stream carries `per_stream_bps` (as `loss`, one or one at each time) until the link is full; then
    packets wait `queue_s`. Answers come `late_s` after the shortest round trip.
    """
    now = acked = sent = lost = 0.0
    history = []
    loss_at = loss if callable(loss) else lambda _: loss
    stream_bps_at = per_stream_bps if callable(per_stream_bps) else lambda _: per_stream_bps
    while now < seconds:
        stream_bps = stream_bps_at(now)
        waits = queue_s if count.wanted * stream_bps >= link_bps else 0.0
        count.observe(
            now, open_streams=count.wanted, acked_bytes=int(acked), sent_bytes=int(sent),
            retransmitted_bytes=int(lost), rtt_s=rtt_s + late_s + waits, backlogged=True, min_rtt_s=rtt_s,
            **more,
        )  # fmt: skip
        rate = min(link_bps, count.wanted * stream_bps) / 8 * 0.25
        p = loss_at(now)
        now, acked, sent, lost = now + 0.25, acked + rate, sent + rate * (1 + p), lost + rate * p
        history.append(count.wanted)
    return history


def test_without_loss_the_number_stays():
    assert drive(StreamCount(2, 64), 20, 200e6, 200e6, 0.0, rtt_s=0.005)[-1] == 2
    assert drive(StreamCount(2, 64), 20, 200e6, 200e6, 0.0)[-1] == 8


def test_random_loss_brings_streams_until_the_link_is_full_within_seconds():
    history = drive(StreamCount(2, 64), 6, 4e6, 200e6, 0.01)
    assert history[-1] * 4e6 >= 200e6 or history[-1] == 64


def test_a_far_link_with_thin_loss_has_what_it_needs_within_three_steps():
    history = drive(StreamCount(2, 64), 3, 6e6, 95e6, 0.001, rtt_s=0.08, queue_s=0.04)
    assert history[-1] == 16


def test_many_streams_grow_by_half_and_end_near_what_the_link_needs():
    history = drive(StreamCount(2, 64), 10, 7e6, 190e6, 0.001)
    assert sorted(set(history)) == [8, 16, 24, 36]


def test_what_slow_start_alone_has_filled_gets_its_streams_as_soon_as_it_is_seen_to_fall():
    """24 Mbit/s a stream at first, 6 from the fifth second on: 32 are needed; ten round trips are 1.5 s."""
    history = drive(
        StreamCount(2, 64), 10, lambda now: 24e6 if now < 5 else 6e6, 190e6, 0.001, rtt_s=0.15, queue_s=0.04
    )
    assert history[int(5 / 0.25)] == 8
    assert history[int(6 / 0.25)] == 16
    assert history[-1] >= 32


def test_a_link_that_has_become_slower_and_loses_without_a_queue_gets_two_steps_and_no_more():
    count = StreamCount(2, 64)
    drive(count, 5, 24e6, 190e6, 0.001, rtt_s=0.15, queue_s=0.04)
    assert max(drive(count, 14, 24e6, 50e6, 0.001, rtt_s=0.15, queue_s=0.0)) <= 24


def test_loss_of_the_links_own_queue_does_not_bring_streams():
    assert drive(StreamCount(2, 64), 60, 200e6, 200e6, 0.001)[-1] == 8
    assert drive(StreamCount(2, 64), 60, 200e6, 200e6, 0.03, rtt_s=0.005)[-1] == 2


def test_loss_without_a_queue_that_more_streams_do_not_mend_ends_after_two_steps():
    history = drive(StreamCount(2, 64), 14, 200e6, 200e6, 0.001, rtt_s=0.005, queue_s=0.0)
    assert history[-1] == 8


def test_streams_that_a_loss_brought_go_when_it_has_passed_down_to_what_the_path_began_with():
    history = drive(StreamCount(2, 64), 200, 4e6, 200e6, lambda now: 0.01 if now < 20 else 0.0)
    assert max(history) * 4e6 >= 200e6
    assert history[-1] == 8
    falls = [i for i, (a, b) in enumerate(itertools.pairwise(history)) if b < a]
    assert len(falls) > 2, "by steps, so that what they were needed for would show"
    assert all((b - a) * 0.25 >= K_CALM_S for a, b in itertools.pairwise(falls))


def test_streams_that_random_loss_needs_stay_for_as_long_as_it_lasts():
    history = drive(StreamCount(2, 64), 600, 2.5e6, 200e6, 0.01)
    assert history[-1] == 64
    assert history == sorted(history)


def test_loss_that_comes_by_turns_keeps_its_streams():
    """Five seconds without any loss, then five with it: what it needs isn't taken away in between."""
    history = drive(StreamCount(2, 64), 300, 2.5e6, 200e6, lambda now: 0.01 if now % 10 < 5 else 0.0)
    assert history[-1] == 64
    assert history == sorted(history)


def test_streams_that_went_come_back_within_seconds_when_loss_does():
    history = drive(
        StreamCount(2, 64), 110, 2.5e6, 200e6, lambda now: 0.0 if 10 < now < 100 else 0.01, queue_s=0.0
    )
    assert history[int(99 / 0.25)] <= 12
    assert history[-1] >= 36


def test_a_short_path_gets_no_streams_however_late_a_busy_machine_answers():
    late = drive(StreamCount(4, 64), 60, 1e9, 20e9, 0.003, rtt_s=0.0001, queue_s=0.0, late_s=0.0025)
    assert set(late) == {4}


def test_a_short_path_keeps_no_more_streams_than_it_began_with_whatever_it_loses():
    count = StreamCount(4, 64)
    count.wanted = 64
    assert drive(count, 200, 1e9, 20e9, 0.003, rtt_s=0.0001, queue_s=0.0)[-1] == 4


@given(
    loss=st.lists(st.sampled_from([0.0, K_LOSS / 2, 1e-3, 1e-2]), min_size=1, max_size=60),
    minimum=st.integers(1, 16),
    more=st.integers(0, 64),
    rtt_s=st.sampled_from([0.0001, 0.005, 0.04, 0.15]),
)
def test_whatever_is_lost_when_the_number_stays_within_its_bounds_and_falls_without_loss_alone(
    loss, minimum, more, rtt_s
):
    """Each loss for five seconds."""
    count = StreamCount(minimum, minimum + more)
    history = drive(count, 5 * len(loss), 3e6, 200e6, lambda now: loss[int(now // 5)], rtt_s=rtt_s)
    assert all(minimum <= n <= minimum + more for n in history)
    for i, (a, b) in enumerate(itertools.pairwise(history)):
        if b < a and rtt_s > 0.002:
            assert max(loss[int(max(0, i * 0.25 - 10) // 5) : int(i * 0.25 // 5) + 1]) < K_LOSS


def test_rate_driven_streams_stay_few_whatever_is_lost():
    assert max(drive(StreamCount(2, 64), 30, 4e6, 200e6, 0.02, rate_driven=True)) == 4


def test_a_number_that_is_prescribed_is_kept():
    assert set(drive(StreamCount(3, 3), 30, 4e6, 200e6, 0.02)) == {3}


def test_the_number_is_bounded():
    assert max(drive(StreamCount(2, 16), 30, 1e6, 1e9, 0.02)) == 16


def test_an_idle_link_changes_nothing():
    count = StreamCount(3, 64)
    for i in range(100):
        count.observe(
            i / 4,
            open_streams=3,
            acked_bytes=0,
            sent_bytes=0,
            retransmitted_bytes=0,
            rtt_s=0.005,
            backlogged=False,
        )
    assert count.wanted == 3


@pytest.mark.parametrize(
    ("rate_bps", "rtt_s", "wanted"),
    [
        (0, 0.0001, 1 << 20),
        (0, 0.04, 65536),
        (0, None, 65536),
        (3e6, 0.04, 16384),
        (1e8, 0.04, 131072),
        (1e10, 0.0001, 1 << 20),
    ],
)
def test_a_block_takes_about_20_ms_of_its_stream(rate_bps, rtt_s, wanted):
    assert block_bytes_for(rate_bps, rtt_s, 1 << 20) == wanted
