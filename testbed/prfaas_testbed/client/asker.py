"""One request at a time from inside a site, over connections that stay: for what a first token costs, not for
load.

A line of JSON in: {"seed", "tokens", "output_tokens", "targets": [URL…], "fields": {…}}; the last target's
stream is the answer. A line out: {"ttft_s", "e2e_s", "output_ids", "error"}; of what isn't answered with
tokens {"status", "body", "retry_after", "e2e_s", "error"}, and under "sides" the same of each target. Times
are from when the first byte of the request is about to be written. The prompt is made here, so that only its
seed crosses the pipe.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from prfaas_testbed.client.stream import Collected, EventParser, StreamError

K_TIMEOUT_S = 60.0
K_LEAST_ID, K_IDS = 10, 90
"""Token ids of two digits: a prompt of 4,000 fits what a fresh TCP connection sends at once."""
K_READ_BYTES = 65536


def short_prompt(tokens: int, seed: int) -> list[int]:
    """Without a random module's state: the same on all sides, no two seeds with a common beginning."""
    value, found = seed * 2654435761 % (1 << 32), []
    for _ in range(tokens):
        value = (value * 1664525 + 1013904223) % (1 << 32)
        found.append(K_LEAST_ID + (value >> 16) % K_IDS)
    return found


class Connection:
    """A kept connection to one server."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._http = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=K_TIMEOUT_S)

    def warm(self) -> None:
        """Open it, or see that it is open still: a server closes what has rested for some seconds."""
        for last in (False, True):
            try:
                self._http.request("GET", "/model_info")
                self._http.getresponse().read()
                return
            except (http.client.HTTPException, OSError):
                self._http.close()
                if last:
                    raise

    def post(self, body: bytes, began_s: float, stream: bool) -> dict[str, Any]:
        self._http.request("POST", "/generate", body, {"Content-Type": "application/json"})
        response = self._http.getresponse()
        if not stream or response.status != 200:
            text = response.read()
            return {
                "error": None if response.status == 200 else f"{response.status} {text[:300]!r}",
                "status": response.status, "body": text.decode(errors="replace"),
                "retry_after": response.headers["Retry-After"], "e2e_s": time.monotonic() - began_s,
            }  # fmt: skip
        parser, collected, ttft_s = EventParser(), Collected(), None
        while data := response.read1(K_READ_BYTES):
            for event in parser.feed(data):
                collected.add(event)
            if ttft_s is None and collected.output_ids:
                ttft_s = time.monotonic() - began_s
        return {
            "ttft_s": ttft_s, "e2e_s": time.monotonic() - began_s, "output_ids": collected.output_ids,
            "error": None if ttft_s is not None else "no token in the stream",
        }  # fmt: skip

    def close(self) -> None:
        self._http.close()


class Asker:
    def __init__(self) -> None:
        self._connections: dict[str, Connection] = {}

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": order["output_tokens"], "ignore_eos": True}
        prompt = short_prompt(order["tokens"], order["seed"])
        fields = {"input_ids": prompt, "sampling_params": sampling, **order["fields"]}
        urls = order["targets"]
        bodies = [
            json.dumps({**fields, "stream": url == urls[-1]}, separators=(",", ":")).encode() for url in urls
        ]
        for url in urls:
            self._connections.setdefault(url, Connection(url)).warm()
        found: dict[str, dict[str, Any]] = {}
        began_s = time.monotonic()

        def post(url: str, body: bytes) -> None:
            try:
                found[url] = self._connections[url].post(body, began_s, url == urls[-1])
            except (http.client.HTTPException, OSError, StreamError) as error:
                self._connections[url].close()
                found[url] = {"error": f"{type(error).__name__}: {error}"}

        threads = [threading.Thread(target=post, args=pair) for pair in zip(urls, bodies, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        error = next((one["error"] for one in found.values() if one["error"]), None)
        answer = {**found[urls[-1]], "error": error}
        return answer if error is None else {**answer, "sides": [found[url] for url in urls]}

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()


def main() -> int:
    asker = Asker()
    with suppress(KeyboardInterrupt):
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = asker.ask(order)
            except (http.client.HTTPException, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    asker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
