"""A prefix that one site's prefill server holds, brought to another's before a prompt is sent there.

Servers that keep prefixes (`prefixes`) see to it themselves: the taker is told of the giver. Of others,
profiled instances, both are asked: the giver to prefill the prefix, which it has, and the taker to receive
that as a decode server would and to keep it. What fails costs time alone: the taker then computes the whole
prompt.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Mapping
from typing import Annotated, Any

import aiohttp
import msgspec

from prfaas.model.decisions import CacheMove
from prfaas.router.attempt import Route, abort
from prfaas.router.fleet import ServerHandle
from prfaas.router.ticket import Ticket
from prfaas.telemetry.router_metrics import RouterMetrics

log = logging.getLogger(__name__)

K_TAKE = "/prfaas/take_prefix"
K_ROOMS = 1 << 62
K_MOST_S = 600.0


async def bring(
    route: Route, move: CacheMove, ticket: Ticket, rng: random.Random, metrics: RouterMetrics,
    background: set[asyncio.Task[None]],
) -> int:  # fmt: skip
    """How much of the prompt was moved; what the taker has of it then, the ticket is told. No error.

    A giver that must be told to stop hears it in the `background`: the prompt doesn't wait for one that may
    be dead.
    """
    giver, taker = route.giver, route.prefill
    ids = list(ticket.prompt.ids[: move.tokens])
    if giver is None or taker is None or len(ids) < move.tokens:
        return 0
    predicted_s = ticket.decision.predicted_ttft_s if ticket.decision else None
    within_s = move.patience_s(predicted_s or 0.0)
    rid = f"{ticket.request_id}-p{ticket.attempt}"
    kept = bool(giver.config.prefixes and taker.config.prefixes)
    if kept:
        asked = [_take_kept(giver, taker, ids, within_s)]
    else:
        asked = _both_halves(giver, taker, ids, rid, rng.randrange(K_ROOMS))
    tasks = [asyncio.ensure_future(one) for one in asked]
    began_s = time.monotonic()
    taken = _Taken(tokens=0, moved_bytes=0)
    try:
        async with asyncio.timeout(within_s):
            taken = min(await asyncio.gather(*tasks), key=lambda one: one.tokens)
        outcome = "done" if taken.moved_bytes else "here"
    except TimeoutError:
        outcome = "late"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        log.info("%s: a prefix of %d tokens didn't come from %s: %s", taker.name, len(ids), giver.name, error)
        outcome = "failed"
    finally:
        ended = all(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not (ended or kept):
            telling = asyncio.ensure_future(abort(giver, rid))
            background.add(telling)
            telling.add_done_callback(background.discard)
    metrics.cache_moves.labels(move.source, move.target, outcome).inc()
    metrics.cache_move_seconds.observe(time.monotonic() - began_s)
    if taken.tokens:
        ticket.cached = {**ticket.cached, taker.name: taken.tokens}
    return taken.tokens if taken.moved_bytes else 0


Count = Annotated[int, msgspec.Meta(ge=0)]


class _Taken(msgspec.Struct):
    """What the taker has of it then, and what of that had to cross."""

    tokens: Count
    moved_bytes: Count


async def _take_kept(giver: ServerHandle, taker: ServerHandle, ids: list[int], within_s: float) -> _Taken:
    """Raises as `_post`."""
    body = {"input_ids": ids, "giver": giver.config.prefixes, "within_s": min(within_s, K_MOST_S)}
    # Without the server's key: whoever listens there isn't asked for one.
    said = await _post(taker, taker.config.prefixes_page + K_TAKE, body, {})
    taken = msgspec.json.decode(said, type=_Taken)
    return _Taken(min(taken.tokens, len(ids)), taken.moved_bytes)


def _both_halves(
    giver: ServerHandle, taker: ServerHandle, ids: list[int], rid: str, room: int
) -> list[Coroutine[Any, Any, _Taken]]:
    host, port = giver.config.bootstrap
    common = {
        "input_ids": ids,
        "rid": rid,
        "bootstrap_host": host,
        "bootstrap_port": port,
        "bootstrap_room": room,
    }

    async def half(server: ServerHandle, path: str, body: dict[str, object]) -> _Taken:
        await _post(server, server.url + path, body, server.headers)
        return _Taken(tokens=len(ids), moved_bytes=1)

    giving = half(giver, "/generate", {**common, "sampling_params": {"max_new_tokens": 1}})
    return [giving, half(taker, K_TAKE, common)]


async def _post(server: ServerHandle, url: str, body: dict[str, object], headers: Mapping[str, str]) -> bytes:
    """Raises ValueError for an answer other than 200, aiohttp's errors and OSError."""
    data = msgspec.json.encode(body)
    async with server.session.post(url, data=data, headers=headers) as response:
        said = await response.read()
        if response.status != 200:
            raise ValueError(f"{server.name}: HTTP {response.status}: {said[:200]!r}")
        return said
