"""Malformed, hostile or excessive input: a clear error in OpenAI's form, and no harm to others."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import zlib
from typing import Any

import aiohttp
import pytest
from aiohttp import web

K_KEY = "sk-west-0001"


def key(tenant: str, secret: str, **fields: Any) -> dict[str, Any]:
    return {"tenant": tenant, "sha256": hashlib.sha256(secret.encode()).hexdigest(), **fields}


async def raw(s: Any, data: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", **headers}
    async with s.session.post(s.url + path, data=data, headers=headers) as response:
        return response.status, await response.json()


async def talk(s: Any, data: bytes, within_s: float = 5.0) -> bytes:
    """Send bytes on a connection of one's own; what comes until the other side closes."""
    port = int(s.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(within_s):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", b"", 400, "invalid_json"),
        ("/v1/chat/completions", b"{", 400, "invalid_json"),
        ("/v1/chat/completions", b"\xff\xfe", 400, "invalid_json"),
        ("/v1/chat/completions", b'{"a": "\xff"}', 400, "invalid_json"),
        ("/v1/chat/completions", b"[1]", 400, "invalid_json"),
        ("/v1/chat/completions", b"[" * 200_000, 400, "invalid_json"),
        ("/v1/chat/completions", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "invalid_json"),
        ("/v1/chat/completions", b"{}", 400, "bad_request"),
        ("/v1/chat/completions", b'{"messages": []}', 400, "bad_request"),
        ("/v1/chat/completions", b'{"messages": [1]}', 400, "bad_request"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user"}], "stream": 3}', 400, "bad_request"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user"}], "model": 3}', 400, "bad_request"),
        ("/v1/completions", b'{"prompt": []}', 400, "bad_request"),
        ("/v1/completions", b'{"prompt": [1, "a"]}', 400, "bad_request"),
        ("/v1/completions", b'{"prompt": [-1]}', 400, "bad_request"),
        ("/v1/completions", b'{"prompt": "x", "model": "nobody"}', 404, "model_not_found"),
        ("/generate", b'{"text": "a", "input_ids": [1]}', 400, "bad_request"),
        ("/generate", b'{"input_ids": [NaN]}', 400, "invalid_json"),
        ("/v1/completions", json.dumps({"prompt": [7] * 600}).encode(), 400, "context_length_exceeded"),
    ],
)
def test_a_bad_body_is_told_in_openais_form(
    stand: Any, path: str, body: bytes, status: int, code: str
) -> None:
    async def main() -> None:
        async with stand(limits={"max_prompt_tokens": 500}) as s:
            found, answer = await raw(s, body, path)
            assert found == status
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert answer["error"]["code"] == code
            assert not any(server.seen for server in s.servers.values())
            assert (await s.post())[0] == 200

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 2}),
        ("/v1/completions", {"prompt": ["x", "y"], "n": 3, "stream": True}),
        ("/generate", {"text": "x", "sampling_params": {"n": 2}}),
        ("/generate", {"text": ["x", "y"], "sampling_params": [{"n": 1}, {"n": 2}]}),
    ],
)
def test_several_samples_are_refused_by_a_pair_and_count_against_no_link(
    stand: Any, long_text: str, path: str, fields: dict[str, Any]
) -> None:
    """SGLang's pair fails them: one such request had taken the link from everybody for seconds."""

    async def main() -> None:
        async with stand() as s:
            for text in ("x", long_text):
                asked = json.loads(json.dumps(fields).replace('"x"', json.dumps(text)))
                status, answer = await raw(s, json.dumps(asked).encode(), path)
                assert (status, answer["error"]["code"], answer["error"]["param"]) == (
                    400,
                    "several_samples",
                    "n",
                )
            assert not any(server.seen for server in s.servers.values())
            assert all(link.up for link in s.router.links.estimates(s.router.clock()).values())
            assert (await s.post("/v1/completions", prompt=long_text, n=1))[1]["x-prfaas-site"] == "east"
            assert s.router.clients.in_flight == 0
        async with stand({"west-c": "collocated"}, policy={"name": "collocated"}) as s:
            assert (await s.post(path, **fields))[0] == 200

    asyncio.run(main())


