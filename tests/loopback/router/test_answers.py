"""Sound servers: every endpoint, streaming and not, and who was sent what."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest


def test_each_endpoint_answers_streaming_or_not(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            rooms: list[int] = []
            for path, prompt in (
                ("/v1/chat/completions", {}),
                ("/v1/completions", {"prompt": "the quick"}),
                ("/generate", {"text": "the quick"}),
            ):
                status, headers, answer = await s.post(path, **prompt)
                assert status == 200
                assert "t4" in json.dumps(answer)
                assert headers["x-prfaas-site"] == "west"
                assert headers["x-prfaas-reason"]
                assert headers["x-prfaas-attempts"] == "1"
                rooms.append(int(headers["x-prfaas-room"]))
                status, headers, answer = await s.post(path, **prompt, stream=True)
                rooms.append(int(headers["x-prfaas-room"]))
                assert status == 200
                assert answer.count("data: ") == 6
                assert answer.endswith("data: [DONE]\n\n")
                assert headers["Content-Type"].startswith("text/event-stream")
            prefills, decodes = s.servers["west-p"].seen, s.servers["west-d"].seen
            assert len(prefills) == len(decodes) == 6
            for one, other in zip(prefills, decodes, strict=True):
                assert one["bootstrap_room"] == other["bootstrap_room"] < 1 << 62
                assert one["bootstrap_host"] == "127.0.0.1"
                assert one["rid"] == other["rid"]
                assert not one.get("stream")
            assert [one["bootstrap_room"] for one in prefills] == rooms
            assert len(set(rooms)) == 6
            assert not s.servers["east-p"].seen

    asyncio.run(main())


def test_long_prompts_go_to_the_other_site_and_every_parameter_passes_through(
    stand: Any, long_text: str
) -> None:
    async def main() -> None:
        async with stand() as s:
            extra = {"temperature": 0.25, "logit_bias": {"5": 1}, "seed": 7, "my_own": [1, {"a": None}]}
            status, headers, _ = await s.post("/v1/completions", prompt=long_text, model="also", **extra)
            assert status == 200
            assert headers["x-prfaas-site"] == "east"
            for name in ("east-p", "west-d"):
                (seen,) = s.servers[name].seen
                assert {key: seen[key] for key in extra} == extra
                assert seen["model"] == "m"
                assert seen["prompt"] == long_text

    asyncio.run(main())


def test_a_clients_own_bootstrap_fields_never_reach_a_server(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            status, _, _ = await s.post(
                "/generate", text="the fox", bootstrap_host="evil", bootstrap_room=5, rid="x"
            )
            assert status == 200
            for name in ("west-p", "west-d"):
                (seen,) = s.servers[name].seen
                assert seen["bootstrap_host"] == "127.0.0.1"
                assert seen["bootstrap_room"] != 5
                assert seen["rid"] != "x"

    asyncio.run(main())


def test_a_plain_server_gets_one_request_without_bootstrap(stand: Any) -> None:
    async def main() -> None:
        async with stand({"west-c": "collocated"}, policy={"name": "collocated"}) as s:
            status, _, answer = await s.post(stream=True)
            assert status == 200
            assert answer.endswith("data: [DONE]\n\n")
            (seen,) = s.servers["west-c"].seen
            assert "bootstrap_room" not in seen

    asyncio.run(main())


def test_the_official_client_works_unchanged(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s, openai.AsyncOpenAI(base_url=s.url + "/v1", api_key="none") as client:
            listed = await client.models.list()
            assert [model.id for model in listed.data] == ["m"]
            assert (await client.models.retrieve("m")).id == "m"
            messages: Any = [{"role": "user", "content": "hello"}]
            answer = await client.chat.completions.create(model="m", messages=messages)
            assert answer.choices[0].message.content == "t0 t1 t2 t3 t4 "
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(parts) == "t0 t1 t2 t3 t4 "
            text = await client.completions.create(model="m", prompt="hello")
            assert text.choices[0].text == "t0 t1 t2 t3 t4 "
            with pytest.raises(openai.NotFoundError) as error:
                await client.chat.completions.create(model="other", messages=messages)
            assert error.value.code == "model_not_found"

    asyncio.run(main())
