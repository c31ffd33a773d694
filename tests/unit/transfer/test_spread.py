"""The last blocks go where a window has room; a large backlog goes wherever a stream takes it."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from prfaas.pump import tcpinfo
from prfaas.transfer.spread import (
    K_BURST_BYTES,
    K_BURST_SHARE,
    K_LOOKS_S,
    K_PACE,
    K_WINDOWS,
    Allowance,
    by_room,
    little_left,
    room_bytes,
)


def test_little_is_left_below_one_window_of_all_streams():
    assert little_left(1, 1000)
    assert little_left(int(K_WINDOWS * 1000) - 1, 1000)
    assert not little_left(int(K_WINDOWS * 1000), 1000)
    assert not little_left(0, 1000)
    assert not little_left(10**9, 0)


def test_what_is_in_flight_or_waits_in_the_kernel_takes_room():
    window = {"cwnd_bytes": 100_000, "pacing_bytes_per_s": 1e12, "rtt_s": 0.04}
    assert room_bytes(**window, in_flight_bytes=0, unsent_bytes=0) == 100_000
    assert room_bytes(**window, in_flight_bytes=60_000, unsent_bytes=0) == 40_000
    assert room_bytes(**window, in_flight_bytes=100_000, unsent_bytes=20_000) == -20_000


def test_a_rate_driven_stream_is_bound_by_its_pace():
    room = room_bytes(
        cwnd_bytes=1_000_000, pacing_bytes_per_s=5e6, rtt_s=0.04, in_flight_bytes=50_000, unsent_bytes=0
    )
    assert room == 150_000


@given(st.dictionaries(st.integers(), st.integers(-(1 << 40), 1 << 40), max_size=64))
def test_the_most_room_comes_first_and_those_without_not_at_all(rooms):
    order = by_room(rooms)
    assert set(order) == {stream for stream, room in rooms.items() if room > 0}
    assert all(rooms[a] >= rooms[b] for a, b in itertools.pairwise(order))


@given(st.lists(st.floats(0, 0.01), min_size=20, max_size=200))
def test_blocks_are_handed_out_at_the_pace_whenever_the_loop_looks(pauses_s):
    allowance, now, handed = Allowance(), 100.0, 0
    for pause_s in pauses_s:
        allowance.refill(now, windows_bytes=1_000_000, rtt_s=0.04)
        while allowance.open:
            allowance.spent(65536)
            handed += 65536
        now += pause_s
    burst = min(K_BURST_BYTES, K_BURST_SHARE * 1_000_000)
    assert burst <= handed <= burst + 65536 + K_PACE * 25e6 * sum(pauses_s)


def test_an_allowance_does_not_pile_up_over_a_rest():
    fast = 100_000_000
    paced = int(K_PACE * fast / 0.04 * K_LOOKS_S)
    for windows_bytes, most in ((1 << 20, 1 << 18), (1 << 22, K_BURST_BYTES), (fast, paced)):
        allowance = Allowance()
        allowance.refill(0.0, windows_bytes, 0.04)
        allowance.refill(60.0, windows_bytes, 0.04)
        handed = 0
        while allowance.open:
            allowance.spent(16384)
            handed += 16384
        assert most <= handed < most + 16384


def test_a_pace_that_is_unknown_holds_nothing_back_after_any_pause():
    allowance = Allowance()
    allowance.refill(0.0, 0, 0.0)
    allowance.spent(10**9)
    allowance.refill(0.001, 0, 0.0)
    assert allowance.open


def test_the_kernels_words_are_read_where_they_lie():
    data = bytearray(256)
    for at, value in ((16, 1000), (24, 30), (28, 5), (32, 4), (36, 2), (68, 40_000), (80, 100), (144, 7000)):
        data[at : at + 4] = value.to_bytes(4, "little")
    data[104:112] = (10**9).to_bytes(8, "little")
    assert tcpinfo.parse_room(bytes(data)) == 100_000 - 23_000 - 7000


def test_the_kernels_word_on_who_was_the_limit_is_read_where_it_lies():
    data = bytearray(256)
    assert not tcpinfo.parse(bytes(data)).app_limited
    data[7] = 0b110  # fast open's bits beside it
    assert not tcpinfo.parse(bytes(data)).app_limited
    data[7] = 0b111
    assert tcpinfo.parse(bytes(data)).app_limited


@given(st.floats(1e5, 1e9), st.floats(0.004, 0.3))
def test_looks_2_ms_apart_keep_up_with_any_pace(windows_bytes, rtt_s):
    allowance, handed, block = Allowance(), 0, max(1024, int(windows_bytes / 1000))
    for look in range(50):
        allowance.refill(100 + 0.002 * look, int(windows_bytes), rtt_s)
        while allowance.open:
            allowance.spent(block)
            handed += block
    assert handed >= 0.95 * K_PACE * windows_bytes / rtt_s * 0.098
