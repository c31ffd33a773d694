"""Whatever a link answers to more streams, the climb ends near the best number, and comes to rest."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from statistics import fmean

from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas.transfer.climbing import K_PAUSE_MOST_LOOKS, Climb, Look

K_LEAST, K_MOST = 8, 64
K_LOOK_S, K_SETTLES_S = 0.5, 1.0
Response = Callable[[int], float]


def climb(
    response: Response, *, noise: float, seed: int, seconds: float, loss: float = 0.01,
    full: Callable[[int], bool] = lambda n: False, may_grow: bool = True, remembered: int = 0,
) -> tuple[Climb, list[tuple[float, int]]]:  # fmt: skip
    """Each look sees the response, to which the link comes with a lag, and noise that lasts beyond a look."""
    rng, tuning, now, error = random.Random(seed), Climb(2, K_MOST, remembered=remembered), 0.0, 0.0
    tuning.at_least(K_LEAST)
    carried, history = response(tuning.wanted), []
    while now < seconds:
        now += K_LOOK_S
        carried += (response(tuning.wanted) - carried) * (1 - math.exp(-K_LOOK_S / K_SETTLES_S))
        error = 0.3 * error + noise * math.sqrt(1 - 0.3**2) * rng.gauss(0, 1)
        history.append((now, tuning.wanted))
        seen = Look(carried * max(0.1, 1 + error), loss * rng.uniform(0.7, 1.3), full(tuning.wanted))
        tuning.look(seen, may_grow=may_grow)
    return tuning, history


def share_of_best(response: Response, history: list[tuple[float, int]], since_s: float) -> float:
    best = max(response(n) for n in range(K_LEAST, K_MOST + 1))
    return fmean(response(n) for now, n in history if now > since_s) / best


@st.composite
def peaks(draw: st.DrawFn) -> Response:
    """So much a stream, up to a ceiling; beyond some number each takes from what all carry."""
    each = draw(st.floats(2, 30))
    ceiling = draw(st.floats(60, 200))
    peak = draw(st.integers(K_LEAST, K_MOST))
    fall = draw(st.floats(0, 0.6))

    def response(n: int) -> float:
        beyond = max(0, n - peak) / max(1, K_MOST - peak)
        return min(ceiling, each * min(n, peak)) * (1 - fall * beyond)

    return response


@settings(max_examples=300)
@given(peaks(), st.floats(0, 0.05), st.integers(0, 1 << 16))
def test_on_any_peak_it_ends_near_the_best(response, noise, seed):
    _, history = climb(response, noise=noise, seed=seed, seconds=180)
    assert share_of_best(response, history, since_s=90) > 0.8


def test_in_the_mean_over_peaks_it_ends_within_two_percent_of_the_best():
    rng, shares = random.Random(1), []
    for seed in range(200):
        each, ceiling, peak, fall = rng.uniform(2, 30), rng.uniform(60, 200), rng.randint(8, 64), rng.random()

        def response(n: int, each=each, ceiling=ceiling, peak=peak, fall=fall) -> float:
            return min(ceiling, each * min(n, peak)) * (1 - fall * max(0, n - peak) / max(1, K_MOST - peak))

        _, history = climb(response, noise=0.05, seed=seed, seconds=180)
        shares.append(share_of_best(response, history, since_s=90))
    assert fmean(shares) > 0.98


@settings(max_examples=100)
@given(st.floats(5, 60), st.floats(0, 0.05), st.integers(0, 1 << 16))
def test_on_a_response_that_only_bends_it_ends_near_the_best(half_at, noise, seed):
    def response(n: int) -> float:
        return 190 * n / (n + half_at)

    _, history = climb(response, noise=noise, seed=seed, seconds=180)
    assert share_of_best(response, history, since_s=90) > 0.8


@settings(max_examples=30)
@given(peaks(), st.floats(0, 0.08), st.integers(0, 1 << 16))
def test_it_moves_ever_more_rarely(response, noise, seed):
    """Each try that doesn't pay, or takes back the one before, doubles the pause before the next."""
    _, history = climb(response, noise=noise, seed=seed, seconds=3600)
    late = [n for now, n in history if now > 1200]
    changes = sum(a != b for a, b in itertools.pairwise(late))
    # A try is two changes at most, and one that pays is followed by another: half as many are noise's part.
    assert changes <= 1.5 * 2 * (2400 / K_LOOK_S / K_PAUSE_MOST_LOOKS) + 12


@settings(max_examples=100)
@given(st.floats(1, 2.9), st.floats(0, 0.08), st.integers(0, 1 << 16))
def test_random_loss_keeps_all(each, noise, seed):
    tuning, history = climb(lambda n: each * n, noise=noise, seed=seed, seconds=180)
    assert tuning.good == K_MOST
    assert fmean(n for now, n in history if now > 60) > 0.85 * K_MOST


@given(st.floats(0, 0.15), st.integers(0, 1 << 16))
def test_without_loss_none_is_added(noise, seed):
    _, history = climb(lambda n: 190.0, noise=noise, seed=seed, seconds=120, loss=0.0)
    assert {n for _, n in history} == {K_LEAST}


@settings(max_examples=50)
@given(st.floats(0, 0.05), st.integers(0, 1 << 16))
def test_loss_of_the_links_own_queue_adds_hardly_any(noise, seed):
    _, history = climb(lambda n: 190.0, noise=noise, seed=seed, seconds=400, full=lambda n: True)
    assert fmean(n for now, n in history if now > 200) < 1.5 * K_LEAST


@given(st.integers(0, 1 << 16))
def test_a_queue_that_only_a_busy_machine_makes_does_not_keep_random_loss_from_its_streams(seed):
    tuning, _ = climb(lambda n: 2.5 * n, noise=0.05, seed=seed, seconds=180, full=lambda n: True)
    assert tuning.good > 0.8 * K_MOST


@given(st.integers(0, 1 << 16))
def test_streams_that_more_of_would_not_help_are_not_added(seed):
    _, history = climb(lambda n: 4.0 * n, noise=0.05, seed=seed, seconds=120, may_grow=False)
    assert {n for _, n in history} == {K_LEAST}


@settings(max_examples=50)
@given(st.floats(0, 0.05), st.integers(0, 1 << 16))
def test_a_link_that_lost_packets_and_no_longer_does_comes_back_to_few(noise, seed):
    tuning, history = climb(lambda n: 190.0, noise=noise, seed=seed, seconds=900, loss=0.0, remembered=K_MOST)
    assert tuning.good < K_MOST // 3
    assert fmean(n for now, n in history if now > 600) < K_MOST / 3


def test_a_path_that_begins_to_lose_much_more_is_rushed_at_again():
    tuning, now = Climb(2, K_MOST, remembered=12), 0.0
    while now < 60:
        now += K_LOOK_S
        tuning.look(Look(108.0, 0.0005, True), may_grow=True)
    began = tuning.good
    while now < 90:
        now += K_LOOK_S
        tuning.look(Look(2.0 * tuning.wanted, 0.02, False), may_grow=True)
    assert tuning.good > 0.8 * K_MOST > began


def test_a_number_that_is_prescribed_is_never_left():
    tuning, now, seen = Climb(3, 3), 0.0, set()
    tuning.at_least(8)
    for _ in range(200):
        now += K_LOOK_S
        tuning.look(Look(10.0 * tuning.wanted, 0.02, False), may_grow=True)
        seen.add(tuning.wanted)
    assert seen == {3}
