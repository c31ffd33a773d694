"""The open loop: each request leaves at its time, however slow the system is, and all are awaited."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence

import aiohttp

from prfaas_testbed.client.messages import Answer, Shot, Target
from prfaas_testbed.client.stream import Collected, EventParser, StreamError

# How long a prefill server's own answer is awaited once the client has its tokens: over a link that is down
# for seconds it comes late, and without it nobody knows what was sent.
K_PREFILL_GRACE_S = 10.0
K_KEPT_S = 2.0  # servers close what has rested for 5 s: nothing is sent into that


class Load:
    """Sends `shots`; `report` is called with each answer as it comes."""

    def __init__(self, shots: Sequence[Shot], report: Callable[[Answer], None]) -> None:
        self._shots = sorted(shots, key=lambda shot: shot.at_s)
        self._report = report

    async def run(self, start_monotonic_s: float) -> None:
        """`start_monotonic_s`: the load's zero on CLOCK_MONOTONIC, which all namespaces share."""
        timeout = aiohttp.ClientTimeout(total=None)
        # Users come each on a connection of their own. Where there is no door, requests go to prefill and
        # decode as a door sends them, over connections that it keeps.
        own = aiohttp.TCPConnector(limit=0, force_close=True)
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=K_KEPT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=own) as users,
            aiohttp.ClientSession(timeout=timeout, connector=kept) as door,
            asyncio.TaskGroup() as group,
        ):
            for shot in self._shots:
                delay_s = start_monotonic_s + shot.at_s - time.monotonic()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                session = users if len(shot.targets) == 1 else door
                group.create_task(self._one(session, shot, start_monotonic_s))

    async def _one(self, session: aiohttp.ClientSession, shot: Shot, start_s: float) -> None:
        answer = Answer(id=shot.id, sent_s=time.monotonic() - start_s)
        sent = time.monotonic()
        others = [
            asyncio.create_task(_await_other(session, shot, target))
            for target in shot.targets
            if not target.answers
        ]
        try:
            async with asyncio.timeout(shot.timeout_s):
                target = next(target for target in shot.targets if target.answers)
                await _stream(session, shot, target, answer, sent)
                if others:
                    await asyncio.wait(others, timeout=K_PREFILL_GRACE_S)
        except TimeoutError:
            answer.error = f"no whole answer within {shot.timeout_s:g} s"
        except (aiohttp.ClientError, StreamError, OSError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:300]
        finally:
            for task in others:
                # A prefill server's POST hangs until the client drops it where decode gave up: drop it.
                task.cancel()
            if answer.error and answer.e2e_s is None:
                answer.e2e_s = time.monotonic() - sent
            results = await asyncio.gather(*others, return_exceptions=True)
        for result in results:
            if isinstance(result, Collected) and answer.cached_tokens is None:
                answer.cached_tokens = result.cached_tokens()
            elif isinstance(result, StreamError) and answer.error:
                answer.error = f"{answer.error}; prefill: {result}"[:500]
        self._report(answer)


async def _stream(
    session: aiohttp.ClientSession, shot: Shot, target: Target, answer: Answer, sent: float
) -> None:
    """The answering server's stream into `answer`. Raises StreamError, ClientError or OSError."""
    collected, parser = Collected(), EventParser()
    async with session.post(target.url, json={**shot.body, **target.extra}, headers=shot.headers) as response:
        answer.status = response.status
        answer.headers = {
            k.lower(): v for k, v in response.headers.items() if k.lower().startswith("x-prfaas-")
        }
        if response.status != 200:
            raise StreamError(f"HTTP {response.status}: {_message(await response.text())}")
        if "text/event-stream" in response.headers.get("Content-Type", ""):
            async for data in response.content.iter_any():
                for event in parser.feed(data):
                    collected.add(event)
                    if answer.ttft_s is None and collected.tokens_seen:
                        answer.ttft_s = time.monotonic() - sent
        else:
            collected.add(await response.read())
            answer.ttft_s = time.monotonic() - sent
    answer.e2e_s = time.monotonic() - sent
    answer.output_ids, answer.logprobs = collected.output_ids, [round(p, 5) for p in collected.logprobs]
    answer.text_bytes = len(collected.text.encode())
    answer.meta = {k: v for k, v in collected.meta.items() if isinstance(v, int | float | str | bool)}
    if len(shot.targets) == 1:
        answer.cached_tokens = collected.cached_tokens()
    else:
        answer.decode_cached_tokens = collected.cached_tokens()
    if not collected.finished:
        raise StreamError("the stream ended before the answer did")


async def _await_other(session: aiohttp.ClientSession, shot: Shot, target: Target) -> Collected:
    """The whole answer of a server that isn't the client's. Raises StreamError or ClientError."""
    body = {**shot.body, **target.extra, "stream": False}
    async with session.post(target.url, json=body, headers=shot.headers) as response:
        text = await response.read()
        if response.status != 200:
            raise StreamError(f"HTTP {response.status}: {_message(text.decode(errors='replace'))}")
        collected = Collected()
        collected.add(text)
        return collected


def _message(text: str) -> str:
    """The server's own words out of an error body."""
    try:
        error = json.loads(text)
        error = error.get("error", error)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
    except (ValueError, AttributeError):
        return text.strip()[:200]
