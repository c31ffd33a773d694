"""The search for a capacity, on systems whose capacity is known."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.config.experiment import Capacity, Experiment, load_experiment
from prfaas.config.workload import AtOnce, OnOff, Synthetic
from prfaas.model.errors import UsageError
from prfaas.workload import timed_requests
from prfaas_testbed.experiment.capacity import Search, rate_of, with_rate
from prfaas_testbed.experiment.machine import K_TOPOLOGIES


def searched(first: float, capacity: float, choice: Capacity, noise: Random | None = None) -> Search:
    """The search against a system that holds the SLO up to `capacity`."""
    search = Search(first, choice)
    for _ in range(200):
        rate = search.next_rps()
        if rate is None:
            return search
        edge = capacity * (noise.uniform(0.93, 1.07) if noise else 1.0)
        search.tell(rate, 1.0 if rate <= edge else 0.5)
    raise AssertionError("the search doesn't end")


@given(st.floats(0.2, 90), st.floats(0.2, 90))
def test_the_answer_is_a_rate_that_holds_beside_one_that_breaks(first: float, capacity: float) -> None:
    choice = Capacity(least_rps=0.1, most_rps=100)
    found = searched(first, capacity, choice)
    assert found.held_rps is not None
    assert found.broken_rps is not None
    assert found.held_rps <= capacity < found.broken_rps
    assert found.broken_rps / found.held_rps <= choice.within
    assert len([rate for rate, _ in found.trials if rate == found.held_rps]) == 1 + choice.confirm


@given(st.floats(0.2, 90), st.floats(0.2, 90), st.integers(0, 1000))
def test_noise_near_the_edge_ends_too(first: float, capacity: float, seed: int) -> None:
    found = searched(first, capacity, Capacity(), Random(seed))
    assert found.held_rps is None or found.held_rps <= 1.07 * capacity


def test_beyond_its_bounds_the_search_says_so() -> None:
    above = searched(1.0, 1000.0, Capacity(most_rps=8))
    assert (above.held_rps, above.broken_rps) == (8, None)
    below = searched(1.0, 0.01, Capacity(least_rps=0.5))
    assert (below.held_rps, below.broken_rps) == (None, 0.5)


@pytest.mark.parametrize("name", ["hello", "one-t", "two-sites", "three-sites"])
def test_a_workload_at_another_rate_keeps_its_shape(name: str) -> None:
    experiment = load_experiment(name, K_TOPOLOGIES)
    assert isinstance(experiment, Experiment)
    faster = with_rate(experiment.workload, 40.0, 50.0)
    assert rate_of(faster) == pytest.approx(40.0)
    if isinstance(faster, Synthetic):
        requests = list(timed_requests(faster, Random(1), []))
        assert 1500 < len(requests) < 2600


def test_on_and_off_are_raised_alike_and_a_backlog_has_no_rate() -> None:
    hello = load_experiment("hello", K_TOPOLOGIES)
    assert isinstance(hello, Experiment)
    bursts = OnOff(process="on_off", on_rps=8, off_rps=2, on_s=10, off_s=20)
    workload = hello.workload.model_copy(update={"arrivals": bursts})
    assert rate_of(workload) == pytest.approx(4.0)
    faster = with_rate(workload, 8.0, 60.0)
    assert isinstance(faster, Synthetic)
    assert isinstance(faster.arrivals, OnOff)
    assert (faster.arrivals.on_rps, faster.arrivals.off_rps) == (16, 4)
    backlog = workload.model_copy(update={"arrivals": AtOnce(process="at_once")})
    with pytest.raises(UsageError, match="a backlog has none"):
        rate_of(backlog)


def test_a_rate_that_held_by_luck_above_one_that_broke_does_not_count_as_held() -> None:
    search = Search(1.0, Capacity())
    search.tell(1.0, 1.0)
    search.tell(2.0, 0.0)
    search.tell(3.0, 1.0)
    assert (search.held_rps, search.broken_rps) == (1.0, 2.0)
