from __future__ import annotations

import heapq
import math
from random import Random

import pytest

from prfaas.planner.clairvoyant import Job, Resources, clairvoyant_bound


def job(
    arrival_s: float, deadline_s: float, local_s: float = 2.0, prfaas_s: float = 1.0, mb: float = 1.0
) -> Job:
    return Job(arrival_s, deadline_s, local_s, prfaas_s, mb * 1e6)


def test_what_fits_is_served_whole() -> None:
    jobs = [job(0, 4), job(0, 4), job(1, 9)]
    assert clairvoyant_bound(jobs, Resources(1, 1, 1e9)).within == pytest.approx(3)


def test_local_work_is_bounded_by_the_instances_time() -> None:
    # 4 s for jobs of 2 s: two of five, on one instance without a PrfaaS cluster.
    bound = clairvoyant_bound([job(0, 4) for _ in range(5)], Resources(1, 0, 1e9))
    assert bound.within == pytest.approx(2)
    assert bound.share == pytest.approx(0.4)
    assert bound.offloaded == 0


def test_the_link_bounds_what_goes_out() -> None:
    # 10 instances could do all; 8 Mbit/s carry 4 MB in 4 s, at 2 MB each.
    jobs = [job(0, 4, mb=2.0) for _ in range(8)]
    bound = clairvoyant_bound(jobs, Resources(0, 10, 8e6))
    assert bound.within == pytest.approx(2)
    assert bound.offloaded == pytest.approx(2)


def test_what_cannot_be_in_time_alone_counts_for_nothing() -> None:
    assert clairvoyant_bound([job(0, 0.5)], Resources(5, 5, 1e9)).within == 0
    late = Job(0, 1.2, math.inf, 1.0, 1.0, tail_s=0.3)
    assert clairvoyant_bound([late], Resources(5, 5, 1e9)).within == 0


def test_nothing_to_bound_and_bad_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="no request"):
        clairvoyant_bound([], Resources(1, 1, 1e9))
    with pytest.raises(ValueError, match="above 0"):
        clairvoyant_bound([job(0, 4)], Resources(1, 1, 1e9), bin_s=0)


def by_predicted_time(jobs: list[Job], resources: Resources) -> int:
    """A real policy: each goes where it is done first; nothing is interrupted."""
    local, far = [0.0] * resources.local_instances, [0.0] * resources.prfaas_instances
    kept = 0
    for one in jobs:
        here, there = max(one.arrival_s, local[0]) + one.local_s, max(one.arrival_s, far[0]) + one.prfaas_s
        heapq.heapreplace(local if here <= there else far, min(here, there))
        kept += min(here, there) <= one.deadline_s
    return kept


@pytest.mark.parametrize("seed", range(3))
def test_no_real_policy_beats_the_bound_and_more_of_anything_raises_it(seed: int) -> None:
    rng = Random(seed)
    at, jobs = 0.0, []
    for _ in range(150):
        at += rng.expovariate(2.5)
        local_s = rng.uniform(0.5, 4)
        jobs.append(job(at, at + 2 + 2 * local_s, local_s, local_s / 2, rng.uniform(1, 20)))
    resources = Resources(2, 2, 1e12)
    bound = clairvoyant_bound(jobs, resources)
    assert by_predicted_time(jobs, resources) <= bound.within + 1e-6 <= len(jobs) + 1e-5
    narrow = clairvoyant_bound(jobs, Resources(2, 2, 2e7))
    assert narrow.within <= bound.within + 1e-6
    assert clairvoyant_bound(jobs, Resources(3, 2, 1e12)).within >= bound.within - 1e-6
    # Finer bins can only tighten.
    assert clairvoyant_bound(jobs, resources, bin_s=0.25).within <= bound.within + 1e-6


def test_decode_slots_bound_what_can_begin() -> None:
    # Four at once, of which two slots can take two in time: each is held for 10 s.
    jobs = [Job(0.0, 4.0, 0.5, math.inf, 1e6, decode_s=10.0) for _ in range(4)]
    free = Resources(4, 0, 1e9)
    assert clairvoyant_bound(jobs, free).within == pytest.approx(4)
    held = Resources(4, 0, 1e9, decode_slots=2)
    assert clairvoyant_bound(jobs, held).within == pytest.approx(2)
    short = [Job(0.0, 4.0, 0.5, math.inf, 1e6, decode_s=0.5) for _ in range(4)]
    assert clairvoyant_bound(short, held).within == pytest.approx(4)
