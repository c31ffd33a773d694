"""Asks servers for their load (/v1/loads) and their settings (/server_info), and believes what can be true.

Figures that can't be (negative, absurd, of another type, a server slower or faster than anything built) are
refused and counted; the server's last good ones stand until they are too old, and then only what this router
itself has sent it counts. Several misses in a row take a server out of use until it answers again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable

import aiohttp
import msgspec

from prfaas.config.router import Loads
from prfaas.model.observations import Role
from prfaas.router.fleet import Reported, ServerHandle
from prfaas.telemetry.router_metrics import RouterMetrics

log = logging.getLogger("prfaas.router")

K_PATH = "/v1/loads?include=core,disagg,queues"
K_SETTINGS_PATH = "/server_info"
K_SETTINGS_AGAIN_S = 30.0
"""Between two questions for the settings of a server that doesn't tell them. What it has told isn't asked for
again before it is gone: SGLang's scheduler has to answer this, between two steps."""
K_MAX_STEP_TOKENS = 1 << 24
K_MAX_BODY_BYTES = 1 << 20
K_MISSES_DOWN = 3
K_MAX_COUNT = 1 << 40
K_SPEED_RANGE = (1.0, 1e8)  # tokens a second of prefill that an instance may claim
K_SMOOTHING = 0.3


class _Disagg(msgspec.Struct):
    mode: str = ""
    prefill_bootstrap_queue_reqs: int = 0
    prefill_inflight_queue_reqs: int = 0
    decode_prealloc_queue_reqs: int = 0
    decode_transfer_queue_reqs: int = 0
    decode_retracted_queue_reqs: int = 0


class _Load(msgspec.Struct):
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_waiting_uncached_tokens: int = 0
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    max_running_requests: int = 0
    total_prefill_uncached_tokens: int = 0
    total_prefill_busy_us: int = 0
    disaggregation: _Disagg | None = None


class LoadReport(msgspec.Struct):
    """The answer's part that is read: a load for each data-parallel rank."""

    loads: list[_Load]


_DECODER = msgspec.json.Decoder(LoadReport)


class _ServerSettings(msgspec.Struct):
    chunked_prefill_size: int | None = None
    """Most tokens of a prefill step; -1 (or 0): prompts aren't cut."""
    max_prefill_tokens: int | None = None
    """Most tokens of a step of several whole prompts."""
    prefill_max_requests: int | None = None
    """Most prompts of a step; null: as many as fit."""


_SETTINGS_DECODER = msgspec.json.Decoder(_ServerSettings)


class ReportError(ValueError):
    """A load, or settings, that can't be true."""


def read_steps(data: bytes) -> tuple[int | None, int | None]:
    """Most tokens and most prompts of one of the server's prefill steps; None where it doesn't say, or has no
    limit. Raises ReportError.
    """
    try:
        found = _SETTINGS_DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ReportError(str(error)[:200]) from None
    size = found.chunked_prefill_size
    if size is not None and size <= 0:
        size = found.max_prefill_tokens
    if size is not None and not 0 < size <= K_MAX_STEP_TOKENS:
        raise ReportError(f"prefill steps of {size} tokens")
    most = found.prefill_max_requests
    if most is not None and most <= 0:
        raise ReportError(f"prefill steps of {most} prompts")
    return size, most


def read_report(
    data: bytes, before: Reported, totals: tuple[int, int] | None, now: float
) -> tuple[Reported, tuple[int, int]]:
    """The sum over ranks, and the cumulative (tokens, microseconds) of prefill for the next call.

    Raises ReportError.
    """
    try:
        loads = _DECODER.decode(data).loads
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ReportError(str(error)[:200]) from None
    if not loads:
        raise ReportError("no loads")
    for load in loads:
        numbers = [value for value in msgspec.structs.astuple(load) if isinstance(value, int)]
        if load.disaggregation is not None:
            numbers += [one for one in msgspec.structs.astuple(load.disaggregation) if isinstance(one, int)]
        if not all(0 <= number <= K_MAX_COUNT for number in numbers):
            raise ReportError("a count below 0 or beyond reason")
    tokens = sum(load.total_prefill_uncached_tokens for load in loads)
    busy_us = sum(load.total_prefill_busy_us for load in loads)
    speed = before.prefill_tokens_per_s
    if totals is not None and tokens > totals[0] and busy_us > totals[1]:
        sample = (tokens - totals[0]) / (busy_us - totals[1]) * 1e6 * len(loads)
        if not K_SPEED_RANGE[0] <= sample <= K_SPEED_RANGE[1]:
            raise ReportError(f"{sample:.3g} tokens of prefill a second")
        speed = sample if speed is None else speed + K_SMOOTHING * (sample - speed)
    waiting = sum(load.num_waiting_reqs for load in loads)
    for load in loads:
        queues = load.disaggregation
        if queues is not None:
            waiting += queues.decode_prealloc_queue_reqs + queues.decode_transfer_queue_reqs
            waiting += queues.decode_retracted_queue_reqs
    limit = sum(load.max_running_requests for load in loads)
    return (
        Reported(
            at_s=now,
            running=sum(load.num_running_reqs for load in loads),
            waiting=waiting,
            waiting_uncached_tokens=sum(load.num_waiting_uncached_tokens for load in loads),
            used_tokens=sum(load.num_used_tokens for load in loads),
            total_tokens=sum(load.max_total_num_tokens for load in loads) or None,
            max_running=limit or None,
            prefill_tokens_per_s=speed,
            role=_role(loads),
        ),
        (tokens, busy_us),
    )


