"""Stand-in servers: they answer at fixed times, as a prefill and a decode server, and cost little."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import uvloop

K_FIRST_S = 0.030  # the stand-in's time to its first token
K_CHUNK = b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
K_CHUNK += b'"delta":{"content":" word"},"finish_reason":null}]}\n\n'
K_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)
K_LOADS = {"status": "ok", "loads": [{"num_running_reqs": 0}]}
# What routers ask an SGLang server for, to know it as one and what it serves.
K_INFO = {"model_path": "m", "served_model_name": "m", "tokenizer_path": "m", "is_generation": True}
K_SERVER = {**K_INFO, "version": "0.5.23", "tp_size": 1, "dp_size": 1, "max_running_requests": 4096}
K_SERVER |= {"chunked_prefill_size": 8192, "prefill_max_requests": 1}
K_PAGES: dict[str, Any] = {
    "/v1/models": {
        "object": "list",
        "data": [{"id": "m", "object": "model", "owned_by": "sglang", "root": "m"}],
    },
    "/server_info": K_SERVER,
    "/get_server_info": K_SERVER,
    "/model_info": K_INFO,
    "/get_model_info": K_INFO,
}


class Prefills:
    """A queue that prompts pass one by one, `work_s` each; 0: none waits for another. Both servers of a pair
    have the same one, as they get the same requests.
    """

    def __init__(self, work_s: float) -> None:
        self.work_s, self.ends_s = work_s, 0.0

    def first_s(self, now: float) -> float:
        """When a prompt that comes now has its first token."""
        self.ends_s = max(self.ends_s, now) + self.work_s
        return self.ends_s + K_FIRST_S


class StandIn(asyncio.Protocol):
    """One connection to a stand-in server."""

    def __init__(self, role: str, tokens: int, step_s: float, prefills: Prefills) -> None:
        self.role, self.tokens, self.step_s, self.buffer = role, tokens, step_s, b""
        self.prefills = prefills

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            lower = head.lower()
            size = 0
            if b"content-length:" in lower:
                size = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
            elif b"transfer-encoding: chunked" in lower:
                if not rest.endswith(b"0\r\n\r\n"):
                    return
                size = len(rest)
            if len(rest) < size:
                return
            self.buffer = rest[size:]
            if head.startswith(b"POST /v1/chat"):
                loop = asyncio.get_running_loop()
                loop.call_at(self.prefills.first_s(loop.time()), self.first)
            else:
                words = head.split(b" ", 2)
                if len(words) < 3:  # the second half of a preface of HTTP/2
                    self.transport.close()
                    return
                path = words[1].partition(b"?")[0].decode()
                self.whole(json.dumps(K_PAGES.get(path, K_LOADS)).encode())

    def whole(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.transport.write(head % len(body) + body)

    def first(self) -> None:
        if self.role == "prefill":
            self.whole(b'{"choices":[],"usage":{"prompt_tokens":512,"completion_tokens":1}}')
        else:
            self.left = self.tokens
            self.transport.write(K_HEAD)
            self.next()

    def next(self) -> None:
        if self.transport.is_closing():
            return
        piece = K_CHUNK if self.left else b"data: [DONE]\n\n"
        self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) + (b"" if self.left else b"0\r\n\r\n"))
        if self.left:
            self.left -= 1
            asyncio.get_running_loop().call_later(self.step_s, self.next)


def stand_in(role: str, port: int, tokens: int, step_s: float, work_s: float) -> None:
    async def main() -> None:
        loop, prefills = asyncio.get_running_loop(), Prefills(work_s)
        server = await loop.create_server(
            lambda: StandIn(role, tokens, step_s, prefills), "127.0.0.1", port, backlog=4096
        )
        await server.serve_forever()

    uvloop.run(main())
