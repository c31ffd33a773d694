"""A failure that is one request's or one server's costs it alone; one of the link's keeps others from it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

K_OF_SGLANG = (
    "Prefill transfer failed for request rank=0 req.rid='9f-00' req.bootstrap_room=41 with exception "
)
K_LATE = (
    K_OF_SGLANG + "KVTransferError(bootstrap_room=41): KV transfer aborted: KV: deadline (not acknowledged)"
)
K_KILLED = (
    K_OF_SGLANG + "KVTransferError(bootstrap_room=41): KV transfer aborted: KV: source gone (process 7)"
)
K_OWN = [K_KILLED, "CUDA out of memory. Tried to allocate 2.00 GiB", "Internal Server Error"]
K_RETRY = {"cool_down_s": 30.0, "backoff_s": 0.01}
K_QUIET = {"interval_s": 60.0}


def failing_for(prompt: str) -> Any:
    """A server that answers this prompt with an error, each time, and others as ever."""

    async def fault(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        error = {"object": "error", "message": "list index out of range", "code": 500}
        return web.json_response(error, status=500) if body["prompt"] == prompt else None

    return fault


def failing(text: str, times: int = 1000) -> Any:
    """A server that answers so many requests with an error of this text."""
    left = times

    async def fault(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        nonlocal left
        left -= 1
        error = {"object": "error", "message": text, "code": 500}
        return web.json_response(error, status=500) if left >= 0 else None

    return fault


async def hang(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def ask(s: Any, text: str, *, stream: bool = False) -> tuple[str, str]:
    """The site that prefilled, and the attempts it took."""
    status, headers, answer = await s.post("/v1/completions", prompt=text, stream=stream)
    assert status == 200, answer
    return headers["x-prfaas-site"], headers["x-prfaas-attempts"]


@pytest.mark.parametrize("text", K_OWN)
def test_an_error_of_one_request_leaves_its_link_to_others(stand: Any, long_text: str, text: str) -> None:
    async def main() -> None:
        async with stand(retry=K_RETRY) as s:
            s.servers["east-p"].fault = failing(text, 1)
            assert await ask(s, long_text) == ("west", "2")
            assert await ask(s, long_text) == ("east", "1")

    asyncio.run(main())


def test_a_transfer_that_came_too_late_keeps_others_off_the_link(stand: Any, long_text: str) -> None:
    async def main() -> None:
        async with stand(retry=K_RETRY) as s:
            s.servers["east-p"].fault = failing(K_LATE, 1)
            assert await ask(s, long_text) == ("west", "2")
            assert await ask(s, long_text) == ("west", "1")
            assert len(s.servers["east-p"].seen) == 1

    asyncio.run(main())


def test_decode_that_hangs_when_prefill_has_ended_leaves_the_link_to_others(
    stand: Any, long_text: str
) -> None:
    async def main() -> None:
        patience = {"first_token_min_s": 0.3, "first_token_factor": 0.01}
        roles = {"west-p": "prefill", "west-d": "decode", "west-e": "decode", "east-p": "prefill"}
        async with stand(roles, retry={**K_RETRY, **patience}) as s:
            s.servers["west-d"].fault = hang
            assert await ask(s, long_text, stream=True) == ("east", "2")
            s.servers["west-d"].fault = None
            assert await ask(s, long_text, stream=True) == ("east", "1")

    asyncio.run(main())


def test_a_far_server_that_hangs_leaves_the_link_to_its_neighbour(stand: Any, long_text: str) -> None:
    async def main() -> None:
        patience = {"first_token_min_s": 0.5, "first_token_factor": 0.01}
        roles = {"west-p": "prefill", "west-d": "decode", "east-p": "prefill", "east-q": "prefill"}
        async with stand(roles, retry={**K_RETRY, **patience}, loads=K_QUIET) as s:
            s.servers["east-p"].fault = hang
            asked = []
            for _ in range(30):
                asked.append(asyncio.create_task(ask(s, long_text)))
                await asyncio.sleep(0.05)
            ways = await asyncio.gather(*asked)
            assert ("west", "2") in ways, "some met the one that hangs"
            assert {site for site, attempts in ways if attempts == "1"} == {"east"}
            s.servers["east-p"].fault = None
            assert await ask(s, long_text) == ("east", "1")

    asyncio.run(main())


def test_a_far_site_that_is_silent_keeps_others_off_the_link(stand: Any, long_text: str) -> None:
    async def main() -> None:
        patience = {"first_token_min_s": 0.2, "first_token_factor": 0.01}
        async with stand(retry={**K_RETRY, **patience}, loads=K_QUIET) as s:
            s.servers["east-p"].fault = hang
            assert await ask(s, long_text) == ("west", "2")
            assert await ask(s, long_text) == ("west", "1")

    asyncio.run(main())


def test_a_server_that_brings_nothing_but_errors_rests_and_its_neighbour_serves(
    stand: Any, long_text: str
) -> None:
    async def main() -> None:
        roles = {"west-p": "prefill", "west-d": "decode", "east-p": "prefill", "east-q": "prefill"}
        async with stand(roles, retry=K_RETRY) as s:
            sick = s.servers["east-p"]
            sick.fault = failing("CUDA error: an illegal memory access was encountered")
            ways = [await ask(s, long_text) for _ in range(8)]
            assert len(sick.seen) == 3, "as many as may be those requests' own"
            assert ways.count(("west", "2")) == 3
            assert ways[-5:] == [("east", "1")] * 5
            assert len(s.servers["east-q"].seen) == 5
            # Its load says nothing of its engine: it still rests when that has been told again.
            await asyncio.sleep(0.2)
            assert await ask(s, long_text) == ("east", "1")
            assert len(sick.seen) == 3

    asyncio.run(main())


def test_a_server_that_rested_is_tried_again_and_serves_when_it_is_well(stand: Any, long_text: str) -> None:
    async def main() -> None:
        async with stand(retry={"cool_down_s": 0.3, "backoff_s": 0.01}) as s:
            s.servers["east-p"].fault = failing("Internal Server Error", 4)
            for _ in range(3):
                assert await ask(s, long_text) == ("west", "2")
            assert await ask(s, long_text) == ("west", "1")
            await asyncio.sleep(0.35)
            assert await ask(s, long_text) == ("west", "2"), "one tries it, and it rests at once"
            assert await ask(s, long_text) == ("west", "1")
            await asyncio.sleep(0.35)
            assert await ask(s, long_text) == ("east", "1")
            assert await ask(s, long_text) == ("east", "1")

    asyncio.run(main())


def test_a_server_without_another_in_its_place_goes_on_trying(stand: Any) -> None:
    async def main() -> None:
        roles = {"west-p": "prefill", "west-d": "decode"}
        async with stand(roles, retry={**K_RETRY, "attempts": 1}) as s:
            s.servers["west-p"].fault = failing("Internal Server Error", 5)
            for _ in range(5):
                assert (await s.post())[0] == 503
            assert (await s.post())[0] == 200

    asyncio.run(main())


def test_one_request_that_fails_again_and_again_counts_once(stand: Any, long_text: str) -> None:
    async def main() -> None:
        async with stand(retry={**K_RETRY, "attempts": 12}) as s:
            for name in ("east-p", "west-p"):
                s.servers[name].fault = failing("Grammar accept_token failed", 5)
            status, headers, _ = await s.post("/v1/completions", prompt=long_text)
            assert (status, int(headers["x-prfaas-attempts"]) > 5) == (200, True)
            for name in ("east-p", "west-p"):
                s.servers[name].fault = None
            assert await ask(s, long_text) == ("east", "1")

    asyncio.run(main())


def test_a_tenant_whose_requests_fail_wherever_they_go_takes_no_server_from_others(
    stand: Any, long_text: str
) -> None:
    async def main() -> None:
        roles = {"west-p": "prefill", "west-d": "decode", "east-p": "prefill", "east-q": "prefill"}
        async with stand(roles, retry={**K_RETRY, "attempts": 3}, loads=K_QUIET) as s:
            bad = long_text + " and this"
            for name in ("west-p", "east-p", "east-q"):
                s.servers[name].fault = failing_for(bad)
            for _ in range(8):
                assert (await s.post("/v1/completions", prompt=bad))[0] == 503
            assert all(one.up(s.router.clock()) and one.errors == 0 for one in s.router.servers)
            assert await ask(s, long_text) == ("east", "1")

    asyncio.run(main())