def _role(loads: list[_Load]) -> Role | None:
    """What all ranks say it is, where they say so and agree."""
    modes = {load.disaggregation.mode if load.disaggregation is not None else "" for load in loads}
    mode = modes.pop() if len(modes) == 1 else ""
    return Role(mode) if mode in (Role.PREFILL, Role.DECODE) else None


class LoadPoller:
    """One server's questions. `run` until cancelled."""

    def __init__(
        self,
        handle: ServerHandle,
        settings: Callable[[], Loads],
        cool_down_s: Callable[[], float],
        metrics: RouterMetrics,
        *,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self._handle, self._settings, self._cool_down_s = handle, settings, cool_down_s
        self._metrics, self._rng, self._clock, self._on_news = metrics, rng, clock, on_news
        self._totals: tuple[int, int] | None = None
        self._settings_due_s = -math.inf

    async def run(self) -> None:
        while True:
            await self.once()
            # Spread, so that many servers and routers don't ask in step.
            await asyncio.sleep(self._settings().interval_s * (0.75 + self._rng.random() / 2))

    async def once(self) -> None:
        handle, settings = self._handle, self._settings()
        data, cause = await self._ask(K_PATH, settings.timeout_s)
        if cause is None:
            try:
                handle.reported, self._totals = read_report(
                    data, handle.reported, self._totals, self._clock()
                )
            except ReportError:
                cause = "garbage"
        if cause is None:
            handle.told_tokens = handle.pending_tokens
            was_down = handle.down_until_s > self._clock()
            handle.on_heard()
            self._follow_role()
            if was_down:
                self._on_news()
            if self._clock() >= self._settings_due_s:
                await self._ask_settings(settings.timeout_s)
            return
        self._metrics.refused_input.labels("loads", cause).inc()
        handle.misses += 1
        if cause == "connection":
            # Nobody is there any more: what comes back has been restarted, with other settings perhaps.
            self._settings_due_s = -math.inf
            if handle.broken:
                handle.broken, handle.draining = "", False
        # Silence means down; a server that answers nonsense may still serve, and its requests will tell.
        if cause in ("timeout", "connection"):
            if handle.misses >= K_MISSES_DOWN:
                why = f"{handle.url}{K_PATH}: {cause}, {handle.misses} times in a row"
                handle.mark_down(self._clock(), self._cool_down_s(), why)
        elif handle.misses == K_MISSES_DOWN:
            log.warning(
                "%s of %s tells no load (%s%s: %s): only what this router sent it counts",
                handle.name, handle.site, handle.url, K_PATH, cause,
            )  # fmt: skip

    async def _ask_settings(self, timeout_s: float) -> None:
        """What it doesn't tell is asked again, but not soon; what it told stands until it is gone."""
        data, cause = await self._ask(K_SETTINGS_PATH, timeout_s)
        found = most = None
        if cause is None:
            try:
                found, most = read_steps(data)
            except ReportError:
                cause = "garbage"
        if cause is not None:
            self._metrics.refused_input.labels("server_info", cause).inc()
        self._handle.chunk_tokens, self._handle.prefill_requests = found, most
        self._settings_due_s = math.inf if found is not None else self._clock() + K_SETTINGS_AGAIN_S

    async def _ask(self, path: str, timeout_s: float) -> tuple[bytes, str | None]:
        """The page, or why there is none."""
        handle = self._handle
        data = b""
        try:
            async with asyncio.timeout(timeout_s):
                async with handle.session.get(
                    handle.url + path, headers=handle.headers, allow_redirects=False
                ) as response:
                    while part := await response.content.readany():
                        data += part
                        if len(data) > K_MAX_BODY_BYTES:
                            return b"", "too large"
                    return data, None if response.status == 200 else f"HTTP {response.status}"
        except TimeoutError:
            return b"", "timeout"
        except (aiohttp.ClientError, OSError):
            return b"", "connection"

    def _follow_role(self) -> None:
        """Its role may have been changed by another router, or by its restart."""
        handle, role = self._handle, self._handle.reported.role
        if role is None or role is handle.role or not handle.config.convertible or handle.converting:
            return
        handle.role = role
        self._on_news()
