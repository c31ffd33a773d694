"""The door holds a request until an instance is about to begin it: over real sockets, on servers that take
their time, one prompt after another, in order of priority.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import Any

import pytest
from aiohttp import web

K_LATE = {"name": "prices", "service": "deadline", "classes": {"default": {"base_s": 60}}}
K_ROLES = {"west-p0": "prefill", "west-p1": "prefill", "west-d": "decode"}
K_WORDS = "the quick brown fox jumps over the lazy dog " * 30
"""Some 300 tokens: at the stand's 1,000 a second and 0.02 s a prompt, a third of a second."""


class Instance:
    """Makes a fake server prefill one prompt after another, by priority. Keeps when each came and began."""

    def __init__(self, fake: Any) -> None:
        self.came: dict[str, float] = {}
        self.began: dict[str, float] = {}
        self.factor = 1.0
        """What it takes, of what the router believes."""
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._serials = itertools.count()
        self._busy = False
        fake.fault = self
        fake.settings = {"prefill_max_requests": 1, "chunked_prefill_size": 8192}

    async def __call__(self, fake: Any, request: web.Request, body: dict[str, Any]) -> None:
        self.came[body["rid"]] = time.monotonic()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (-body["priority"], next(self._serials), turn))
        self._next()
        await turn
        self.began[body["rid"]] = time.monotonic()
        try:
            await asyncio.sleep(self.factor * (0.02 + 302 / 1000))
        finally:
            self._busy = False
            self._next()

    def _next(self) -> None:
        if not self._busy and self._queue:
            self._busy = True
            heapq.heappop(self._queue)[2].set_result(None)


def ask(s: Any, within_ms: int | None = None) -> asyncio.Task[Any]:
    headers = {} if within_ms is None else {"x-prfaas-first-token-ms": str(within_ms)}
    messages = [{"role": "user", "content": K_WORDS}]
    return asyncio.create_task(s.post(headers=headers, messages=messages))


async def instances(s: Any) -> list[Instance]:
    """The stand's prefill servers, once the router knows how they prefill."""
    found = [Instance(fake) for name, fake in s.servers.items() if fake.role == "prefill"]
    handles = [one for one in s.router.servers if one.role == "prefill"]
    for one in handles:
        one.chunk_tokens, one.prefill_requests = 8192, 1
    return found


async def decided(s: Any, count: int) -> None:
    await s.settle(lambda: len({one.request for one in s.router.scheduler.records}) == count)


def test_prompts_are_sent_just_before_they_begin_and_no_instance_waits_for_one(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, ordered=True, policy=K_LATE) as s:
            two = await instances(s)
            asking = [ask(s) for _ in range(12)]
            await decided(s, 12)
            assert s.router.scheduler.pen.held >= 8
            assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 12
            waits = [one.began[name] - one.came[name] for one in two for name in one.came]
            assert len(waits) == 12
            assert sorted(waits)[8] < 0.32  # all but the first would have waited for a prefill, and longer
            assert min(len(one.began) for one in two) >= 4
            policy = s.router.scheduler.policy
            await s.settle(lambda: len(policy.lanes) == 0)
            assert (policy.lanes.held(), s.router.scheduler.pen.held) == (0, 0)

    asyncio.run(main())


def test_a_servers_slowness_or_haste_costs_it_no_prompt(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, ordered=True, policy=K_LATE) as s:
            slow, quick = await instances(s)
            slow.factor, quick.factor = 1.6, 0.5
            asking = [ask(s) for _ in range(16)]
            assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 16
            assert len(quick.began) > len(slow.began)  # which no choice at arrival could know

    asyncio.run(main())


def test_the_most_urgent_of_those_held_goes_first(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, ordered=True, policy=K_LATE) as s:
            two = await instances(s)
            asking = []
            for number, within_ms in enumerate((70_000, 70_000, 50_000, 40_000, 30_000, 20_000)):
                asking.append(ask(s, within_ms))
                await decided(s, number + 1)
            names = list(dict.fromkeys(one.request for one in s.router.scheduler.records))
            await asyncio.gather(*asking)
            began = sorted((at_s, name[:-3]) for one in two for name, at_s in one.began.items())
            order = [names.index(name) for _, name in began]
            assert set(order[:2]) == {0, 1}  # nothing else was there yet
            assert set(order[2:4]) == {5, 4}
            assert set(order[4:]) == {3, 2}

    asyncio.run(main())


def test_one_that_hangs_up_while_it_is_held_leaves_nothing(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, ordered=True, policy=K_LATE) as s:
            two = await instances(s)
            asking = [ask(s) for _ in range(6)]
            await decided(s, 6)
            for one in asking[2:]:
                one.cancel()
            await s.settle(lambda: s.router.scheduler.pen.held == 0)
            assert s.router.scheduler.policy.lanes.held() == 0
            await asyncio.gather(*asking[:2])
            assert sum(len(one.came) for one in two) == 2
            assert len(s.router.scheduler.policy.lanes) == 0

    asyncio.run(main())


def test_a_reload_with_another_policy_asks_it_for_all_that_are_held(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, ordered=True, policy=K_LATE) as s:
            two = await instances(s)
            asking = [ask(s) for _ in range(8)]
            await decided(s, 8)
            old = s.router.scheduler.policy
            assert old.lanes.held() == 6
            s.settings["policy"] = K_LATE | {"bind": "arrival"}
            await s.router.reload()
            await s.settle(lambda: s.router.scheduler.pen.held == 0)
            assert s.router.scheduler.policy is not old
            await s.settle(lambda: sum(len(one.came) for one in two) == 8)
            assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 8
            assert (len(old.lanes), len(s.router.scheduler.policy.lanes)) == (0, 0)

    asyncio.run(main())


@pytest.mark.parametrize("limit", [{"limits": {"max_held": 2}}, {"retry": {"total_s": 4.0}}])
def test_who_finds_the_pen_full_or_has_waited_half_its_time_is_sent_and_not_refused(
    stand: Any, limit: dict[str, Any]
) -> None:
    async def main() -> None:
        roles = {"west-p0": "prefill", "west-d": "decode"}
        async with stand(roles, ordered=True, policy=K_LATE, **limit) as s:
            (one,) = await instances(s)
            asking = [ask(s) for _ in range(9)]
            assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 9
            waits = [one.began[name] - one.came[name] for name in one.came]
            assert max(waits) > 0.25  # at the server

    asyncio.run(main())


def test_what_is_held_for_a_server_that_dies_is_served_by_the_other(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, ordered=True, policy=K_LATE) as s:
            await instances(s)
            asking = [ask(s) for _ in range(8)]
            await decided(s, 8)
            await s.servers["west-p0"].stop()
            assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 8
            assert s.router.scheduler.policy.lanes.held() == 0

    asyncio.run(main())
