"""The client that asks one thing at a time, against servers that stream as SGLang does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from prfaas_testbed.client.asker import Asker


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self._answer(b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        if not body["stream"] or self.server.status != 200:
            self._answer(b"refused")
            return
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for n in (1, 2):
            event = f'data: {{"output_ids": {list(range(n))}, "meta_info": {{}}}}\n\n'.encode()
            self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _answer(self, data: bytes) -> None:
        self.send_response(self.server.status)
        self.send_header("retry-after", "3")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.connections, self.status = 0, 200
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    both = Server(), Server()
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


def order(*servers: Server) -> dict[str, Any]:
    return {
        "seed": 1, "tokens": 5, "output_tokens": 2, "targets": [server.url for server in servers],
        "fields": {"bootstrap_room": 7},
    }  # fmt: skip


def test_both_servers_get_the_body_over_connections_that_stay_and_the_last_ones_stream_is_the_answer(
    servers: tuple[Server, Server],
) -> None:
    asker = Asker()
    answers = [asker.ask(order(*servers)) for _ in range(2)]
    asker.close()
    for answer in answers:
        assert (answer["error"], answer["output_ids"]) == (None, [0, 1])
        assert 0 < answer["ttft_s"] <= answer["e2e_s"]
    first, last = servers
    assert (first.connections, last.connections) == (1, 1)
    assert [body["stream"] for body in first.bodies + last.bodies] == [False, False, True, True]
    assert all(body["bootstrap_room"] == 7 and len(body["input_ids"]) == 5 for body in last.bodies)


def test_a_refusal_of_either_server_is_the_answers_error(servers: tuple[Server, Server]) -> None:
    servers[0].status = 503
    asker = Asker()
    answer = asker.ask(order(*servers))
    asker.close()
    assert "503" in answer["error"]
    refused, other = answer["sides"]
    assert (refused["status"], refused["body"], refused["retry_after"]) == (503, "refused", "3")
    assert refused["e2e_s"] > 0
    assert other["output_ids"] == [0, 1]
