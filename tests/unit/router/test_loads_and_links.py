"""Reports that can't be true are refused; a link that failed rests, then is tried by one request."""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest

from prfaas.config.router import Link
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkEstimate
from prfaas.router.fleet import Reported
from prfaas.router.holding import HoldingPen
from prfaas.router.link_status import read_status
from prfaas.router.links import LinkBook
from prfaas.router.loads import ReportError, read_report, read_steps


def report(*loads: dict[str, Any]) -> bytes:
    return json.dumps({"timestamp": "t", "loads": list(loads)}).encode()


def test_ranks_are_summed_and_the_speed_is_what_prefill_did_while_busy() -> None:
    one = {"num_running_reqs": 1, "num_waiting_uncached_tokens": 10, "max_running_requests": 8}
    first, totals = read_report(
        report({**one, "total_prefill_uncached_tokens": 100}, one), Reported(), None, 5.0
    )
    assert (first.running, first.waiting_uncached_tokens, first.max_running) == (2, 20, 16)
    assert first.prefill_tokens_per_s is None
    later = {"total_prefill_uncached_tokens": 1100, "total_prefill_busy_us": 500_000}
    second, _ = read_report(report(later), first, totals, 6.0)
    assert second.prefill_tokens_per_s == pytest.approx(2000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        report(),
        report({"num_running_reqs": -1}),
        report({"num_used_tokens": 1 << 60}),
        report({"num_running_reqs": 1.5}),
        report({"disaggregation": {"decode_prealloc_queue_reqs": -3}}),
    ],
)
def test_a_report_that_cannot_be_true_is_refused(data: bytes) -> None:
    with pytest.raises(ReportError):
        read_report(data, Reported(), None, 0.0)


def test_a_speed_beyond_anything_built_is_refused() -> None:
    data = report({"total_prefill_uncached_tokens": 1 << 39, "total_prefill_busy_us": 10})
    with pytest.raises(ReportError):
        read_report(data, Reported(), (0, 0), 0.0)


K_SERVER_INFO = {
    "model_path": "/models/m", "tokenizer_path": "/models/m", "page_size": 1, "dtype": "auto",
    "max_prefill_tokens": 16384, "chunked_prefill_size": 2048, "prefill_max_requests": None,
    "disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 8998, "api_key": None,
    "launch_command": {"argv": ["sglang", "serve"]}, "max_total_num_tokens": 65536,
    "kv_events": None, "startup_time": 1.5, "version": "0.5.23", "frontend": "python",
    "internal_states": [{"last_gen_throughput": 0.0, "memory_usage": {"weight": 0.1, "kvcache": 0.5}}],
}  # fmt: skip
"""As SGLang 0.5.23 answers, but for most of its several hundred fields."""


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 2048),
        ({"chunked_prefill_size": -1}, 16384),
        ({"chunked_prefill_size": 0, "max_prefill_tokens": None}, None),
        ({"chunked_prefill_size": None}, None),
    ],
)
def test_a_servers_settings_tell_the_size_of_its_steps(fields: dict[str, Any], tokens: int | None) -> None:
    assert read_steps(json.dumps(K_SERVER_INFO | fields).encode()) == (tokens, None)
    told = K_SERVER_INFO | fields | {"prefill_max_requests": 3}
    assert read_steps(json.dumps(told).encode()) == (tokens, 3)
    assert read_steps(b'{"profiled": true}') == (None, None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"chunked_prefill_size": "many"}',
        b'{"chunked_prefill_size": 1.5}',
        b'{"chunked_prefill_size": 99999999999}',
        b'{"chunked_prefill_size": -1, "max_prefill_tokens": -1}',
        b'{"chunked_prefill_size": 512, "prefill_max_requests": 0}',
    ],
)
def test_settings_that_cannot_be_true_are_refused(data: bytes) -> None:
    with pytest.raises(ReportError):
        read_steps(data)


K_LINK = LinkId("east", "west")


def book() -> LinkBook:
    made = LinkBook(cool_down_s=5.0, max_age_s=2.0)
    made.apply(
        (Link(source="east", target="west", rate_mbps=100, rtt_ms=40, reserved_mbps=10),),
        cool_down_s=5.0,
        max_age_s=2.0,
    )
    return made


