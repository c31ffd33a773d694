from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas.config.loading import Strict, check
from prfaas.config.workload import WorkloadConfig, trace_lines
from prfaas.model.errors import ConfigError, UsageError


class File(Strict):
    workload: WorkloadConfig


K_TOPOLOGIES = Path(__file__).parents[3] / "topologies"
K_POISSON = {"process": "poisson", "rate_rps": 2}
K_GOOD: dict[str, Any] = {
    "kind": "synthetic",
    "arrivals": K_POISSON,
    "input_tokens": 100,
    "output_tokens": 10,
    "requests": 5,
}
K_LOGNORMAL = {"distribution": "truncated_lognormal", "mu": 9.9, "sigma": 1, "min": 128, "max": 131072}


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"kind": "replay"}, "workload.kind", "'synthetic', 'sessions', 'mooncake', 'azure'"),
        ({"kind": None}, "workload.kind", "expected"),
        ({"arrivals": {"process": "poison"}}, "workload.arrivals.process", "'poisson'"),
        (
            {"arrivals": {"process": "poisson", "rate_rps": -1}},
            "workload.arrivals.rate_rps",
            "greater than 0",
        ),
        ({"arrivals": {"process": "poisson"}}, "workload.arrivals.rate_rps", "required"),
        ({"input_tokens": {"distribution": "zipf"}}, "workload.input_tokens", "truncated_lognormal, uniform"),
        ({"input_tokens": K_LOGNORMAL | {"max": 100}}, "workload.input_tokens", "max must be above min"),
        ({"input_tokens": K_LOGNORMAL | {"sigma": 0}}, "workload.input_tokens.sigma", "greater than 0"),
        ({"input_tokens": K_LOGNORMAL | {"mu": 40}}, "workload.input_tokens", "at all likely"),
        ({"input_tokens": 0}, "workload.input_tokens", "greater than or equal to 1"),
        ({"tokens": 3}, "workload.tokens", "known here: arrivals, block_tokens, classes"),
        ({"requests": None}, "workload", "needs requests, or duration_s"),
        ({"tenants": {"a": 0}}, "workload.tenants.a", "greater than 0"),
    ],
)
def test_a_wrong_workload_is_refused_by_field(change: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        check({"workload": K_GOOD | change}, File, "f.yaml")
    assert caught.value.field == field


def test_a_trace_takes_one_kind_of_rate_and_whole_blocks() -> None:
    trace = {"kind": "mooncake", "file": "conversation_trace.jsonl"}
    with pytest.raises(ConfigError, match="not both"):
        check({"workload": trace | {"rate_scale": 2, "rate_rps": 3}}, File, "f.yaml")
    with pytest.raises(ConfigError, match="must divide a block's 512 tokens"):
        check({"workload": trace | {"length_divisor": 3}}, File, "f.yaml")


def test_an_unknown_trace_lists_what_there_is() -> None:
    config = check({"workload": {"kind": "azure", "file": "nope.csv"}}, File, "f.yaml").workload
    with pytest.raises(UsageError, match=r"unknown trace 'nope.csv'; known: Azure.*conversation_trace.jsonl"):
        trace_lines(config, K_TOPOLOGIES)


def test_workloads_without_a_trace_read_nothing(tmp_path: Path) -> None:
    assert trace_lines(check({"workload": K_GOOD}, File, "f.yaml").workload, tmp_path) == []
