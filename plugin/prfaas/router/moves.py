"""A prefix that one site's prefill server holds, brought to another's before a prompt is sent there.

The giver is asked to prefill the prefix, which it has, and the taker to receive that as a decode server would
and to keep it. The bytes go as those of any request do. What fails costs time alone: the taker then computes
the whole prompt.
"""

from __future__ import annotations

import asyncio
import random
import time

import aiohttp
import msgspec

from prfaas.model.decisions import CacheMove
from prfaas.router.attempt import Route, abort
from prfaas.router.fleet import ServerHandle
from prfaas.router.ticket import Ticket
from prfaas.telemetry.router_metrics import RouterMetrics

K_TAKE = "/prfaas/take_prefix"
K_ROOMS = 1 << 62
K_LEAST_S = 2.0
K_FACTOR = 4.0
"""A move has so many times as long as the whole way to the first token was predicted to take."""


async def bring(
    route: Route, move: CacheMove, ticket: Ticket, rng: random.Random, metrics: RouterMetrics,
    background: set[asyncio.Task[None]],
) -> dict[str, int]:  # fmt: skip
    """What the taker has of the prompt afterwards, by its name; empty where that is as before. No error.

    A giver that must be told to stop hears it in the `background`: the prompt doesn't wait for one that may
    be dead.
    """
    giver, taker = route.giver, route.prefill
    ids = ticket.prompt.ids[: move.tokens]
    if giver is None or taker is None or len(ids) < move.tokens:
        return {}
    predicted_s = ticket.decision.predicted_ttft_s if ticket.decision else None
    host, port = giver.config.bootstrap
    rid = f"{ticket.request_id}-p{ticket.attempt}"
    common = {
        "input_ids": ids,
        "rid": rid,
        "bootstrap_host": host,
        "bootstrap_port": port,
        "bootstrap_room": rng.randrange(K_ROOMS),
    }
    giving = asyncio.ensure_future(
        _post(giver, "/generate", {**common, "sampling_params": {"max_new_tokens": 1}})
    )
    taking = asyncio.ensure_future(_post(taker, K_TAKE, common))
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(max(K_LEAST_S, K_FACTOR * (predicted_s or 0.0))):
            await asyncio.gather(giving, taking)
        outcome = "done"
    except TimeoutError:
        outcome = "late"
    except (aiohttp.ClientError, OSError, ValueError):
        outcome = "failed"
    finally:
        ended = giving.done() and taking.done()
        for task in (giving, taking):
            task.cancel()
        await asyncio.gather(giving, taking, return_exceptions=True)
        if not ended:
            telling = asyncio.ensure_future(abort(giver, rid))
            background.add(telling)
            telling.add_done_callback(background.discard)
    metrics.cache_moves.labels(move.source, move.target, outcome).inc()
    metrics.cache_move_seconds.observe(time.monotonic() - began_s)
    return {taker.name: move.tokens} if outcome == "done" else {}


async def _post(server: ServerHandle, path: str, body: dict[str, object]) -> None:
    """Raises ValueError for an answer other than 200, aiohttp's errors and OSError."""
    data = msgspec.json.encode(body)
    async with server.session.post(server.url + path, data=data, headers=server.headers) as response:
        said = await response.read()
        if response.status != 200:
            raise ValueError(f"{server.name}: HTTP {response.status}: {said[:200]!r}")
