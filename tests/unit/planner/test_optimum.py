from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest

from prfaas.model.lengths import Constant, Empirical
from prfaas.model.profiles import Curve, DecodeProfile
from prfaas.planner.baselines import collocated, homogeneous, naive
from prfaas.planner.capacity import link_needed
from prfaas.planner.curves import over_bandwidth, over_split, over_threshold
from prfaas.planner.optimum import best_threshold, optimum
from prfaas.planner.sensitivity import inputs, sensitivity
from prfaas.planner.system import System, evaluate


def small(**change: object) -> System:
    """Four lengths, straight lines: everything can be worked out by hand."""
    base = System(
        lengths=Empirical([1000, 2000, 3000, 4000]),
        output_tokens=100,
        prfaas_instances=2,
        egress_bps=1e9,
        prfaas_prefill=Curve((1000.0,), (0.5,)),
        kv=Curve((1000.0,), (10e6,)),
        local_instances=4,
        local_prefill=Curve((1000.0,), (1.0,)),
        decode=DecodeProfile.constant(0.01, 10),
        homogeneous_instances=6,
    )
    return replace(base, **change)  # type: ignore[arg-type]


def test_a_plan_holds_what_each_equation_gives() -> None:
    plan = evaluate(small(), 2000, 2)
    assert plan.offloaded_share == pytest.approx(0.5)
    assert plan.l_long_tokens == pytest.approx(3500)
    assert plan.l_short_tokens == pytest.approx(1500)
    assert plan.prfaas_rps == pytest.approx(2 / 1.75)  # the link would carry 1e9 / (8 · 35 MB) = 3.57
    assert plan.local_prefill_rps == pytest.approx(2 / 1.5)
    assert plan.decode_rps == pytest.approx(2 * 10 / (0.01 * 100))
    assert plan.throughput_rps == pytest.approx(2 / 1.75 / 0.5)
    assert plan.egress_bps == pytest.approx(2 / 1.75 * 8 * 35e6)
    assert plan.limited_by == "prfaas prefill"


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"egress_bps": 1e8}, "link"),
        ({"output_tokens": 2000.0}, "decode"),
        ({"prfaas_instances": 20}, "local prefill"),
    ],
)
def test_a_plan_names_what_limits_it(change: dict[str, object], limit: str) -> None:
    assert evaluate(small(**change), 2000, 2).limited_by == limit


def test_paths_that_nothing_takes_have_no_figures() -> None:
    nothing_out = evaluate(small(), 4000, 2)
    assert nothing_out.l_long_tokens is None
    assert nothing_out.prfaas_rps is None
    assert nothing_out.egress_bps == 0
    all_out = evaluate(small(), 0, 0)
    assert all_out.l_short_tokens is None
    assert all_out.local_prefill_rps is None
    assert all_out.throughput_rps == pytest.approx(2 / 1.25)


