"""The link estimate: bad news at once, good news slowly, silence noticed, recovery by probes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.admission import LinkCameUp, LinkEstimator, LinkWentDown, RateFell
from prfaas.config.policy import LinkAdmission
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkObservation

LINK = LinkId("east", "west")
STEP_S = 0.1


def busy(at_s: float, rate_bps: float, **more: object) -> LinkObservation:
    fields: dict[str, object] = {"backlog_bytes": 10**9, "rtt_s": 0.04}
    return LinkObservation(
        link=LINK,
        at_s=at_s,
        interval_s=STEP_S,
        delivered_bytes=int(rate_bps * STEP_S / 8),
        **(fields | more),  # type: ignore[arg-type]
    )


def run(estimator: LinkEstimator, start_s: float, for_s: float, rate_bps: float, noise: float = 0.0) -> list:
    rng = random.Random(4)
    events = []
    for k in range(1, round(for_s / STEP_S) + 1):
        rate = rate_bps * (1 + noise * (rng.random() * 2 - 1))
        events += estimator.on_observation(busy(start_s + k * STEP_S, rate))
    return events


@pytest.fixture
def estimator() -> LinkEstimator:
    return LinkEstimator(LINK, LinkAdmission(nominal_bps=10e9), now=0.0)


def test_a_link_that_nothing_was_measured_of_may_have_half_of_what_is_configured_or_half_more(
    estimator: LinkEstimator,
) -> None:
    found = estimator.estimate(0.0)
    assert (found.low_bps, found.rate_bps, found.high_bps) == (5e9, 10e9, 15e9)


def test_a_fall_is_believed_within_a_second(estimator: LinkEstimator) -> None:
    run(estimator, 0, 20, 10e9, noise=0.15)
    events = run(estimator, 20, 1, 1e9)
    assert estimator.estimate(21).rate_bps < 1.3e9
    assert any(isinstance(event, RateFell) for event in events)


def test_a_rise_is_believed_slowly_but_is_believed(estimator: LinkEstimator) -> None:
    run(estimator, 0, 20, 1e9)
    run(estimator, 20, 0.5, 10e9)
    assert estimator.estimate(20.5).rate_bps < 3e9
    run(estimator, 20.5, 12, 10e9)
    assert estimator.estimate(32.5).rate_bps > 9e9


def test_sawtooth_of_congestion_control_is_not_bad_news(estimator: LinkEstimator) -> None:
    run(estimator, 0, 60, 10e9, noise=0.2)
    assert estimator.estimate(60).rate_bps == pytest.approx(10e9, rel=0.06)


def test_uncertainty_covers_the_truth_and_grows_without_samples(estimator: LinkEstimator) -> None:
    run(estimator, 0, 30, 8e9, noise=0.1)
    now, later = estimator.estimate(30), estimator.estimate(90)
    assert now.low_bps < 8e9 < now.high_bps
    assert later.high_bps - later.low_bps > 1.5 * (now.high_bps - now.low_bps)


def test_a_sender_with_little_to_send_is_no_bad_news(estimator: LinkEstimator) -> None:
    run(estimator, 0, 10, 10e9)
    for k in range(100):
        estimator.on_observation(busy(10 + k * STEP_S, 1e8, backlog_bytes=0))
    assert estimator.estimate(20).rate_bps == pytest.approx(10e9, rel=0.05)


def test_the_first_interval_of_a_transfer_is_no_bad_news(estimator: LinkEstimator) -> None:
    run(estimator, 0, 9.8, 10e9)
    estimator.on_observation(busy(9.9, 2e9, backlog_bytes=0))
    for k in range(60):  # short transfers, each alone
        estimator.on_observation(busy(10 + k * 0.2, 2e9))
        estimator.on_observation(busy(10.1 + k * 0.2, 2e9, backlog_bytes=0))
    assert estimator.estimate(22).rate_bps == pytest.approx(10e9, rel=0.05)


def test_several_senders_are_one_sum(estimator: LinkEstimator) -> None:
    for k in range(1, 200):
        for sender in ("a", "b", "c"):
            estimator.on_observation(busy(k * STEP_S, 2e9, sender=sender))
    assert estimator.estimate(20).rate_bps == pytest.approx(6e9, rel=0.1)
    assert estimator.estimate(20).backlog_bytes == 3 * 10**9
    estimator.forget_sender("c")
    assert estimator.estimate(20).backlog_bytes == 2 * 10**9


def test_silence_under_load_is_an_outage_within_a_second(estimator: LinkEstimator) -> None:
    run(estimator, 0, 5, 10e9)
    events = []
    for k in range(1, 11):
        events += estimator.on_observation(busy(5 + k * STEP_S, 0))
    downs = [event for event in events if isinstance(event, LinkWentDown)]
    assert len(downs) == 1
    assert downs[0].at_s <= 6.0
    assert not estimator.estimate(6).up
    assert estimator.estimate(6).usable_bps == 0


def test_silence_is_noticed_even_when_the_shell_reports_nothing(estimator: LinkEstimator) -> None:
    run(estimator, 0, 5, 10e9)
    assert estimator.on_timer(5.5) == []
    assert [type(event) for event in estimator.on_timer(5.9)] == [LinkWentDown]
    assert estimator.on_timer(6.5) == []


def test_an_idle_link_is_not_down(estimator: LinkEstimator) -> None:
    run(estimator, 0, 5, 10e9)
    estimator.on_observation(busy(5.1, 1e9, backlog_bytes=0))
    assert estimator.on_timer(100) == []
    assert estimator.estimate(100).up
    # a transfer after the pause gets its own time before silence counts
    assert estimator.on_observation(busy(100.1, 0)) == []


def test_a_dead_link_is_probed_by_little_and_comes_back_with_half(estimator: LinkEstimator) -> None:
    run(estimator, 0, 5, 10e9)
    estimator.on_timer(6)
    gaps = []
    now = 6.0
    for _ in range(8):
        due = estimator.probe_at(now)
        gaps.append(due - now)
        now = due
        assert estimator.probe_bytes(now) <= 1024
        estimator.on_probe_sent(now)
    assert 0 < gaps[0] <= 0.3
    assert max(gaps) <= 1.0
    back = estimator.on_observation(busy(now + 0.1, 8 * 1024 / STEP_S, backlog_bytes=0))
    assert [type(event) for event in back] == [LinkCameUp]
    assert estimator.estimate(now + 0.1).rate_bps == pytest.approx(5e9, rel=0.05)


def test_an_idle_link_is_probed_and_a_busy_one_is_not(estimator: LinkEstimator) -> None:
    run(estimator, 0, 5, 10e9)
    assert estimator.probe_at(5.0) > 5.0
    assert estimator.probe_at(7.0) < 7.0
    assert estimator.probe_bytes(7.0) > 1024
    estimator.on_probe_sent(7.0)
    assert estimator.probe_at(7.0) > 7.0


def test_reserve_for_other_traffic_is_not_usable() -> None:
    estimator = LinkEstimator(LINK, LinkAdmission(nominal_bps=10e9, reserved_share=0.3), now=0)
    assert estimator.estimate(0).usable_bps == pytest.approx(7e9)
    estimator = LinkEstimator(LINK, LinkAdmission(nominal_bps=10e9, reserved_bps=20e9), now=0)
    assert estimator.estimate(0).usable_bps == 0


def test_retransmits_show_as_loss(estimator: LinkEstimator) -> None:
    for k in range(1, 100):
        estimator.on_observation(busy(k * STEP_S, 1e9, retransmits=30, segments=1000))
    assert estimator.estimate(10).loss == pytest.approx(0.03, rel=0.05)


anything = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.lists(
        st.builds(
            LinkObservation,
            link=st.just(LINK),
            at_s=anything,
            interval_s=anything,
            delivered_bytes=st.integers(-10, 2**63),
            backlog_bytes=st.integers(-10, 2**63),
            rtt_s=st.none() | anything,
            retransmits=st.integers(-10, 2**40),
            segments=st.integers(-10, 2**40),
            sender=st.sampled_from(["", "a", "b"]),
        ),
        max_size=30,
    )
)
def test_no_observation_makes_the_estimate_nonsense(many: list[LinkObservation]) -> None:
    estimator = LinkEstimator(LINK, LinkAdmission(nominal_bps=1e9), now=0)
    for one in many:
        estimator.on_observation(one)
    told = estimator.estimate(1.0)
    assert 0 <= told.low_bps <= max(told.rate_bps, told.high_bps)
    assert 0 <= told.usable_bps < float("inf")
    assert 0 <= told.loss <= 1
    assert 0 <= told.rtt_s < float("inf")


def test_what_was_limited_by_the_application_never_lowers_the_estimate_and_may_raise_it(
    estimator: LinkEstimator,
) -> None:
    run(estimator, 0, 20, 1e9)
    for k in range(1, 100):
        estimator.on_observation(busy(20 + k * STEP_S, 0.02e9, app_limited=True))
    assert estimator.estimate(30).rate_bps == pytest.approx(1e9, rel=0.01)
    for k in range(1, 50):
        estimator.on_observation(busy(30 + k * STEP_S, 2e9, app_limited=True))
    assert estimator.estimate(35).rate_bps > 1.7e9


def test_streams_that_had_little_to_do_may_gather_speed_before_they_count(estimator: LinkEstimator) -> None:
    run(estimator, 0, 20, 1e9)
    for k in range(1, 20):
        estimator.on_observation(busy(20 + k * STEP_S, 0.02e9, app_limited=True))
    events = estimator.on_observation(busy(22.0, 0.1e9))
    assert events == []
    assert estimator.estimate(22.0).rate_bps == pytest.approx(1e9, rel=0.01)
    run(estimator, 22.0, 2, 0.1e9)
    assert estimator.estimate(24).rate_bps < 0.3e9
