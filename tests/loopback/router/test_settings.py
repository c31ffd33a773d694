"""The size of a server's prefill steps is the server's own word, and counts in the choice among instances."""

from __future__ import annotations

import asyncio
from typing import Any

K_DEADLINE = {"name": "prices", "service": "deadline"}
K_SETTINGS: dict[str, Any] = {
    "chunked_prefill_size": 512, "max_prefill_tokens": 16384, "prefill_max_requests": 2, "version": "0.5.23"
}  # fmt: skip


def test_the_size_of_steps_is_asked_of_the_server_once_and_anew_after_it_was_gone(stand: Any) -> None:
    async def main() -> None:
        async with stand(policy=K_DEADLINE, ordered=True) as s:
            west, handle = s.servers["west-p"], s.router.servers.get("west-p")
            await s.settle(lambda: west.settings_asked == 1)
            assert (await s.post())[0] == 200
            lane = s.router.scheduler.policy.lanes.lanes["west-p"]
            assert lane.chunk_tokens == 8192, "nobody has told another"
            await west.stop()
            await s.settle(lambda: handle.misses >= 1)
            west.settings = K_SETTINGS
            await west.start()
            await s.settle(lambda: handle.chunk_tokens == 512)
            await s.settle(lambda: handle.up(s.router.clock()))
            assert (await s.post())[0] == 200
            lane = s.router.scheduler.policy.lanes.lanes["west-p"]
            assert (lane.chunk_tokens, lane.prefill_requests) == (512, 2)
            await asyncio.sleep(0.3)
            assert west.settings_asked == 2
            async with s.session.get(s.url + "/health") as response:
                told = (await response.json())["servers"]["west-p"]
                assert (told["chunk_tokens"], told["prefill_requests"]) == (512, 2)
            east = 'prfaas_router_refused_input_total{cause="HTTP 404",source="server_info"}'
            assert (await s.metrics())[east] >= 1

    asyncio.run(main())
