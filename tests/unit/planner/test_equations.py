"""Each equation against a number worked out by hand."""

from __future__ import annotations

import math

import pytest

from prfaas.planner import equations as eq


def test_kv_throughput_is_bits_of_kv_over_seconds_of_prefill() -> None:
    # 250 MB in 2 s: 2000 Mbit / 2 s.
    assert eq.kv_throughput_bps(250e6, 2.0) == pytest.approx(1e9)


def test_cluster_egress_multiplies_one_instance_by_their_number() -> None:
    # 512 GPUs, 8 an instance: 64 instances of 59.93 Gbit/s; the report prints 3.8 Tbit/s.
    assert eq.cluster_egress_bps(512, 8, 59.93e9) == pytest.approx(3835.52e9)


def test_prefill_rate_is_instances_over_time() -> None:
    assert eq.prefill_rps(3, 1.5) == 2.0


def test_the_link_carries_its_bits_over_a_prompts_bits() -> None:
    # 10 Gbit/s over 0.5 GB = 4 Gbit.
    assert eq.link_rps(10e9, 0.5e9) == pytest.approx(2.5)


def test_prfaas_is_limited_by_compute_or_by_the_link() -> None:
    assert eq.prfaas_rps(4, 2.0, 100e9, 1e9) == 2.0  # the link would carry 12.5
    assert eq.prfaas_rps(4, 2.0, 8e9, 1e9) == 1.0


def test_decode_rate_is_slots_over_the_time_of_an_answer() -> None:
    # 5 · 20 / (0.025 s · 1024) = 100 / 25.6.
    assert eq.decode_rps(5, 20, 0.025, 1024) == pytest.approx(3.90625)


def test_the_system_takes_the_least_of_its_paths() -> None:
    assert eq.system_rps(1.5, 1.5, 10, 0.5) == 3.0
    assert eq.system_rps(0.6, 1.5, 10, 0.5) == pytest.approx(1.2)
    assert eq.system_rps(1.5, 0.4, 10, 0.5) == pytest.approx(0.8)
    assert eq.system_rps(1.5, 1.5, 2.5, 0.5) == 2.5


def test_a_path_that_nothing_takes_limits_nothing() -> None:
    assert eq.system_rps(2.0, 0.0, 10, 1.0) == 2.0
    assert eq.system_rps(0.0, 2.0, 10, 0.0) == 2.0


def test_egress_is_the_offloaded_prompts_bits() -> None:
    # 4 req/s, a quarter offloaded, 0.5 GB each: 1 · 4 Gbit.
    assert eq.egress_bps(4, 0.25, 0.5e9) == pytest.approx(4e9)


def test_a_collocated_engine_balances_prefill_and_decode_within_its_slowdown() -> None:
    # 2 s of prefill and 1000 · 0.02 / 10 = 2 s of decode a request: half of the time each, 1/4 a second.
    assert eq.collocated_rps(1, 2.0, 10, 0.02, 1000, math.inf) == pytest.approx(0.25)
    # At most 1.25 times slower: a fifth of the time for prefill, 0.2 / 2 s.
    assert eq.collocated_rps(3, 2.0, 10, 0.02, 1000, 1.25) == pytest.approx(0.3)
    # Twice slower allows more than the balance needs.
    assert eq.collocated_rps(1, 1.0, 10, 0.02, 1000, 2) == pytest.approx(1 / 3)
