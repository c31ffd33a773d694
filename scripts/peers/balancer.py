"""The least load balancer for SGLang's tests: each request to both servers, decode's answer back, nothing
tried again.

`python balancer.py PORT PREFILL_URL BOOTSTRAP_PORT DECODE_URL`. No retries and no fallback, unlike prfaas's
router: the tests are to see what the servers do.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlparse

K_TIMEOUT_S = 600.0


def forward(url: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """One request to one server; 502 and why when it can't be asked."""
    at = urlparse(url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=K_TIMEOUT_S)
    try:
        connection.request(method, path, body or None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except OSError as error:
        return 502, str(error).encode()
    finally:
        connection.close()


class Handler(BaseHTTPRequestHandler):
    prefill: ClassVar[str]
    decode: ClassVar[str]
    bootstrap_port: ClassVar[int]

    def do_GET(self) -> None:
        self._answer(*forward(self.decode, "GET", self.path, b""))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith(("/generate", "/v1/")):
            fields = json.loads(body)
            fields |= {
                "bootstrap_host": urlparse(self.prefill).hostname,
                "bootstrap_port": self.bootstrap_port,
                "bootstrap_room": random.getrandbits(62),
            }
            body = json.dumps(fields).encode()
        other = threading.Thread(target=forward, args=(self.prefill, "POST", self.path, body), daemon=True)
        other.start()
        status, answer = forward(self.decode, "POST", self.path, body)
        if not self.path.startswith(("/generate", "/v1/")):
            other.join()
        self._answer(status, answer)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def main(argv: list[str]) -> int:
    _, port, Handler.prefill, bootstrap_port, Handler.decode = argv
    Handler.bootstrap_port = int(bootstrap_port)
    with Server(("127.0.0.1", int(port)), Handler) as server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
