"""Asks the pump that hosts a link's ledger what it believes of the link (its page's /links).

The router only reads: what it learns makes its predictions, promises are the ledger's. A pump that can't be
asked, or tells what can't be, is counted; then the configured figures hold.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import ssl
import time
from collections.abc import Callable

import aiohttp
import msgspec

from prfaas.config.router import Link
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkEstimate
from prfaas.router.links import LinkBook
from prfaas.telemetry.router_metrics import RouterMetrics

log = logging.getLogger("prfaas.router")

K_INTERVAL_S = 0.5
K_TIMEOUT_S = 2.0
K_MAX_BODY_BYTES = 1 << 20
K_MAX_BPS = 1e14
K_MAX_RTT_S = 60.0


class _Estimate(msgspec.Struct):
    rate_bps: float
    low_bps: float
    high_bps: float
    rtt_s: float
    loss: float = 0.0
    backlog_bytes: int = 0
    up: bool = True
    reserved_bps: float = 0.0


class _Row(msgspec.Struct):
    link: str
    estimate: _Estimate | None = None


_DECODER = msgspec.json.Decoder(list[_Row])


def read_status(data: bytes, link: LinkId, now: float) -> LinkEstimate | None:
    """The link's estimate as the page tells it; None when it has none yet. Raises ValueError for garbage."""
    try:
        rows = _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"not a page of links: {error}") from None
    found = next((row.estimate for row in rows if row.link == str(link)), None)
    if found is None:
        return None
    rates = (found.rate_bps, found.low_bps, found.high_bps, found.reserved_bps)
    if not all(math.isfinite(rate) and 0 <= rate <= K_MAX_BPS for rate in rates):
        raise ValueError("a rate that can't be")
    if not 0 <= found.rtt_s <= K_MAX_RTT_S or not 0 <= found.loss <= 1 or found.backlog_bytes < 0:
        raise ValueError("a figure that can't be")
    return LinkEstimate(
        link=link,
        at_s=now,  # clocks of two machines don't compare: it is as old as its answer
        rate_bps=found.rate_bps,
        low_bps=found.low_bps,
        high_bps=found.high_bps,
        rtt_s=found.rtt_s,
        loss=found.loss,
        backlog_bytes=found.backlog_bytes,
        up=found.up,
        reserved_bps=found.reserved_bps,
    )


class LinkWatcher:
    """One link's questions. `run` until cancelled."""

    def __init__(
        self,
        config: Link,
        book: LinkBook,
        metrics: RouterMetrics,
        *,
        rng: random.Random,
        authority: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`authority`: whose certificate the page must have, where the system's don't count."""
        self._authority = authority
        self._config, self._book, self._metrics = config, book, metrics
        self._rng, self._clock = rng, clock
        self._link = LinkId(config.source, config.target)
        self._trouble: str | None = None

    async def run(self) -> None:
        assert self._config.status_url is not None
        timeout = aiohttp.ClientTimeout(total=K_TIMEOUT_S)
        connector = aiohttp.TCPConnector(ssl=self._authority or True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while True:
                await self._once(session, self._config.status_url)
                await asyncio.sleep(K_INTERVAL_S * (0.75 + self._rng.random() / 2))

    async def _once(self, session: aiohttp.ClientSession, url: str) -> None:
        cause = None
        try:
            async with session.get(url, allow_redirects=False) as response:
                data = await response.content.read(K_MAX_BODY_BYTES)
                while not response.content.at_eof() and len(data) < K_MAX_BODY_BYTES:
                    data += await response.content.read(K_MAX_BODY_BYTES)
            if response.status != 200:
                cause = f"HTTP {response.status}"
        except TimeoutError:
            cause = "timeout"
        except (aiohttp.ClientError, OSError):
            cause = "connection"
        if cause is None:
            try:
                estimate = read_status(data, self._link, self._clock())
            except ValueError:
                cause = "garbage"
            else:
                if estimate is not None:
                    self._book.tell(estimate)
        if cause is not None:
            self._metrics.refused_input.labels("link_status", cause).inc()
        self._note(cause, url)

    def _note(self, cause: str | None, url: str) -> None:
        """A line in the log where it has become another."""
        if cause is not None and cause != self._trouble:
            log.warning("link %s: %s: %s; the file's figures hold", self._link, url, cause)
        elif cause is None and self._trouble is not None:
            log.info("link %s: %s answers again", self._link, url)
        self._trouble = cause
