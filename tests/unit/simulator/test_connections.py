"""Kept connections between a door and a server: which of them start slowly."""

from hypothesis import given
from hypothesis import strategies as st

from prfaas.router import pool
from prfaas.simulator.connections import K_COLD_BYTES, K_KEEP_ALIVE_S, Connections
from prfaas.simulator.flows import further_rounds

K_LONG = 640_000  # bytes: a prompt of 128K tokens


def test_they_are_kept_for_as_long_as_the_router_keeps_them() -> None:
    assert K_KEEP_ALIVE_S == pool.K_KEEP_ALIVE_S


def test_a_second_prompt_of_the_same_length_waits_for_no_window_unless_the_first_is_still_under_way() -> None:
    kept = Connections()
    rounds, window_bytes = kept.send(K_LONG, 0.0)
    assert rounds == further_rounds(K_LONG) == 5
    assert kept.send(K_LONG, 0.1)[0] == rounds  # a connection of its own
    kept.release(window_bytes, 1.0)
    assert kept.send(K_LONG, 1.1)[0] == 0


def test_one_that_rested_for_longer_than_it_is_kept_is_begun_anew_and_so_are_all_that_rest_longer() -> None:
    kept = Connections()
    for at_s in (0.0, 1.0):
        kept.release(kept.send(K_LONG, at_s)[1], at_s)
    kept.release(64 * K_COLD_BYTES, 1.0)
    late_s = 1.0 + K_KEEP_ALIVE_S + 0.1
    assert kept.send(K_LONG, late_s) == Connections().send(K_LONG, 0.0)
    assert kept.send(K_LONG, late_s) == Connections().send(K_LONG, 0.0)


@given(st.lists(st.integers(1, 1 << 24), min_size=1, max_size=20))
def test_a_window_never_shrinks_and_grows_by_what_was_sent_at_most(sizes: list[int]) -> None:
    kept, last_bytes = Connections(), K_COLD_BYTES
    for size in sizes:
        rounds, window_bytes = kept.send(size, 0.0)
        assert last_bytes <= window_bytes <= last_bytes + size
        assert rounds <= further_rounds(size)
        kept.release(window_bytes, 0.0)
        last_bytes = window_bytes
