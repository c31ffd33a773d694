from __future__ import annotations

import itertools
import statistics
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from prfaas.config.loading import Strict, check
from prfaas.config.workload import WorkloadConfig, trace_lines
from prfaas.model.errors import ConfigError
from prfaas.workload import TimedRequest, scaled_rate, timed_requests

K_TOPOLOGIES = Path(__file__).parents[3] / "topologies"


class File(Strict):
    workload: WorkloadConfig


def config(**fields: Any) -> Any:
    return check({"workload": fields}, File, "f.yaml").workload


def synthetic(**change: Any) -> Any:
    fields: dict[str, Any] = {
        "kind": "synthetic",
        "arrivals": {"process": "poisson", "rate_rps": 10},
        "input_tokens": {"distribution": "uniform", "min": 100, "max": 300},
        "output_tokens": 7,
        "requests": 4000,
    }
    return config(**(fields | change))


def play(workload: Any, seed: int = 1, lines: list[str] | None = None) -> list[TimedRequest]:
    return list(timed_requests(workload, Random(seed), lines or []))


def gaps(requests: list[TimedRequest]) -> list[float]:
    return [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(requests)]


def test_the_same_seed_gives_the_same_requests_and_another_one_others() -> None:
    assert play(synthetic(), 5) == play(synthetic(), 5)
    assert play(synthetic(), 5) != play(synthetic(), 6)


def test_poisson_arrivals_have_their_rate_and_memoryless_gaps() -> None:
    between = gaps(play(synthetic()))
    assert statistics.mean(between) == pytest.approx(0.1, rel=0.05)
    assert statistics.stdev(between) == pytest.approx(0.1, rel=0.08)


def test_gamma_arrivals_are_as_bursty_as_asked() -> None:
    between = gaps(play(synthetic(arrivals={"process": "gamma", "rate_rps": 10, "cv": 3}, requests=20000)))
    assert statistics.mean(between) == pytest.approx(0.1, rel=0.06)
    assert statistics.stdev(between) / statistics.mean(between) == pytest.approx(3, rel=0.1)


def test_on_off_arrivals_keep_to_their_phases() -> None:
    on_off = {"process": "on_off", "on_rps": 20, "off_rps": 0, "on_s": 5, "off_s": 15}
    requests = play(synthetic(arrivals=on_off, requests=2000))
    assert all(request.arrival_s % 20 <= 5 for request in requests)
    assert len(requests) / requests[-1].arrival_s == pytest.approx(5, rel=0.1)


def test_diurnal_arrivals_follow_the_wave() -> None:
    wave = {"process": "diurnal", "mean_rps": 10, "amplitude": 0.8, "period_s": 100}
    requests = play(synthetic(arrivals=wave, requests=None, duration_s=1000))
    rising = sum(request.arrival_s % 100 < 50 for request in requests)
    # Over the half in which sin > 0 its mean is 2 / π.
    assert rising / len(requests) == pytest.approx((1 + 0.8 * 2 / 3.14159) / 2, abs=0.03)
    assert requests[-1].arrival_s < 1000


def test_paced_and_simultaneous_arrivals_are_exact() -> None:
    paced = play(synthetic(arrivals={"process": "paced", "rate_rps": 4}, requests=5))
    assert [request.arrival_s for request in paced] == [0, 0.25, 0.5, 0.75, 1.0]
    assert {request.arrival_s for request in play(synthetic(arrivals={"process": "at_once"}))} == {0.0}


def test_another_rate_plays_the_same_requests_sooner() -> None:
    slow, fast = play(synthetic()), play(scaled_rate(synthetic(), 2))
    assert [r.prompt_tokens for r in slow] == [r.prompt_tokens for r in fast]
    assert [r.arrival_s for r in fast] == pytest.approx([r.arrival_s / 2 for r in slow])


@pytest.mark.parametrize(
    "arrivals",
    [
        {"process": "gamma", "rate_rps": 10, "cv": 2},
        {"process": "on_off", "on_rps": 15, "off_rps": 5, "on_s": 1, "off_s": 1},
        {"process": "diurnal", "mean_rps": 10, "amplitude": 0.5, "period_s": 10},
    ],
)
def test_every_process_with_a_rate_can_be_scaled(arrivals: dict[str, Any]) -> None:
    slow = play(synthetic(arrivals=arrivals, requests=None, duration_s=400))
    fast = play(scaled_rate(synthetic(arrivals=arrivals, requests=None, duration_s=400), 3))
    assert len(fast) / len(slow) == pytest.approx(3, rel=0.12)


