from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.profiles import Curve, DecodeProfile, Profile, ProfileError

K_PREFILL = Curve((1000.0, 2000.0, 4000.0), (1.0, 1.5, 3.5), "prefill_s")
K_KV = Curve((1000.0, 4000.0), (5000.0, 14000.0), "kv_bytes")


def test_a_curve_interpolates_and_continues_with_the_end_segments_slopes() -> None:
    assert K_PREFILL(1000) == 1.0
    assert K_PREFILL(1500) == pytest.approx(1.25)
    assert K_PREFILL(3000) == pytest.approx(2.5)
    assert K_PREFILL(4000) == 3.5
    assert K_PREFILL(6000) == pytest.approx(5.5)  # slope 0.001 of the last segment
    assert K_PREFILL(0) == pytest.approx(0.5)  # slope 0.0005 of the first
    assert K_PREFILL.covers(1000)
    assert K_PREFILL.covers(4000)
    assert not K_PREFILL.covers(999)
    assert not K_PREFILL.covers(4001)


def test_a_steep_first_segment_never_continues_to_negative_times() -> None:
    steep = Curve((1000.0, 2000.0), (1.0, 4.0))  # its line crosses zero at 667
    assert steep(667) == pytest.approx(0.667)  # the straight line to the origin instead
    assert steep(0) == 0.0


def test_one_point_is_a_line_through_the_origin() -> None:
    assert Curve((500.0,), (2.0,))(1500) == pytest.approx(6.0)
    assert Curve((500.0,), (2.0,))(250) == pytest.approx(1.0)


@given(
    st.lists(st.tuples(st.floats(1, 1e5), st.floats(0, 1e3)), min_size=1, max_size=6),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
)
def test_a_curve_never_falls_and_is_never_negative(
    steps: list[tuple[float, float]], a: float, b: float
) -> None:
    x, y = [], []
    at_x, at_y = 0.0, 0.001
    for dx, dy in steps:
        at_x, at_y = at_x + dx, at_y + dy
        x.append(at_x)
        y.append(at_y)
    curve = Curve(tuple(x), tuple(y))
    low, high = sorted((a, b))
    assert 0 <= curve(low) <= curve(high) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize(
    ("x", "y", "name", "problem"),
    [
        ((), (), "tokens", "at least one point"),
        ((1.0, 2.0), (1.0,), "prefill_s", "1 values for 2 points"),
        ((0.0,), (1.0,), "tokens", "above 0"),
        ((1.0, 1.0), (1.0, 2.0), "tokens", "greater than the one before"),
        ((1.0, 2.0), (2.0, 1.0), "prefill_s", "falls from 2 at 1 to 1 at 2"),
        ((1.0,), (-3.0,), "prefill_s", "found -3"),
        ((1.0,), (float("nan"),), "prefill_s", "found nan"),
    ],
)
def test_impossible_points_are_refused_by_name(
    x: tuple[float, ...], y: tuple[float, ...], name: str, problem: str
) -> None:
    with pytest.raises(ProfileError, match=problem) as caught:
        Curve(x, y, "prefill_s")
    assert caught.value.name == name


def profile(**change: object) -> Profile:
    fields: dict[str, object] = {"name": "p", "prefill": K_PREFILL, "kv": K_KV, "state_bytes": 2000}
    return Profile(**(fields | change))  # type: ignore[arg-type]


def test_prefill_after_a_cached_prefix_costs_the_start_up_and_the_difference() -> None:
    assert profile().prefill_s(3000) == pytest.approx(2.5)
    assert profile().prefill_s(3000, 1500) == pytest.approx(0.5 + 2.5 - 1.25)
    assert profile().prefill_s(3000, 3000) == pytest.approx(0.5)


def test_chunks_of_a_prefill_add_up_to_the_whole() -> None:
    one = profile()
    chunks = [
        one.prefill_s(b, 500) - (one.prefill_s(a, 500) if a > 500 else 0)
        for a, b in [(500, 1700), (1700, 2900), (2900, 3500)]
    ]
    assert sum(chunks) == pytest.approx(one.prefill_s(3500, 500))


def test_a_transfer_carries_the_missing_kv_and_always_the_state() -> None:
    one = profile()
    assert one.kv_bytes(2000) == 8000
    assert one.transfer_bytes(2000) == 8000
    assert one.transfer_bytes(2000, 1000) == 2000 + 3000
    assert one.transfer_bytes(2000, 2000) == 2000


def test_kv_throughput_is_bits_over_time() -> None:
    assert profile().kv_throughput_bps(2000) == pytest.approx(8 * 8000 / 1.5)


def test_more_state_than_kv_is_refused() -> None:
    with pytest.raises(ProfileError, match="state_bytes"):
        profile(state_bytes=5001)


def test_scaling_divides_bytes_and_leaves_times() -> None:
    small = profile().scaled(10)
    assert small.kv_bytes(2000) == 800
    assert small.state_bytes == 200
    assert small.prefill_s(2000) == 1.5
    assert small.scale == 10
    with pytest.raises(ProfileError, match="above 0"):
        profile().scaled(0)


def test_decode_steps_grow_with_the_batch_where_measured() -> None:
    assert DecodeProfile.constant(0.025, 20).step_s(7) == 0.025
    measured = DecodeProfile(8, Curve((1.0, 4.0, 8.0), (0.01, 0.016, 0.024)))
    assert measured.step_s(2) == pytest.approx(0.012)
    assert measured.step_s() == pytest.approx(0.024)


def test_what_occupies_nobody_is_part_of_the_prefill_and_less_than_the_least() -> None:
    curve = Curve.of([16, 1024], [0.05, 0.25])
    profile = Profile("t", curve, Curve.of([1], [1]), latency_s=0.04)
    assert profile.prefill_s(1024) == 0.25
    assert profile.occupied_s(1024) == pytest.approx(0.21)
    assert profile.occupied_s(1) >= 0
    with pytest.raises(
        ProfileError, match=r"latency_s: found 0\.05; must be below the least T_prefill, 0\.05 s"
    ):
        Profile("t", curve, Curve.of([1], [1]), latency_s=0.05)
