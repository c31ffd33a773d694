"""Whole traces: what a scale means, and what a record of them says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas.config.experiment import CrossTraffic, Experiment, SetLink
from prfaas_testbed.claim import runs, traces


def part(name: str, **workload: Any) -> Experiment:
    found = dict(runs.parts(traces.K_SET))[name]
    return found.model_copy(update={"workload": found.workload.model_copy(update=workload)})


def test_a_scale_multiplies_instances_links_and_requests_for_the_same_time() -> None:
    once, fourfold = (runs.requests_of(traces.scaled(part("code"), scale), 0) for scale in (1, 4))
    assert len(fourfold) == 4 * len(once)
    assert fourfold[-1].arrival_s == pytest.approx(once[-1].arrival_s, rel=0.01)
    found = traces.scaled(part("code-trouble"), 4)
    assert [one.count for one in found.instances] == [16, 28, 4]
    rates = [event.set.rate_mbps for event in found.timeline if isinstance(event, SetLink)]
    assert rates == [400_000, 400_000, 12_000]
    assert [event.rate_mbps for event in found.timeline if isinstance(event, CrossTraffic)] == [380_000]


def test_even_arrivals_keep_the_requests_and_their_order() -> None:
    bursty, even = (runs.requests_of(part(name), 0) for name in ("code", "code-even"))
    assert [one.prompt_tokens for one in bursty] == [one.prompt_tokens for one in even]
    assert even[-1].arrival_s == pytest.approx(bursty[-1].arrival_s, rel=0.05)


def test_a_row_tells_of_a_run_and_is_the_same_again() -> None:
    run = traces.Run("conversation-trouble", part("conversation-trouble", requests=600), 1, "prices")
    first, again = (
        {name: value for name, value in traces.play_one(run).items() if name != "cpu_s"} for _ in range(2)
    )
    assert first == again
    assert (first["requests"], first["lost"], first["failed"]) == (600, 0, 0)
    assert 0 < first["cached_share"] <= first["repeated_share"] < 1


def record(ours: float) -> dict[str, Any]:
    within = {"paper": 0.5, "prices": ours}
    names = [f"{trace}{variant}" for trace in ("chat", "code") for variant in traces.K_VARIANTS]
    rows = [
        {"part": name, "scale": 1, "policy": policy, "repetition": 0, "within_slo": within[policy], "lost": 0,
         "failed": 0, "requests": 900, "ttft_mean_s": 1.0, "ttft_p90_s": 2.0, "cached_share": 0.1,
         "repeated_share": 0.2, "offloaded_share": 0.5, "moved_share": 0.1, "egress_gbps": 9.0,
         "simulated_s": 1000.0, "cpu_s": 4.0}
        for name in names
        for policy in traces.K_POLICIES
    ]  # fmt: skip
    return {"parts": names, "rows": rows}


def test_the_goals_compare_ours_with_the_reports_policy_on_every_trace(tmp_path: Path) -> None:
    assert all(goal.reached for goal in traces.goals(record(0.6)))
    missed = [goal.text for goal in traces.goals(record(0.4)) if not goal.reached]
    assert len(missed) == 1
    assert "at least as many requests" in missed[0]
    assert "chat, even, trouble x1" in traces.tell(record(0.6))
    assert traces.draw(record(0.6), tmp_path) == ["traces.png"]