def test_a_body_over_the_limit_is_refused_also_when_it_is_compressed(stand: Any) -> None:
    async def main() -> None:
        async with stand(limits={"max_body_bytes": 100_000}) as s:
            big = json.dumps({"prompt": "x" * 200_000}).encode()
            for data, headers in ((big, {}), (gzip.compress(big), {"Content-Encoding": "gzip"})):
                status, answer = await raw(s, data, "/v1/completions", **headers)
                assert status == 413
                assert answer["error"]["code"] == "body_too_large"
            small = b'{"prompt": "the fox"}'
            for coding, data in (
                ("gzip", gzip.compress(small)),
                ("GZIP", gzip.compress(small[:5]) + gzip.compress(small[5:])),
                ("deflate", zlib.compress(small)),
                ("identity", small),
            ):
                status, _ = await raw(s, data, "/v1/completions", **{"Content-Encoding": coding})
                assert status == 200, coding
            for coding, data, status, code in (
                ("gzip", small, 400, "bad_body"),
                ("gzip", gzip.compress(small)[:-9], 400, "bad_body"),
                ("br", small, 415, "unknown_encoding"),
                ("gzip, gzip", gzip.compress(gzip.compress(small)), 415, "unknown_encoding"),
            ):
                found, answer = await raw(s, data, "/v1/completions", **{"Content-Encoding": coding})
                assert (found, answer["error"]["code"]) == (status, code)

    asyncio.run(main())


