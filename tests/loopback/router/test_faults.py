"""What goes wrong before and after the first token, and that nobody but the right client hears of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from prfaas.router.attempt import Attempt
from prfaas.router.relay import Relay


async def refuse(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    error = {"error": {"message": "link-down", "type": "prfaas_refused", "code": "prfaas_refused"}}
    return web.json_response(error, status=503, headers={"Retry-After": "7"})


async def hang(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def fail(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response({"object": "error", "message": "KVTransferError", "code": 500}, status=500)


async def cut(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    await asyncio.sleep(3600)
    raise AssertionError


async def nonsense(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(body=b"\x00\xff<html>no</html>", content_type="text/html")


async def error_event(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """As SGLang tells a failed transfer on a stream: status 200, and an error as its first event."""
    if not body.get("stream"):
        return await fail(fake, request, body)
    out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await out.prepare(request)
    await out.write(b'data: {"error": {"message": "transfer failed", "code": 500}}\n\ndata: [DONE]\n\n')
    return out


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [refuse, fail, cut, nonsense])
@pytest.mark.parametrize("where", ["east-p", "west-d"])
def test_a_fault_before_the_first_token_is_invisible(
    stand: Any, long_text: str, fault: Any, where: str, stream: bool
) -> None:
    async def main() -> None:
        async with stand() as s:
            hit = 0

            async def once_or_east(fake: Any, request: web.Request, body: dict[str, Any]) -> Any:
                nonlocal hit
                hit += 1
                # The far site stays at fault; the only decode server recovers.
                return await fault(fake, request, body) if where == "east-p" or hit == 1 else None

            s.servers[where].fault = once_or_east
            status, headers, answer = await s.post("/v1/completions", prompt=long_text, stream=stream)
            assert status == 200
            assert "t4" in json.dumps(answer)
            assert int(headers["x-prfaas-attempts"]) == 2
            if where == "east-p":
                assert headers["x-prfaas-site"] == "west"
            assert len(s.servers["west-d"].seen) == 2
            metrics = await s.metrics()
            failed = {k: v for k, v in metrics.items() if "attempts_failed_total" in k}
            assert sum(failed.values()) == 1, failed

    asyncio.run(main())


def test_what_the_link_refuses_goes_elsewhere_at_once_whichever_side_tells(
    stand: Any, long_text: str
) -> None:
    async def main() -> None:
        async with stand() as s:

            async def first(fake: Any, request: web.Request, body: dict[str, Any]) -> Any:
                # Decode tells it; prefill, whose POST would hang, isn't asked again.
                return await refuse(fake, request, body) if len(fake.seen) == 1 else None

            s.servers["west-d"].fault = first
            s.servers["east-p"].fault = hang
            status, headers, _ = await s.post("/v1/completions", prompt=long_text, stream=True)
            assert (status, headers["x-prfaas-site"], headers["x-prfaas-attempts"]) == (200, "west", "2")
            assert len(s.servers["east-p"].seen) == 1

    asyncio.run(main())


def test_an_error_event_before_the_first_token_is_a_failure_not_an_answer(stand: Any, long_text: str) -> None:
    async def main() -> None:
        async with stand() as s:
            calls = 0

            async def first(fake: Any, request: web.Request, body: dict[str, Any]) -> Any:
                nonlocal calls
                calls += 1
                return await error_event(fake, request, body) if calls == 1 else None

            s.servers["west-d"].fault = first
            status, _, answer = await s.post("/generate", text=long_text, stream=True)
            assert status == 200
            assert "error" not in answer
            assert answer.count("data: ") == 6

    asyncio.run(main())


def test_a_dead_site_costs_one_refused_connection_and_is_left_alone(stand: Any, long_text: str) -> None:
    async def main() -> None:
        async with stand(retry={"cool_down_s": 30.0}, loads={"interval_s": 60.0}) as s:
            await s.servers["east-p"].stop()
            for wanted in ("2", "1"):
                status, headers, _ = await s.post("/v1/completions", prompt=long_text)
                assert (status, headers["x-prfaas-site"]) == (200, "west")
                assert headers["x-prfaas-attempts"] == wanted

    asyncio.run(main())


def test_a_server_that_comes_back_is_used_again(stand: Any, long_text: str) -> None:
    async def main() -> None:
        async with stand(retry={"cool_down_s": 30.0}) as s:
            east = s.servers["east-p"]
            await east.stop()
            await s.post("/v1/completions", prompt=long_text)
            await east.start()
            handle = s.router.servers.get("east-p")
            await s.settle(lambda: handle.up(time.monotonic()))
            _, headers, _ = await s.post("/v1/completions", prompt=long_text)
            assert headers["x-prfaas-site"] == "east"

    asyncio.run(main())


def test_a_site_that_hangs_costs_the_attempts_time_and_is_aborted(stand: Any, long_text: str) -> None:
    async def main() -> None:
        async with stand(retry={"first_token_min_s": 0.2, "first_token_factor": 0.01}) as s:
            s.servers["east-p"].fault = hang
            status, headers, _ = await s.post("/v1/completions", prompt=long_text)
            assert (status, headers["x-prfaas-site"]) == (200, "west")
            east, decode = s.servers["east-p"], s.servers["west-d"]
            await s.settle(lambda: east.aborted and east.broken_off)
            assert east.aborted == [east.seen[0]["rid"]]
            await s.settle(lambda: decode.aborted == [decode.seen[0]["rid"]])

    asyncio.run(main())


def test_when_decode_rejects_prefills_post_is_cancelled(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:

            async def reject(fake: Any, request: web.Request, body: dict[str, Any]) -> web.Response:
                await asyncio.sleep(0.05)
                return web.json_response({"object": "error", "message": "too long"}, status=400)

            s.servers["west-d"].fault = reject
            s.servers["west-p"].fault = hang
            status, _, answer = await s.post()
            assert status == 400
            assert answer["error"]["message"] == "too long"
            assert answer["error"]["type"] == "invalid_request_error"
            prefill = s.servers["west-p"]
            await s.settle(lambda: prefill.broken_off and prefill.aborted)
            assert s.router.servers.get("west-p").in_flight == 0
            assert s.router.servers.get("west-d").in_flight == 0

    asyncio.run(main())


@pytest.mark.parametrize("where", ["before", "within"])
def test_a_decode_server_that_dies_after_the_first_token_ends_in_a_clear_error(
    stand: Any, where: str
) -> None:
    async def main() -> None:
        async with stand() as s:

            async def die(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await out.prepare(request)
                await out.write(fake.event(False, 0))
                await asyncio.sleep(0.05)
                event = fake.event(False, 1)
                await out.write(event if where == "before" else event[:20])
                await asyncio.sleep(0.05)
                assert request.transport is not None
                request.transport.abort()
                return out

            s.servers["west-d"].fault = die
            status, _, answer = await s.post(stream=True)
            assert status == 200
            events = [json.loads(one[6:]) for one in answer.split("\n\n")[:-2]]
            assert len(events) == (3 if where == "before" else 2)
            assert events[-1]["error"]["code"] == "stream_broken"
            assert answer.endswith("data: [DONE]\n\n")
            assert len(s.servers["west-d"].seen) == 1

    asyncio.run(main())


def test_a_stream_that_ends_without_done_or_falls_silent_is_told(stand: Any) -> None:
    async def main() -> None:
        async with stand(retry={"stall_s": 0.2}) as s:

            async def short(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await out.prepare(request)
                await out.write(fake.event(False, 0))
                return out

            s.servers["west-d"].fault = short
            _, _, answer = await s.post(stream=True)
            assert "(incomplete)" in answer
            s.servers["west-d"].fault = None
            s.servers["west-d"].hold.clear()
            _, _, answer = await s.post(stream=True)
            assert "(silent)" in answer
            assert answer.count("data: ") == 3

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_both_sides(stand: Any, stream: bool) -> None:
    async def main() -> None:
        async with stand() as s:
            prefill, decode = s.servers["west-p"], s.servers["west-d"]
            prefill.fault = hang
            body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
            async with aiohttp.ClientSession() as session:
                with pytest.raises(asyncio.TimeoutError):
                    await session.post(
                        s.url + "/v1/chat/completions", json=body, timeout=aiohttp.ClientTimeout(total=0.2)
                    )
            await s.settle(lambda: prefill.aborted and decode.aborted)
            await s.settle(lambda: prefill.broken_off and decode.broken_off)
            assert s.router.clients.in_flight == 0
            assert s.router.servers.get("west-d").in_flight == 0
            assert s.router.servers.get("west-p").pending_tokens == 0
            metrics = await s.metrics()
            key = 'prfaas_router_requests_total{endpoint="/v1/chat/completions",status="499"}'
            assert metrics[key] == 1

    asyncio.run(main())


@pytest.mark.parametrize("flowing", [False, True])
def test_a_client_that_leaves_in_mid_stream_aborts_decode_and_is_no_error(
    stand: Any, caplog: Any, flowing: bool
) -> None:
    async def flow(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await out.prepare(request)
        while True:
            await out.write(fake.event(False, 0))
            await asyncio.sleep(0.001)

    async def main() -> None:
        async with stand() as s:
            decode = s.servers["west-d"]
            decode.hold.clear()
            decode.fault = flow if flowing else None
            async with aiohttp.ClientSession() as session:
                body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
                response = await session.post(s.url + "/v1/chat/completions", json=body)
                assert await response.content.readany()
                response.close()
            await s.settle(lambda: decode.aborted)
            assert s.router.servers.get("west-d").in_flight == 0
            metrics = await s.metrics()
            key = 'prfaas_router_requests_total{endpoint="/v1/chat/completions",status="499"}'
            assert metrics[key] == 1

    asyncio.run(main())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_refusals_on_every_path_are_429_and_dead_paths_503(stand: Any) -> None:
    async def main() -> None:
        async with stand(retry={"attempts": 3}) as s:
            for name in ("west-p", "east-p"):
                s.servers[name].fault = refuse
            status, headers, answer = await s.post()
            assert status == 429
            assert headers["Retry-After"] == "7"
            assert answer["error"]["type"] == "rate_limit_error"
            for server in s.servers.values():
                await server.stop()
            status, headers, answer = await s.post()
            assert status == 503
            assert int(headers["Retry-After"]) >= 1
            assert answer["error"]["type"] == "server_error"
            async with s.session.get(s.url + "/health") as response:
                assert response.status == 503

    asyncio.run(main())


@pytest.mark.parametrize(
    ("told", "seconds"), [("9" * 400, "1"), ("\xb2", "1"), ("86400", "3600"), ("7", "7")]
)
def test_a_server_that_asks_for_an_absurd_wait_is_a_refusal_like_any(
    stand: Any, told: str, seconds: str
) -> None:
    async def absurd(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        text = b'{"error": {"message": "full; retry_after_s: %s"}}' % told.encode("latin-1")
        head = b"HTTP/1.1 503 Busy\r\nRetry-After: %s\r\nContent-Length: %d\r\n\r\n"
        request.transport.write(head % (told.encode("latin-1"), len(text)) + text)  # type: ignore[attr-defined]
        return await hang(fake, request, body)

    async def main() -> None:
        async with stand(retry={"attempts": 2}) as s:
            for name in ("west-p", "east-p"):
                s.servers[name].fault = absurd
            status, headers, answer = await s.post()
            assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "refused", seconds)

    asyncio.run(main())


def test_many_requests_through_random_faults_are_each_answered_once(stand: Any, long_text: str) -> None:
    async def main() -> None:
        rng = random.Random(3)
        async with stand(retry={"attempts": 32, "backoff_s": 0.001}) as s:
            for name in ("east-p", "west-p", "west-d"):

                async def sometimes(fake: Any, request: web.Request, body: dict[str, Any]) -> Any:
                    if rng.random() < 0.25:
                        return await rng.choice((refuse, fail, cut, nonsense))(fake, request, body)
                    return None

                s.servers[name].fault = sometimes

            async def ask(number: int) -> Any:
                text = long_text if number % 2 else "the fox"
                return await s.post("/v1/completions", prompt=text, stream=number % 3 == 0)

            answers = await asyncio.gather(*(ask(number) for number in range(40)))
            for number, (status, _, answer) in enumerate(answers):
                assert status == 200, answer
                if number % 3 == 0:
                    assert answer.count("data: ") == 6
                    assert "error" not in answer
                else:
                    assert answer["choices"][0]["text"] == "t0 t1 t2 t3 t4 "
            await s.settle(lambda: not s.router.door.background, 10)
            for handle in s.router.servers:
                assert handle.in_flight == 0
                assert handle.pending_tokens == 0

    asyncio.run(main())


@pytest.mark.parametrize("begun", [False, True])
def test_a_fault_of_the_routers_own_ends_its_request_and_no_other(
    stand: Any, begun: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*words: Any) -> str:
        raise RuntimeError("a mistake")

    async def main() -> None:
        async with stand() as s:
            ended: list[Any] = []
            monkeypatch.setattr(s.router.door, "_on_outcome", ended.append)
            with monkeypatch.context() as patch:
                patch.setattr(Relay if begun else Attempt, "run" if begun else "open", broken)
                status, _, answer = await s.post("/v1/completions", prompt="x", stream=True)
                said = answer.split("data: ")[-2] if begun else json.dumps(answer)
                assert status == (200 if begun else 500)
                assert "its log says more" in json.loads(said)["error"]["message"]
            await s.settle(lambda: ended)
            assert (ended[0].status, ended[0].error) == (status, "RuntimeError('a mistake')")
            assert "a mistake" in caplog.text
            assert s.router.clients.in_flight == 0
            assert (await s.post())[0] == 200

    asyncio.run(main())
