"""Kept connections between a door and a server: which of them start slowly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.router import pool
from prfaas.simulator.connections import K_COLD_BYTES, K_KEEP_ALIVE_S, Connections
from prfaas.simulator.flows import further_rounds

K_LONG = 640_000  # bytes: a prompt of 128K tokens
K_RTT_S = 0.02


def test_they_are_kept_for_as_long_as_the_router_keeps_them() -> None:
    assert K_KEEP_ALIVE_S == pool.K_KEEP_ALIVE_S


def test_a_second_prompt_of_the_same_length_waits_for_no_window_unless_the_first_is_still_under_way() -> None:
    kept = Connections()
    wait_s, window_bytes = kept.send(K_LONG, 0.0, K_RTT_S)
    assert wait_s == further_rounds(K_LONG) * K_RTT_S == 5 * K_RTT_S
    assert kept.send(K_LONG, 0.1, K_RTT_S)[0] == wait_s  # a connection of its own
    kept.release(window_bytes, 1.0)
    assert kept.send(K_LONG, 1.1, K_RTT_S)[0] == 0


def test_one_that_rested_for_longer_than_it_is_kept_is_begun_anew_and_so_are_all_that_rest_longer() -> None:
    kept = Connections()
    for at_s in (0.0, 1.0):
        kept.release(kept.send(K_LONG, at_s, K_RTT_S)[1], at_s)
    kept.release(64 * K_COLD_BYTES, 1.0)
    late_s = 1.0 + K_KEEP_ALIVE_S + 0.1
    for _ in range(2):
        assert kept.send(K_LONG, late_s, K_RTT_S) == Connections().send(K_LONG, 0.0, K_RTT_S)


@pytest.mark.parametrize(
    ("rtt_s", "loss", "size", "kept", "measured_s"),
    [
        (0.02, 0.01, 49_000, False, 0.041), (0.02, 0.01, 160_000, False, 0.091),
        (0.02, 0.01, 49_000, True, 0.034), (0.02, 0.01, 160_000, True, 0.060),
        (0.02, 0.01, 640_000, True, 0.732), (0.01, 0.01, 640_000, True, 0.388),
        (0.04, 0.001, 160_000, False, 0.119), (0.04, 0.001, 160_000, True, 0.048),
    ],
)  # fmt: skip
def test_a_prompt_over_a_link_that_loses_packets_waits_for_about_what_was_measured(
    rtt_s: float, loss: float, size: int, kept: bool, measured_s: float
) -> None:
    """Means of 15 single CUBIC connections over the emulated link, the bytes' own time off."""
    connections = Connections()
    wait_s, window_bytes = connections.send(size, 0.0, rtt_s, loss)
    if kept:
        connections.release(window_bytes, 0.0)
        wait_s, _ = connections.send(size, 0.0, rtt_s, loss)
    assert wait_s == pytest.approx(measured_s, rel=0.2, abs=1.5 * rtt_s)


def test_a_short_prompt_waits_for_little_more_than_what_of_it_is_lost_on_average() -> None:
    wait_s, _ = Connections().send(8 * 1448, 0.0, K_RTT_S, 0.01)
    assert wait_s == pytest.approx((1 - 0.99**8) * K_RTT_S, rel=0.02)  # and seldom twice


@given(
    st.lists(st.integers(1, 1 << 24), min_size=1, max_size=20),
    st.sampled_from((0.0, 1e-6, 1e-3, 0.1)),
)
def test_a_window_never_shrinks_but_by_loss_and_grows_by_what_was_sent_at_most(
    sizes: list[int], loss: float
) -> None:
    kept, last_bytes = Connections(), K_COLD_BYTES
    for size in sizes:
        clean_s = further_rounds(size, last_bytes) * K_RTT_S
        wait_s, window_bytes = kept.send(size, 0.0, K_RTT_S, loss)
        assert window_bytes <= last_bytes + size
        assert wait_s >= clean_s if loss else wait_s == clean_s
        assert loss or last_bytes <= window_bytes
        kept.release(window_bytes, 0.0)
        last_bytes = window_bytes