def test_what_is_not_http_is_counted_and_leaves_no_traceback_in_the_log(
    stand: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with stand() as s:
            for data in (
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"GET / HTTP/1.1\r\nA B: x\r\n\r\n",
                b"GET / HTTP/1.1\r\n:\r\n\r\n",
            ):
                assert b" 400 " in (await talk(s, data)).partition(b"\r\n")[0]
            counted = 'prfaas_router_refused_input_total{cause="not http",source="client"}'
            assert (await s.metrics())[counted] == 3
            answer = await talk(
                s, b"POST /generate HTTP/1.1\r\nHost: x\r\nExpect: tea\r\nConnection: close\r\n\r\n"
            )
            assert b" 417 " in answer.partition(b"\r\n")[0]
            assert b"unknown_expectation" in answer

    asyncio.run(main())
    assert not [record for record in caplog.records if record.exc_info]


def test_unknown_pages_and_methods_are_errors_in_form(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            for method, path, status in (("GET", "/nowhere", 404), ("GET", "/generate", 405)):
                async with s.session.request(method, s.url + path) as response:
                    assert response.status == status
                    assert (await response.json())["error"]["code"] == "no_such_page"

    asyncio.run(main())


def test_a_fault_of_the_routers_own_is_an_error_in_form_that_tells_nothing_but_to_its_log(
    stand: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("a name of its insides")

    async def main() -> None:
        async with stand() as s:
            monkeypatch.setattr("prfaas.router.application.models_page", fail)
            async with s.session.get(s.url + "/v1/models") as response:
                body = await response.text()
                assert response.status == 500
                assert json.loads(body)["error"]["message"] == "The router failed; its log says more."
                assert "insides" not in body
            monkeypatch.undo()
            async with s.session.get(s.url + "/v1/models") as response:
                assert response.status == 200

    asyncio.run(main())
    assert "a fault of the router's own, at /v1/models" in caplog.text
    assert "insides" in caplog.text


def test_hostile_headers_end_their_connection_alone(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
            for lines in (
                b"X-A: " + b"y" * 100_000,
                b"Content-Length: 5\r\nTransfer-Encoding: chunked",
                b"Content-Length: -5",
                b"Transfer-Encoding: chunked, gzip, chunked",
                b"Bad Header: x",
                b"X: a\x00b",
            ):
                answer = await talk(s, head + lines + b"\r\n\r\n0\r\n\r\n")
                assert b" 400 " in answer.partition(b"\r\n")[0], (lines[:40], answer[:200])
            answer = await talk(s, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            assert not answer.startswith(b"HTTP/1.1 200")
            # What a client may say is handed back only when it is sane.
            for given, sane in (("abc-1", True), ("a b\tc", False)):
                _, headers, _ = await s.post(headers={"x-request-id": given})
                assert (headers["x-request-id"] == given) is sane
            assert (await s.post(headers={"x-prfaas-class": "nobody"}))[0] == 400
            assert (await s.post(headers={"x-prfaas-first-token-ms": "nan"}))[0] == 400
            assert (await s.post(headers={"x-prfaas-first-token-ms": "5000"}))[0] == 200

    asyncio.run(main())


def test_half_open_and_slow_connections_are_closed(stand: Any) -> None:
    async def main() -> None:
        async with stand(limits={"idle_timeout_s": 0.3, "body_timeout_s": 0.3}) as s:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
            assert await talk(s, b"") == b""
            assert await talk(s, head) == b""
            answer = await talk(s, head + b"Content-Length: 100\r\nConnection: close\r\n\r\n{", 15.0)
            assert b" 408 " in answer.partition(b"\r\n")[0]
            assert b"slow_body" in answer

    asyncio.run(main())


def test_a_client_that_takes_nothing_is_cut_off(stand: Any) -> None:
    async def main() -> None:
        async with stand(limits={"client_stall_s": 0.3}) as s:
            decode = s.servers["west-d"]

            async def flood(fake: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await out.prepare(request)
                while True:
                    await out.write(b"data: " + b"x" * 65536 + b"\n\n")

            decode.fault = flood
            port = int(s.url.rpartition(":")[2])
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            body = b'{"prompt": "x", "stream": true}'
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            await s.settle(lambda: decode.broken_off, 30)
            writer.transport.abort()
            assert s.router.servers.get("west-d").in_flight == 0
            decode.fault = None
            assert (await s.post())[0] == 200

    asyncio.run(main())


def test_keys_say_who_may_what_and_how_much(stand: Any) -> None:
    keys = [key("west", K_KEY, max_in_flight=1, classes=["default"]), key("boss", "sk-boss", admin=True)]

    async def main() -> None:
        async with stand(keys=keys) as s:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "\xff"}):
                status, _, answer = await s.post(headers=headers)
                assert status == 401
                assert answer["error"]["code"] == "invalid_api_key"
            mine = {"Authorization": f"Bearer {K_KEY}"}
            assert (await s.post(headers=mine))[0] == 200
            assert (await s.post(headers={"x-api-key": K_KEY}))[0] == 200
            s.servers["west-d"].hold.clear()
            async with s.session.post(
                s.url + "/v1/completions", json={"prompt": "x", "stream": True}, headers=mine
            ) as running:
                await running.content.readany()
                status, headers, answer = await s.post(headers=mine)
                assert status == 429
                assert int(headers["Retry-After"]) >= 1
                assert answer["error"]["type"] == "rate_limit_error"
                assert (await s.post(headers={"x-api-key": "sk-boss"}))[0] == 200
                s.servers["west-d"].hold.set()
                await running.read()
            for secret, status in (("sk-boss", 200), (K_KEY, 403)):
                async with s.session.get(s.url + "/decisions", headers={"x-api-key": secret}) as response:
                    assert response.status == status
            async with s.session.get(s.url + "/v1/models") as response:
                assert response.status == 401

    asyncio.run(main())


def test_more_than_may_run_at_once_is_429_and_connections_are_bounded(stand: Any) -> None:
    async def main() -> None:
        async with stand(limits={"max_in_flight": 2, "max_connections": 6}) as s:
            s.servers["west-d"].hold.clear()
            async with aiohttp.ClientSession() as session:
                running = [
                    await session.post(s.url + "/v1/completions", json={"prompt": "x", "stream": True})
                    for _ in range(2)
                ]
                status, headers, answer = await s.post()
                assert status == 429
                assert answer["error"]["code"] == "overloaded"
                assert "Retry-After" in headers
                s.servers["west-d"].hold.set()
                for response in running:
                    assert (await response.text()).endswith("data: [DONE]\n\n")
                assert (await s.post())[0] == 200
            port = int(s.url.rpartition(":")[2])
            opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
            await asyncio.sleep(0.1)
            closed = 0
            for reader, writer in opened:
                try:
                    async with asyncio.timeout(0.05):
                        closed += await reader.read() == b""
                except TimeoutError:
                    pass
                writer.close()
            assert closed >= 4

    asyncio.run(main())


def test_servers_that_lie_about_their_load_or_send_garbage_are_counted_and_harmless(
    stand: Any, long_text: str
) -> None:
    async def main() -> None:
        async with stand() as s:
            east = s.servers["east-p"]
            handle = s.router.servers.get("east-p")
            for body in (
                b"\x00\x01",
                b'{"loads": []}',
                b'{"loads": [{"num_waiting_reqs": -4}]}',
                b'{"loads": [{"num_waiting_reqs": 1e300}]}',
                b'{"loads": [{"num_running_reqs": "many"}]}',
                b'{"loads": [' + b"{}," * 700_000 + b"{}]}",
                b"[" * 100_000,
            ):
                east.load_body = body
                before = handle.misses
                await s.settle(lambda before=before: handle.misses != before)
            # It claims an empty queue while our own requests are on it: ours count.
            east.load_body = b'{"loads": [{"num_waiting_uncached_tokens": 0}]}'
            handle.pending_tokens += 5000
            await s.settle(lambda: not handle.misses)
            seen = handle.observe(s.router.clock(), 5.0)
            assert seen.waiting_uncached_tokens == 5000
            handle.pending_tokens -= 5000
            metrics = await s.metrics()
            assert metrics['prfaas_router_refused_input_total{cause="garbage",source="loads"}'] >= 5
            assert (await s.post("/v1/completions", prompt=long_text))[0] == 200

    asyncio.run(main())