def test_a_link_is_believed_as_configured_until_its_pump_tells_and_while_that_is_fresh() -> None:
    links = book()
    assert links.estimates(0.0)[K_LINK].usable_bps == 90e6
    told = LinkEstimate(
        link=K_LINK, at_s=1.0, rate_bps=5e6, low_bps=0, high_bps=9e6, rtt_s=0.1, backlog_bytes=7
    )
    assert links.tell(told)
    assert links.estimates(2.0)[K_LINK] == told
    assert links.estimates(4.0)[K_LINK].rate_bps == 100e6
    assert not links.tell(LinkEstimate(LinkId("a", "b"), 0, 1, 1, 1, 1))


def test_a_link_that_failed_rests_then_one_request_tries_it_and_the_rest_grows() -> None:
    links = book()
    links.on_sent(K_LINK)
    links.on_failed(K_LINK, 10.0)
    links.on_failed(K_LINK, 10.1)  # others that were under way say nothing new
    assert not links.estimates(14.9)[K_LINK].up
    assert links.estimates(15.1)[K_LINK].up
    links.on_sent(K_LINK)
    assert not links.estimates(15.2)[K_LINK].up
    links.on_failed(K_LINK, 16.0)
    assert not links.estimates(25.9)[K_LINK].up
    assert links.estimates(26.1)[K_LINK].up
    assert links.on_sent(K_LINK), "a probe"
    links.on_given_up(K_LINK, probe=True)
    assert links.estimates(26.2)[K_LINK].up
    links.on_sent(K_LINK)
    links.on_succeeded(K_LINK, 26.25)
    links.on_sent(K_LINK)
    assert links.estimates(26.3)[K_LINK].up


def test_an_attempt_from_before_a_failure_does_not_prolong_the_rest_however_late_it_fails() -> None:
    links = book()
    links.on_failed(K_LINK, 10.0, sent_s=2.0)
    links.on_sent(K_LINK)  # the probe, after the rest
    links.on_failed(K_LINK, 16.0, sent_s=3.0)
    assert not links.estimates(16.1)[K_LINK].up, "one probe at a time"
    links.on_failed(K_LINK, 17.0, sent_s=15.5)
    assert not links.estimates(26.9)[K_LINK].up
    assert links.estimates(27.1)[K_LINK].up


def test_who_was_sent_before_a_failure_and_leaves_makes_no_room_for_another_probe() -> None:
    links = book()
    assert not links.on_sent(K_LINK)
    links.on_failed(K_LINK, 10.0)
    assert links.on_sent(K_LINK)  # the probe, after the rest
    assert not links.estimates(15.1)[K_LINK].up
    links.on_given_up(K_LINK, probe=False)
    assert not links.estimates(15.2)[K_LINK].up, "the probe is still under way"
    links.on_given_up(K_LINK, probe=True)
    assert links.estimates(15.3)[K_LINK].up


def test_a_link_that_carries_others_through_does_not_rest_for_one_that_failed() -> None:
    links = book()
    links.on_failed(K_LINK, 10.0)
    assert not links.estimates(10.5)[K_LINK].up
    links.on_succeeded(K_LINK, 10.5)
    assert links.estimates(10.5)[K_LINK].up
    links.on_failed(K_LINK, 11.0)
    assert not links.estimates(15.9)[K_LINK].up
    assert links.estimates(16.1)[K_LINK].up, "its rest is the first one's again"


def test_the_log_tells_when_a_link_rests_carries_again_and_what_its_ledger_thinks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    links = book()
    down = LinkEstimate(link=K_LINK, at_s=1.0, rate_bps=5e6, low_bps=0, high_bps=9e6, rtt_s=0.1, up=False)
    with caplog.at_level("INFO", "prfaas.router"):
        for at_s in (10.0, 10.1):
            links.on_failed(K_LINK, at_s)
        for _ in range(2):
            links.on_succeeded(K_LINK, 16.0)
        for told in (down, down, replace(down, up=True)):
            links.tell(told)
    assert [record.getMessage() for record in caplog.records] == [
        "link east>west rests for 5 s: 1 in a row failed on it",
        "link east>west carries again",
        "link east>west is down, by its ledger",
        "link east>west is up, by its ledger",
    ]


