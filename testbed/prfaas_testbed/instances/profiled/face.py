"""SGLang's HTTP face on a profiled instance: generate, the OpenAI endpoints, load, abort, flush, role
switch."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from prfaas_testbed.instances.profiled import content
from prfaas_testbed.instances.profiled.instance import Instance, Output
from prfaas_testbed.instances.profiled.peers import Refused
from prfaas_testbed.instances.profiled.prefix import take_prefix

K_MAX_BODY_BYTES = 64 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Asked:
    """What a body asks for, whichever endpoint it came to. Raises Refused for a body that can't be served."""

    def __init__(self, body: Any, kind: str, encode: Callable[[str], list[int]]) -> None:
        if not isinstance(body, dict):
            raise Refused("the body must be a JSON object", 400)
        self.kind, self.stream = kind, bool(body.get("stream"))
        self.rid = str(body.get("rid") or uuid.uuid4().hex)
        room, host, port = (body.get(f"bootstrap_{name}") for name in ("room", "host", "port"))
        self.room = int(room) if room is not None else None
        self.peer = (str(host), int(port)) if host is not None and port is not None else None
        self.priority = int(body.get("priority") or 0)
        self.usage = bool((body.get("stream_options") or {}).get("include_usage"))
        try:
            self.tokens, self.max_new = self._prompt(body, encode)
        except (TypeError, ValueError) as error:
            raise Refused(f"the request can't be read: {error}", 400) from None
        if not self.tokens:
            raise Refused("an empty prompt", 400)

    def _prompt(self, body: dict[str, Any], encode: Callable[[str], list[int]]) -> tuple[list[int], int]:
        if self.kind == "generate":
            ids = body.get("input_ids")
            tokens = [int(i) for i in ids] if ids is not None else encode(str(body.get("text", "")))
            return tokens, int((body.get("sampling_params") or {}).get("max_new_tokens") or 128)
        wanted = int(body.get("max_completion_tokens") or body.get("max_tokens") or 128)
        if body.get("input_ids") is not None:
            return [int(i) for i in body["input_ids"]], wanted
        if self.kind == "completion":
            prompt = body.get("prompt", "")
            if isinstance(prompt, list):
                return [int(i) for i in prompt], wanted
            return encode(str(prompt)), wanted
        lines = [f"{m.get('role')}: {m.get('content')}\n" for m in body.get("messages") or []]
        return encode("".join(lines)), wanted


def application(
    instance: Instance, encode: Callable[[str], list[int]] = content.text_tokens
) -> web.Application:
    face = _Face(instance, encode)
    app = web.Application(client_max_size=K_MAX_BODY_BYTES, middlewares=[_errors])
    app.add_routes(
        [
            web.post("/generate", face.answer("generate")),
            web.post("/v1/completions", face.answer("completion")),
            web.post("/v1/chat/completions", face.answer("chat")),
            web.get("/health", face.health),
            web.get("/health_generate", face.health),
            web.get("/v1/models", face.models),
            web.get("/v1/loads", face.loads),
            web.get("/server_info", face.server_info),
            web.get("/get_server_info", face.server_info),
            web.post("/abort_request", face.abort),
            web.route("*", "/flush_cache", face.flush),
            web.post("/pd_role_switch", face.switch_role),
            web.post("/prfaas/take_prefix", face.take_prefix),
            web.post("/profiled/grant", face.grant),
            web.post("/profiled/note", face.note),
        ]
    )
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as error:
        body = {"error": {"message": str(error), "type": "error", "code": error.status}}
        return web.json_response(body, status=error.status)
    except (ValueError, KeyError, TypeError) as error:
        return web.json_response({"error": {"message": f"bad request: {error}", "code": 400}}, status=400)