def test_arrivals_at_once_have_no_rate_to_scale() -> None:
    with pytest.raises(ValueError, match="no rate"):
        scaled_rate(synthetic(arrivals={"process": "at_once"}), 2)
    with pytest.raises(ValueError, match="above 0"):
        scaled_rate(synthetic(), 0)


def test_tenants_and_classes_come_by_weight_and_leave_the_rest_as_it_was() -> None:
    named = play(synthetic(tenants={"a": 3, "b": 1}, classes={"chat": 1}))
    count = Counter(request.tenant for request in named)
    assert count["a"] / len(named) == pytest.approx(0.75, abs=0.03)
    assert {request.slo_class for request in named} == {"chat"}
    assert [r.prompt_tokens for r in named] == [r.prompt_tokens for r in play(synthetic())]


def test_a_shared_prefix_gives_equal_leading_blocks_within_a_group_only() -> None:
    prefix = {"tokens": 130, "groups": 2}
    requests = play(synthetic(shared_prefix=prefix, block_tokens=64, requests=200))
    starts = {request.block_ids[:2] for request in requests if request.prompt_tokens >= 128}
    assert starts == {(0, 1), (2, 3)}
    own = [i for request in requests for i in request.block_ids[2:]]
    assert len(own) == len(set(own))
    assert all(len(r.block_ids) == -(-r.prompt_tokens // 64) for r in requests)
    assert len(requests[0].full_blocks) == requests[0].prompt_tokens // 64


def sessions(**change: Any) -> Any:
    fields: dict[str, Any] = {
        "kind": "sessions",
        "arrivals": {"process": "poisson", "rate_rps": 1},
        "turns": {"distribution": "uniform", "min": 1, "max": 6},
        "first_tokens": 500,
        "turn_tokens": 100,
        "output_tokens": 200,
        "think_s": 10,
        "requests": 1000,
        "shared_prefix": {"tokens": 300, "groups": 3},
    }
    return config(**(fields | change))


def test_each_turn_extends_the_last_prompt_and_its_answer() -> None:
    requests = play(sessions())
    assert [r.index for r in requests] == list(range(len(requests)))
    assert all(gap >= 0 for gap in gaps(requests))
    by_session: dict[int, list[TimedRequest]] = {}
    for request in requests:
        assert request.session is not None
        by_session.setdefault(request.session, []).append(request)
    assert max(map(len, by_session.values())) > 3
    for turns in by_session.values():
        assert [r.turn for r in turns] == list(range(len(turns)))
        for number, (before, after) in enumerate(itertools.pairwise(turns)):
            assert before.prompt_tokens == 800 + 300 * number
            assert after.prompt_tokens == before.prompt_tokens + 300
            assert after.block_ids[: len(before.block_ids)] == before.block_ids


def test_sessions_end_at_the_longest_prompt_and_at_their_number() -> None:
    requests = play(sessions(max_tokens=1100, requests=None, sessions=50, turns=6))
    assert max(request.prompt_tokens for request in requests) == 1100
    assert Counter(r.session for r in requests) == dict.fromkeys(range(50), 2)


K_LINES = [
    '{"timestamp": 0, "input_length": 1000, "output_length": 10, "hash_ids": [0, 1]}',
    '{"timestamp": 2999, "input_length": 1536, "output_length": 0, "hash_ids": [0, 2, 3]}',
    '{"timestamp": 3000, "input_length": 1500, "output_length": 30, "hash_ids": [0, 2, 4]}',
]


def mooncake(**change: Any) -> Any:
    return config(**({"kind": "mooncake", "file": "t.jsonl"} | change))


def test_a_mooncake_trace_keeps_lengths_and_ids_and_spreads_arrivals_over_their_buckets() -> None:
    requests = play(mooncake(), lines=K_LINES)
    assert [(r.prompt_tokens, r.block_ids) for r in requests if r.arrival_s < 3] == [(1000, (0, 1))]
    late = sorted(r.block_ids for r in requests if 3 <= r.arrival_s < 6)
    assert late == [(0, 2, 3), (0, 2, 4)]
    exact = play(mooncake(bucket_s=0), lines=K_LINES)
    assert [r.arrival_s for r in exact] == [0, 2.999, 3.0]
    assert [r.full_blocks for r in exact] == [(0,), (0, 2, 3), (0, 2)]
    assert [r.output_tokens for r in exact] == [10, 1, 30]


def test_a_trace_is_shortened_cut_scaled_and_repeated_as_stated() -> None:
    requests = play(mooncake(bucket_s=0, length_divisor=16, rate_scale=2, repeat=2), lines=K_LINES)
    assert [r.prompt_tokens for r in requests] == [63, 96, 94] * 2
    assert {r.block_tokens for r in requests} == {32}
    assert [len(r.block_ids) for r in requests] == [2, 3, 3] * 2
    assert [r.arrival_s for r in requests[:3]] == [0, 1.4995, 1.5]
    assert requests[3].arrival_s == pytest.approx(2.0)  # the span and a mean gap, played twice as fast
    assert not {i for r in requests[:3] for i in r.block_ids} & {i for r in requests[3:] for i in r.block_ids}
    cut = play(mooncake(bucket_s=0, max_input_tokens=600, start_s=2), lines=K_LINES)
    assert [(r.prompt_tokens, r.block_ids) for r in cut] == [(600, (0, 2)), (600, (0, 2))]
    at_rate = play(mooncake(rate_rps=6, repeat=100), lines=K_LINES)
    assert len(at_rate) / at_rate[-1].arrival_s == pytest.approx(6, rel=0.02)


def test_a_trace_at_other_arrivals_keeps_its_requests_in_order() -> None:
    as_recorded = play(mooncake(bucket_s=0), lines=K_LINES)
    even = play(mooncake(bucket_s=0, arrivals={"process": "paced", "rate_rps": 4}), lines=K_LINES)
    assert [one.block_ids for one in even] == [one.block_ids for one in as_recorded]
    assert gaps(even) == pytest.approx([0.25] * (len(even) - 1))
    twice = scaled_rate(mooncake(arrivals={"process": "paced", "rate_rps": 4}), 2)
    assert gaps(play(twice, lines=K_LINES)) == pytest.approx([0.125] * (len(even) - 1))
    with pytest.raises(ConfigError, match="own rate"):
        mooncake(rate_rps=3, arrivals={"process": "paced", "rate_rps": 4})


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("[1]", "line 1"),
        ("{", "line 1"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1}', "line 1: timestamp"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "line 1: input_length"),
        ('{"timestamp": 0, "input_length": 5, "output_length": "x"}', "line 1: output_length"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "line 1: hash_ids"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}', "line 1: hash_ids"),
        ("", "the file"),
    ],
)
def test_a_wrong_mooncake_line_is_refused_by_line_and_field(line: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        play(mooncake(), lines=[line])
    assert caught.value.field == field
    assert caught.value.file == "t.jsonl"


K_AZURE = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:17:03.9799600,4808,10",
    "2023-11-16 18:17:04.9799600,3180,8",
]