def test_silence_counts_against_a_link_unless_it_has_just_carried_another() -> None:
    links = book()
    links.on_succeeded(K_LINK, 10.0)
    links.on_failed(K_LINK, 10.9, sent_s=5.0, silent=True)
    assert links.estimates(10.9)[K_LINK].up, "who is silent is that request's server"
    links.on_failed(K_LINK, 10.95, sent_s=5.0)
    assert not links.estimates(11.0)[K_LINK].up, "what is told of the link counts at any time"
    links.on_succeeded(K_LINK, 12.0)
    links.on_failed(K_LINK, 13.1, sent_s=11.0, silent=True)
    assert not links.estimates(13.1)[K_LINK].up, "nothing has come by way of it for a second"


def test_who_waits_for_the_same_thing_keeps_its_order() -> None:
    pen = HoldingPen()
    assert not pen.ahead("west", 1.0)
    with pen.place() as late, pen.place() as soon, pen.place() as elsewhere:
        late.at("west", 9.0)
        soon.at("west", 5.0)
        elsewhere.at("east", 1.0)
        assert pen.ahead("west", 9.0, late)
        assert not pen.ahead("west", 5.0, soon)
        assert pen.ahead("west", 7.0), "a newcomer waits behind the more urgent"
        assert pen.ahead("west", 5.0), "and behind its equals"
        assert not pen.ahead("west", 4.0)
        assert not pen.ahead("north", 100.0)
        with pen.place() as equal:
            equal.at("west", 5.0)
            assert pen.ahead("west", 5.0, equal)
            assert not pen.ahead("west", 5.0, soon)
            assert not pen.ahead("west", 4.0, equal), "its order has become more urgent since"
        soon.at("east", 5.0)
        assert not pen.ahead("west", 9.0, late)
        assert pen.ahead("east", 5.0, soon)
    assert pen.queues == {}
    assert pen.held == 0


def test_the_most_urgent_wake_first_and_those_that_left_are_forgotten() -> None:
    async def main() -> None:
        pen, woken = HoldingPen(), []

        async def wait(urgency: float) -> None:
            with pen.place():
                await pen.wait(urgency, 30.0)
            woken.append(urgency)

        tasks = [asyncio.ensure_future(wait(urgency)) for urgency in (3.0, 1.0, 2.0, 4.0)]
        await asyncio.sleep(0)
        assert pen.held == 4
        tasks[1].cancel()
        await asyncio.wait({tasks[1]})
        pen.wake(2)
        await asyncio.wait({tasks[0], tasks[2]})
        assert woken == [2.0, 3.0]
        pen.wake()
        await asyncio.wait({tasks[3]})
        assert woken == [2.0, 3.0, 4.0]
        assert pen.held == 0

    asyncio.run(main())


def test_one_that_waits_alone_is_called_when_the_policy_says_though_nothing_else_happens() -> None:
    class Recalling:
        """Whose turn it is at 0.05 s."""

        def __init__(self) -> None:
            self.asked_s: list[float] = []

        def recalls(self, now: float) -> tuple[list[str], float]:
            self.asked_s.append(now)
            return (["alone"], math.inf) if now >= 0.05 else ([], 0.05)

    async def main() -> None:
        pen, policy, began_s = HoldingPen(), Recalling(), time.monotonic()
        with pen.place():
            await pen.until_called("alone", 30.0, policy, lambda: time.monotonic() - began_s)  # type: ignore[arg-type]
        assert len(policy.asked_s) >= 2
        assert policy.asked_s[-1] >= 0.05

    asyncio.run(asyncio.wait_for(main(), 10.0))


def page(**fields: Any) -> bytes:
    estimate = {"at_s": 9.0, "rate_bps": 5e6, "low_bps": 1e6, "high_bps": 9e6, "rtt_s": 0.04, "up": True}
    return json.dumps([{"link": "east>west", "estimate": estimate | fields, "hosted": True}]).encode()


def test_a_pumps_page_tells_the_links_estimate_as_of_now() -> None:
    found = read_status(page(backlog_bytes=11, reserved_bps=2e6, up=False), K_LINK, 70.0)
    assert found is not None
    assert (found.at_s, found.rate_bps, found.backlog_bytes) == (70.0, 5e6, 11)
    assert (found.reserved_bps, found.up) == (2e6, False)
    assert read_status(page(), LinkId("a", "b"), 70.0) is None
    assert read_status(b'[{"link": "east>west", "estimate": null}]', K_LINK, 70.0) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        page(rate_bps=-1),
        page(high_bps=1e300),
        page(rtt_s=-1),
        page(loss=2),
        page(backlog_bytes=-1),
    ],
)
def test_a_pumps_page_that_cannot_be_true_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_status(data, K_LINK, 0.0)
