"""What the router does with each kind of decision: dispatch, hold, shed, no path; and the policy's hooks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Action, Decision
from prfaas.model.errors import ConfigError
from prfaas.model.observations import RequestView, Snapshot
from prfaas.routing import Fleet, create_policy, policy_names, register_policy
from prfaas.routing.base import Policy

K_NAME = "told-by-a-test"


class Told(Policy):
    """Answers as the test says, and dispatches by another policy."""

    action = Action.DISPATCH

    def __init__(self, config: PolicyConfig, fleet: Fleet) -> None:
        super().__init__(config, fleet)
        self.inner = create_policy(PolicyConfig(name="homogeneous"), fleet)
        self.calls: Counter[str] = Counter()

    def decide(self, request: RequestView, snapshot: Snapshot, now: float) -> Decision:
        if Told.action is Action.DISPATCH:
            return self.inner.decide(request, snapshot, now)
        return Decision(request.request, K_NAME, now, Told.action, "told so", retry_after_s=3.0)

    def on_dispatch(self, *, request: RequestView, decision: Decision, now: float) -> None:
        self.calls["dispatch"] += 1

    def on_first_token(self, *, request: str, now: float, cached_tokens: int | None = None) -> None:
        self.calls["first token"] += 1

    def on_failed(self, *, request: str, site: str, reason: str, now: float) -> None:
        self.calls["failed"] += 1

    def on_finished(self, *, request: str, now: float) -> None:
        self.calls["finished"] += 1


if K_NAME not in policy_names():
    register_policy(K_NAME)(Told)

K_SETTINGS: dict[str, Any] = {"policy": {"name": K_NAME}}


def test_a_held_request_goes_when_the_policy_lets_it(stand: Any) -> None:
    async def main() -> None:
        async with stand(**K_SETTINGS) as s:
            Told.action = Action.HOLD
            try:
                asking = [asyncio.ensure_future(s.post()) for _ in range(3)]
                await s.settle(lambda: s.router.scheduler.pen.held == 3)
                assert not s.servers["west-p"].seen
            finally:
                Told.action = Action.DISPATCH
            s.router.scheduler.pen.wake()
            assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 3
            assert s.router.scheduler.pen.held == 0
            calls = s.router.scheduler.policy.calls
            assert calls == {"dispatch": 3, "first token": 3, "finished": 3}

    asyncio.run(main())


def test_what_is_shed_held_too_long_or_too_many_to_hold_is_429_and_no_path_503(stand: Any) -> None:
    async def main() -> None:
        settings = K_SETTINGS | {"limits": {"max_held": 1}, "retry": {"total_s": 0.3}}
        async with stand(**settings) as s:
            try:
                for action, status, code in (
                    (Action.SHED, 429, "shed"),
                    (Action.NO_PATH, 503, "no_path"),
                ):
                    Told.action = action
                    found, headers, answer = await s.post()
                    assert (found, answer["error"]["code"]) == (status, code)
                    assert headers["Retry-After"] == "3"
                Told.action = Action.HOLD
                both = await asyncio.gather(s.post(), s.post())
                assert [status for status, _, _ in both] == [429, 429]
            finally:
                Told.action = Action.DISPATCH
            assert s.router.scheduler.pen.held == 0

    asyncio.run(main())


def test_requests_wait_at_the_door_for_a_long_queue_and_are_let_in_by_their_deadlines(stand: Any) -> None:
    async def main() -> None:
        async with stand(policy={"name": "homogeneous", "hold_above_s": 0.5}) as s:
            queued = s.servers["west-p"].load
            queued["num_waiting_uncached_tokens"] = 5000
            west = s.router.servers.get("west-p")
            await s.settle(lambda: west.reported.waiting_uncached_tokens == 5000)
            asking = []
            for number, within_ms in enumerate((50_000, 20_000, 40_000, 30_000)):
                headers = {"x-prfaas-first-token-ms": str(within_ms)}
                asking.append(asyncio.ensure_future(s.post(headers=headers)))
                await s.settle(lambda number=number: s.router.scheduler.pen.held == number + 1)
            assert not s.servers["west-p"].seen
            held = [one.request for one in s.router.scheduler.records]
            queued["num_waiting_uncached_tokens"] = 0
            answers = await asyncio.gather(*asking)
            assert [status for status, _, _ in answers] == [200] * 4
            sent = [
                one.request for one in s.router.scheduler.records if one.decision.action is Action.DISPATCH
            ]
            assert sent == [held[place] for place in (1, 3, 2, 0)]
            told = await s.metrics()
            assert told["prfaas_router_held_seconds_count"] == 4
            assert told["prfaas_router_held_seconds_sum"] > 2 * told["prfaas_router_overhead_seconds_sum"]
            assert s.router.scheduler.pen.queues == {}

    asyncio.run(main())


def test_servers_that_keep_an_order_are_told_it_and_the_others_get_what_the_client_said(stand: Any) -> None:
    async def main() -> None:
        async with stand(ordered=True) as s:
            for within_ms in (50_000, 20_000, 40_000):
                headers = {"x-prfaas-first-token-ms": str(within_ms)}
                assert (await s.post(headers=headers, priority=7))[0] == 200
            late, soon, middle = (one["priority"] for one in s.servers["west-p"].seen)
            assert soon > middle > late
            # A time of day in ms, so that several routers mean the same by it.
            assert abs(-soon / 1e3 - time.time() - 20) < 15
            assert {one["priority"] for one in s.servers["west-d"].seen} == {7}
        async with stand() as s:
            await s.post()
            assert "priority" not in s.servers["west-p"].seen[0]

    asyncio.run(main())


def test_service_by_deadline_is_refused_where_a_server_doesnt_keep_an_order(stand: Any) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="west-p"):
            async with stand(policy={"name": "prices", "service": "deadline"}):
                pass
        async with stand(ordered=True, policy={"name": "prices", "service": "deadline"}) as s:
            assert (await s.post())[0] == 200

    asyncio.run(main())


def test_a_failed_attempt_and_the_end_are_each_told_once(stand: Any) -> None:
    async def main() -> None:
        async with stand(**K_SETTINGS) as s:
            await s.servers["west-p"].stop()
            status, _, _ = await s.post()
            assert status == 503
            calls = s.router.scheduler.policy.calls
            assert calls["failed"] >= 1
            assert calls["finished"] == 1
            assert calls["first token"] == 0

    asyncio.run(main())
