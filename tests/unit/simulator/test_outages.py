"""How long streams, requests and doors wait for a link that is down, by the kernel's and the pump's times."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.config.router import Retry
from prfaas.simulator.outages import K_CONNECT_S, K_OPENING_RTTS, K_STALL_S, repeats_s, resumes_after_s
from prfaas.simulator.patience import patience_s


def test_a_stream_notices_a_short_outage_s_end_at_its_next_retransmission() -> None:
    """At 40 ms the time-out is 240 ms, then twice as long: 0.24 and 0.72 s after the last bytes."""
    assert resumes_after_s(0.1, 0.04) == (pytest.approx(0.24), False)
    assert resumes_after_s(0.3, 0.04) == (pytest.approx(0.72), False)


def test_streams_that_stall_for_too_long_are_replaced_by_one_that_the_pump_dials() -> None:
    opening_s = K_OPENING_RTTS * 0.04
    assert resumes_after_s(0.8, 0.04) == (pytest.approx(K_STALL_S + 0.05 + opening_s), True)
    # Its first packet was lost, and is sent again a second later.
    assert resumes_after_s(2.0, 0.04) == (pytest.approx(K_STALL_S + 1.05 + opening_s), True)


def test_a_pump_dials_again_after_a_pause_when_nobody_answered() -> None:
    after_s, anew = resumes_after_s(K_STALL_S + K_CONNECT_S, 0.04)
    assert anew
    assert after_s == pytest.approx(K_STALL_S + 0.05 + K_CONNECT_S + 0.1 + K_OPENING_RTTS * 0.04)


@given(down_s=st.floats(0, 300), rtt_s=st.floats(0, 0.6))
def test_streams_never_carry_before_the_link_does_and_soon_after(down_s: float, rtt_s: float) -> None:
    after_s, _ = resumes_after_s(down_s, rtt_s)
    assert after_s >= down_s
    # At worst just missed: the pump's stall, or a pause of a second after its last unanswered packet.
    assert after_s - down_s <= max(K_STALL_S, 8 * rtt_s) + 0.05 + K_OPENING_RTTS * rtt_s + 1.0


def test_a_request_is_sent_again_ever_later_on_a_kept_connection_and_each_second_on_a_new_one() -> None:
    kept = itertools.accumulate(itertools.islice(repeats_s(0.04, opening=False), 4))
    assert list(kept) == pytest.approx([0.24, 0.72, 1.68, 3.6])
    assert list(itertools.islice(repeats_s(0.04, opening=True), 6)) == [1, 1, 1, 1, 2, 4]


def test_a_door_waits_ten_seconds_or_four_times_what_was_predicted_but_not_beyond_its_own_limit() -> None:
    retry = Retry(total_s=60)
    assert patience_s(retry, 1.0, 0.0) == 10
    assert patience_s(retry, 5.0, 0.0) == 20
    assert patience_s(retry, 5.0, 45.0) == 15
    assert patience_s(retry, 5.0, 100.0) == 0.1
