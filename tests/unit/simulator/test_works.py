"""Figures that are kept are the profile's own, to the last bit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.profiles import Curve, DecodeProfile, Profile
from prfaas.simulator.works import Works, works_of


def profile(latency_s: float) -> Profile:
    return Profile(
        "unit",
        prefill=Curve.of([100, 1000, 9000], [0.3, 1.1, 17.0]),
        kv=Curve.of([100, 1000], [7e4, 6.1e5]),
        decode=DecodeProfile(64, Curve.of([1, 8, 64], [0.01, 0.013, 0.04])),
        latency_s=latency_s,
    )


@given(st.integers(1, 20_000), st.integers(0, 20_000), st.integers(1, 80), st.sampled_from([0.0, 0.1]))
def test_they_are_those_of_the_profile_the_first_time_and_the_second(
    tokens, cached, batch, latency_s
) -> None:
    one = profile(latency_s)
    assert one.decode is not None
    works = works_of(one)
    for _ in range(2):
        assert works.prefill_s(tokens, cached) == one.prefill_s(tokens, cached)
        assert works.occupied_s(tokens, cached) == one.occupied_s(tokens, cached)
        assert works.kv_bytes(tokens) == one.kv_bytes(tokens)
        assert works.steps_per_s(batch) == 1.0 / one.decode.step_s(batch)
    assert works.steps_per_s(0) == 0.0


def test_equal_profiles_share_theirs_and_unequal_ones_do_not() -> None:
    assert works_of(profile(0.1)) is works_of(profile(0.1))
    assert works_of(profile(0.1)) is not works_of(profile(0.0))
    assert isinstance(works_of(profile(0.0)), Works)
