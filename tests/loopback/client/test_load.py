"""The open loop's connections: a user's own, and those that a door keeps."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from prfaas_testbed.client import Answer, Shot, Target
from prfaas_testbed.client.load import Load

K_HOST = "127.0.0.1"


class Seen:
    """A server that streams a token, and the connections that requests came by."""

    def __init__(self) -> None:
        self.peers: list[object] = []

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert request.transport is not None
        self.peers.append(request.transport.get_extra_info("peername"))
        ended = {"output_ids": [7], "meta_info": {"finish_reason": {"type": "length", "length": 1}}}
        if not body["stream"]:
            return web.json_response(ended)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(f"data: {web.json_response(ended).text}\n\ndata: [DONE]\n\n".encode())
        return response


async def play(targets: int) -> tuple[list[Answer], list[Seen]]:
    """Three requests a fifth of a second apart to so many servers at once, the last of which answers."""
    seen, urls, runners = [Seen() for _ in range(targets)], [], []
    for one in seen:
        app = web.Application()
        app.router.add_post("/generate", one.generate)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, K_HOST, 0).start()
        runners.append(runner)
        urls.append(f"http://{K_HOST}:{runner.addresses[0][1]}/generate")
    aims = tuple(Target(url, answers=url == urls[-1]) for url in urls)
    body = {"input_ids": [1], "stream": True}
    shots = [Shot(str(i), 0.2 * i, body, aims, 20.0) for i in range(3)]
    answers: list[Answer] = []
    await Load(shots, answers.append).run(time.monotonic())
    for runner in runners:
        await runner.cleanup()
    return answers, seen


def test_users_come_each_on_a_connection_of_their_own() -> None:
    answers, (server,) = asyncio.run(play(1))
    assert [answer.error for answer in answers] == [None] * 3
    assert len(set(server.peers)) == 3


def test_requests_to_prefill_and_decode_go_over_kept_connections_as_a_door_s_do() -> None:
    answers, (prefill, decode) = asyncio.run(play(2))
    assert [answer.error for answer in answers] == [None] * 3
    assert (len(prefill.peers), len(set(prefill.peers))) == (3, 1)
    assert (len(decode.peers), len(set(decode.peers))) == (3, 1)