@pytest.mark.parametrize("prefill", [-1, 4])
def test_a_split_without_decode_is_refused(prefill: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 3"):
        evaluate(small(), 2000, prefill)


def test_the_optimum_beats_every_point_of_a_finer_grid(system: System) -> None:
    best = optimum(system)
    for prefill in range(1, 8):
        for step in range(1, 400):
            assert evaluate(system, 131072 * step / 400, prefill).throughput_rps <= best.throughput_rps + 1e-6


def test_at_the_optimum_both_prefill_paths_are_full(system: System) -> None:
    best = optimum(system)
    p = best.offloaded_share
    assert best.prfaas_rps is not None
    assert best.local_prefill_rps is not None
    assert best.prfaas_rps / p == pytest.approx(best.local_prefill_rps / (1 - p), rel=1e-4)


def test_the_report_is_reproduced(system: System) -> None:
    best = optimum(system)
    assert best.throughput_rps == pytest.approx(3.24, rel=0.02)
    assert best.throughput_rps == pytest.approx(3.20, abs=0.01)
    assert best.threshold_tokens == pytest.approx(19_400, rel=0.02)
    assert (best.prefill, best.decode) == (3, 5)
    assert best.offloaded_share == pytest.approx(0.496, rel=0.02)
    assert best.egress_bps == pytest.approx(11.9e9, rel=0.01)
    alone = homogeneous(system, 12)
    assert (alone.prefill, alone.decode) == (9, 3)
    assert alone.throughput_rps == pytest.approx(2.11, rel=0.02)
    everything = naive(system)
    assert everything.throughput_rps == pytest.approx(2.45, rel=0.03)
    assert everything.decode_rps == pytest.approx(6.25)


def test_a_narrow_link_moves_threshold_and_split(system: System) -> None:
    narrow = system.changed(egress_bps=5e9)
    best = optimum(narrow)
    assert best.throughput_rps == pytest.approx(2.25, abs=0.01)
    assert best.threshold_tokens == pytest.approx(41_700, rel=0.01)
    assert (best.prefill, best.decode) == (5, 3)
    # A fixed threshold isn't safe: it falls below what the homogeneous cluster does.
    assert evaluate(narrow, 19_400, 3).throughput_rps == pytest.approx(1.33, abs=0.01)


@pytest.mark.parametrize(
    ("gbps", "all_chosen", "split_held"),
    [(100, 3.20, 3.20), (10, 3.05, 2.80), (5, 2.25, 1.77), (2, 1.60, 1.13), (0, 1.38, 0.69)],
)
def test_what_adapting_is_worth_on_each_link(
    system: System, gbps: float, all_chosen: float, split_held: float
) -> None:
    link = system.changed(egress_bps=gbps * 1e9)
    assert optimum(link).throughput_rps == pytest.approx(all_chosen, abs=0.011)
    assert best_threshold(link, 3).throughput_rps == pytest.approx(split_held, abs=0.011)


def test_the_search_takes_at_most_a_tenth_of_a_second_of_processor_time(system: System) -> None:
    spent = []
    for _ in range(5):
        started = time.process_time()
        optimum(system)
        spent.append(time.process_time() - started)
    assert min(spent) <= 0.1


def test_the_chain_of_baselines_rises(system: System) -> None:
    one = collocated(system, 12)
    chain = [
        one.throughput_rps,
        homogeneous(system, 12).throughput_rps,
        naive(system).throughput_rps,
        optimum(system).throughput_rps,
    ]
    assert chain == sorted(chain)
    assert one.no_interference_rps > one.throughput_rps
    with pytest.raises(ValueError, match="at least 2"):
        homogeneous(system, 1)


def test_equal_lengths_leave_all_or_nothing_to_choose() -> None:
    best = optimum(small(lengths=Constant(2000)))
    assert best.offloaded_share in (0.0, 1.0)
    assert best.throughput_rps == pytest.approx(2.0)  # all out: 2 / 1 s; all in: 3 / 2 s at most


def test_the_link_needed_for_a_rate_carries_it_and_no_less_would(system: System) -> None:
    for rate in (1.7, 2.25, 3.0):
        need = link_needed(system, rate)
        assert need is not None
        assert optimum(system.changed(egress_bps=need.egress_bps * 1.001)).throughput_rps >= rate * 0.999
        assert optimum(system.changed(egress_bps=need.egress_bps * 0.98)).throughput_rps < rate
    enough = link_needed(system, 1.0)
    assert enough is not None
    assert enough.egress_bps == 0
    assert link_needed(system, 3.3) is None


def test_curves_agree_with_single_evaluations(system: System) -> None:
    for point in over_threshold(system, 3, 20):
        plan = evaluate(system, point.threshold_tokens, 3)
        assert point.throughput_rps == plan.throughput_rps
        limits = [point.prfaas_limit_rps, point.local_limit_rps, point.decode_limit_rps]
        assert plan.throughput_rps == pytest.approx(min(limit for limit in limits if limit is not None))
    splits = over_split(system, 19_616)
    assert [point.prefill for point in splits] == list(range(1, 8))
    assert max(point.best_rps for point in splits) == pytest.approx(optimum(system).throughput_rps, rel=1e-6)
    sweep = over_bandwidth(system, optimum(system), count=6)
    for before, after in itertools.pairwise(sweep):
        assert after.optimum_rps >= before.optimum_rps - 1e-9
    for point in sweep:
        assert point.held_rps <= point.best_threshold_rps + 1e-6 <= point.optimum_rps + 2e-6


def test_sensitivity_covers_every_input_and_has_the_right_signs(system: System) -> None:
    rows = {(row.input, row.change): row for row in sensitivity(system, optimum(system))}
    assert {name for name, _ in rows} == {*inputs(system), "prfaas instances", "local instances"}
    faster = rows[("prfaas prefill_s", "-10%")]
    assert faster.throughput_rps > optimum(system).throughput_rps
    assert faster.elasticity is not None
    assert faster.elasticity < 0
    assert rows[("egress_bps", "+10%")].elasticity == pytest.approx(0, abs=1e-6)
    assert rows[("prfaas instances", "+1")].throughput_rps > rows[("prfaas instances", "-1")].throughput_rps
    # On a link that limits, bandwidth and size pull with equal force in opposite directions.
    narrow = system.changed(egress_bps=5e9)
    rows = {(row.input, row.change): row for row in sensitivity(narrow, optimum(narrow))}
    assert (rows[("egress_bps", "+10%")].elasticity or 0) > 0.1
    assert (rows[("kv_bytes", "+10%")].elasticity or 0) < -0.1
