"""What three senders' transfers add up to."""

from __future__ import annotations

import pytest

from prfaas_testbed.bench.share import K_RATE_MBPS, judge, summary


def row(asked_s: float, ended_s: float, size_bytes: int = 1_000_000) -> dict:
    return {
        "asked_s": asked_s, "admitted_s": asked_s, "ended_s": ended_s, "ok": True,
        "size_bytes": size_bytes, "deadline_s": 60.0,
    }  # fmt: skip


def test_goodput_together_counts_every_byte_to_the_last_one() -> None:
    sent = {
        "one": [row(0.0, 1.0), row(1.0, 2.0)],
        "two": [row(0.0, 4.0, 8_000_000)],
        "three": [row(0.0, 5.0, 10_000_000)],
    }
    found = summary(sent, [])
    assert found["together_mbps"] == pytest.approx(20e6 * 8e-6 / 5)
    assert found["goodput_mbps"]["one"] == pytest.approx(2e6 * 8e-6 / 2)


def test_a_link_left_half_empty_falls_short_and_a_full_one_passes() -> None:
    found = {"rate_mbps": K_RATE_MBPS, "most_promised": 1.0, "jain": 1.0, "missed": 0}
    judged = {
        mbps: next(x for x in judge({**found, "together_mbps": mbps}) if x["name"] == "share/filled")
        for mbps in (100.0, 185.0)
    }
    assert judged[100.0]["outcome"] == "failed"
    assert judged[185.0]["outcome"] == "passed"