class _Face:
    def __init__(self, instance: Instance, encode: Callable[[str], list[int]]) -> None:
        self._instance, self._encode = instance, encode

    def answer(self, kind: str) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            asked = Asked(await request.json(), kind, self._encode)
            outputs = self._instance.serve(
                asked.rid, asked.tokens, asked.max_new, asked.room, asked.peer, asked.priority
            )
            async with aclosing(outputs):
                try:
                    return await (
                        self._stream(request, asked, outputs) if asked.stream else self._whole(asked, outputs)
                    )
                except asyncio.CancelledError:
                    if asked.rid in self._instance.aborted:
                        self._instance.aborted.discard(asked.rid)
                        raise Refused("the request was aborted") from None
                    raise

        return handle

    async def _whole(self, asked: Asked, outputs: AsyncIterator[Output]) -> web.Response:
        last = None
        async for output in outputs:
            last = output
        if last is None:
            raise Refused("the request ended without an answer")
        return web.json_response(self._message(asked, last, [], whole=True))

    async def _stream(
        self, request: web.Request, asked: Asked, outputs: AsyncIterator[Output]
    ) -> web.StreamResponse:
        """Errors before the first token are HTTP errors; later ones are told in the stream."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        sent = 0
        try:
            async for output in outputs:
                if sent == 0:
                    await response.prepare(request)
                message = self._message(asked, output, output.ids[sent:], whole=False)
                sent = len(output.ids)
                await response.write(b"data: " + json.dumps(message).encode() + b"\n\n")
                if output.final and asked.usage and asked.kind != "generate":
                    usage = {**self._head(asked), "choices": [], "usage": self._usage(asked, output)}
                    await response.write(b"data: " + json.dumps(usage).encode() + b"\n\n")
        except Refused as error:
            if sent == 0:
                raise
            body = {"error": {"message": str(error), "code": error.status}}
            await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        if sent == 0:
            raise Refused("the request ended without an answer")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _message(self, asked: Asked, output: Output, fresh: list[int], whole: bool) -> dict[str, Any]:
        reason = "length" if output.final else None
        if asked.kind == "generate":
            return {
                "text": "".join(content.piece_of(i) for i in output.ids),
                "output_ids": output.ids,
                "meta_info": {
                    "id": asked.rid,
                    "finish_reason": {"type": "length", "length": len(output.ids)} if output.final else None,
                    "prompt_tokens": len(asked.tokens),
                    "completion_tokens": len(output.ids),
                    "cached_tokens": output.cached_tokens,
                },
            }
        text = "".join(content.piece_of(i) for i in (output.ids if whole else fresh))
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if asked.kind == "completion":
            choice["text"] = text
        else:
            choice["message" if whole else "delta"] = {"role": "assistant", "content": text}
        message = {**self._head(asked, whole), "choices": [choice]}
        if whole:
            message["usage"] = self._usage(asked, output)
        return message

    def _head(self, asked: Asked, whole: bool = False) -> dict[str, Any]:
        form = "text_completion" if asked.kind == "completion" else "chat.completion"
        if asked.kind == "chat" and not whole:
            form += ".chunk"
        model = self._instance.settings.model
        return {"id": asked.rid, "object": form, "created": int(time.time()), "model": model}

    def _usage(self, asked: Asked, output: Output) -> dict[str, Any]:
        return {
            "prompt_tokens": len(asked.tokens),
            "completion_tokens": len(output.ids),
            "total_tokens": len(asked.tokens) + len(output.ids),
            "prompt_tokens_details": {"cached_tokens": output.cached_tokens},
        }

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        row = {"id": self._instance.settings.model, "object": "model", "owned_by": "profiled"}
        return web.json_response({"object": "list", "data": [row]})

    async def loads(self, request: web.Request) -> web.Response:
        scheduler = self._instance.scheduler
        row = {
            "dp_rank": 0,
            **scheduler.load(),
            "total_prefill_uncached_tokens": scheduler.prefilled_tokens,
            "total_prefill_busy_us": int(scheduler.prefill_busy_s * 1e6),
            "max_running_requests": scheduler.max_batch,
            "disaggregation": {"mode": "null" if scheduler.role == "collocated" else scheduler.role},
        }
        stamp = datetime.now(UTC).isoformat()
        return web.json_response({"timestamp": stamp, "version": "profiled", "loads": [row]})

    async def server_info(self, request: web.Request) -> web.Response:
        settings = self._instance.settings
        modes = {"prefill": "prefill", "decode": "decode", "collocated": "null"}
        info: dict[str, Any] = {
            "profiled": True,
            "served_model_name": settings.model,
            "disaggregation_mode": modes[self._instance.scheduler.role],
            "disaggregation_bootstrap_port": settings.bootstrap_port or settings.port,
            "page_size": self._instance.profile.block_tokens,
            "chunked_prefill_size": self._instance.scheduler.chunk_tokens,
        }
        if settings.events_port is not None:
            info["kv_events_config"] = json.dumps(
                {
                    "publisher": "zmq",
                    "endpoint": f"tcp://*:{settings.events_port}",
                    "replay_endpoint": f"tcp://*:{settings.events_replay_port}",
                    "topic": "kv-events",
                }
            )
        return web.json_response(info)

    async def abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        every = bool(body.get("abort_all"))
        return web.json_response({"aborted": self._instance.abort(None if every else str(body.get("rid")))})

    async def flush(self, request: web.Request) -> web.Response:
        self._instance.flush()
        return web.Response(text="Cache flushed.\n")

    async def switch_role(self, request: web.Request) -> web.Response:
        role = (await request.json()).get("new_role")
        if role not in ("prefill", "decode"):
            raise Refused(f"new_role {role!r}; allowed: prefill, decode", 400)
        started = time.monotonic()
        await self._instance.switch_role(role)
        return web.json_response({"success": True, "message": role, "seconds": time.monotonic() - started})

    async def take_prefix(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokens = [int(token) for token in body["input_ids"]]
        peer = (str(body["bootstrap_host"]), int(body["bootstrap_port"]))
        size = await take_prefix(self._instance, tokens, int(body["bootstrap_room"]), peer)
        return web.json_response({"tokens": len(tokens), "bytes": size})

    async def grant(self, request: web.Request) -> web.Response:
        body = await request.json()
        reply = (str(body["host"]), int(body["port"]))
        self._instance.bring_grant(int(body["room"]), str(body["grant"]), int(body["skip_bytes"]), reply)
        return web.json_response({})

    async def note(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._instance.bring_note(int(body["room"]), body)
        return web.json_response({})