def azure(**change: Any) -> Any:
    return config(**({"kind": "azure", "file": "t.csv"} | change))


def test_an_azure_trace_starts_at_zero_and_has_no_prefixes() -> None:
    requests = play(azure(), lines=K_AZURE)
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens, r.block_ids) for r in requests] == [
        (0, 4808, 10, ()),
        (pytest.approx(1.0), 3180, 8, ()),
    ]


@pytest.mark.parametrize(
    ("lines", "field"),
    [
        ([], "line 1"),
        (["a,b"], "line 1"),
        (K_AZURE[:1], "the file"),
        ([K_AZURE[0], "x,1,2"], "line 2: TIMESTAMP"),
        ([K_AZURE[0], "2023-11-16 18:17:03.97,1.5,2"], "line 2: ContextTokens"),
        ([K_AZURE[0], "2023-11-16 18:17:03.97,1"], "line 2"),
    ],
)
def test_a_wrong_azure_line_is_refused_by_line_and_field(lines: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        play(azure(), lines=lines)
    assert caught.value.field == field


def test_the_shipped_traces_play_whole() -> None:
    for kind, file, count in (
        ("mooncake", "conversation_trace.jsonl", 12031),
        ("azure", "AzureLLMInferenceTrace_conv.csv", 19366),
        ("azure", "AzureLLMInferenceTrace_code.csv", 8819),
    ):
        trace = config(kind=kind, file=file)
        requests = play(trace, lines=trace_lines(trace, K_TOPOLOGIES))
        assert len(requests) == count
        assert all(gap >= 0 for gap in gaps(requests))
