"""The servers as this router knows them: connections, load, health; and how the set changes at a reload."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from prfaas.config.router import RouterConfig, Server
from prfaas.model.errors import ConfigError
from prfaas.model.ids import InstanceId, ModelId, SiteId
from prfaas.model.observations import InstanceObservation, Role
from prfaas.router.pool import K_CONNECT_S, K_KEEP_ALIVE_S, UpstreamPool
from prfaas.router.queueing import PrefillQueue

log = logging.getLogger("prfaas.router")

_KEY = re.compile(r"[!-~]+")
K_ERRORS_IN_A_ROW = 3
"""Fewer may be chance."""
K_INSTANT_S = 1e-6
"""Before a report is too old: sums of the same times in another order may differ by less."""
K_TOKENS_PER_S = 5000.0
"""Speed of a server that has told of none."""


@dataclass(frozen=True, slots=True)
class Reported:
    """A server's own figures, checked; `at_s` on the router's clock."""

    at_s: float = float("-inf")
    running: int = 0
    waiting: int = 0
    waiting_uncached_tokens: int = 0
    used_tokens: int = 0
    total_tokens: int | None = None
    max_running: int | None = None
    prefill_tokens_per_s: float | None = None
    role: Role | None = None
    """What it says it is; None where it doesn't say."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an observation of a server says, but for how far its prefills are."""

    until_s: float
    """From then on it may be another, though nothing was told: a report is too old, a rest is over."""
    max_age_s: float
    before: tuple[InstanceId, SiteId, Role, float, ModelId, int, int, int]
    """The fields before prefill_backlog_s."""
    others_s: float | None
    """Seconds of others' prefills; None where they are known in tokens alone."""
    behind: tuple[int | None, float, float | None, int | None, int | None, int | None, bool, bool]
    """The fields after it, but for the last: others_tokens."""
    others_tokens: int
    idle: InstanceObservation
    """It, while nothing of ours is in prefill there."""


@dataclass(eq=False)
class ServerHandle:
    """One server: its connection pool, what it says of itself, what this router has sent it."""

    site: SiteId
    config: Server
    session: aiohttp.ClientSession
    """For questions: load, aborts."""
    upstream: UpstreamPool
    """For requests."""
    reported: Reported = field(default_factory=Reported)
    in_flight: int = 0
    """Requests of ours that it hasn't answered."""
    pending_tokens: int = 0
    """Uncached prompt tokens of ours on it whose prefill hasn't ended."""
    prefilling: PrefillQueue = field(default_factory=PrefillQueue)
    """The same in seconds."""
    told_tokens: int = 0
    """What pending_tokens was when it last reported: the rest of what it reported is others'."""
    chunk_tokens: int | None = None
    """Most tokens of one of its prefill steps; None where it doesn't tell."""
    prefill_requests: int | None = None
    """Most prompts of one of its prefill steps; None: as many as fit, or it doesn't tell."""
    down_until_s: float = float("-inf")
    """Not to be used before, after a connection failed."""
    errors: int = 0
    """Requests in a row that it answered with an error and that another then served."""
    rests_until_s: float = float("-inf")
    """Not to be used before, after too many of them: that it tells its load says nothing of its engine."""
    misses: int = 0
    """Load polls in a row that brought nothing usable."""
    said_silent: bool = False
    """Whether the log says last that it doesn't answer."""
    draining: bool = False
    """Left the configuration, or about to change role."""
    converting: bool = False
    """Its role is being changed by this router."""
    broken: str = ""
    """Why it can't serve until it has been restarted."""
    role: Role = Role.PREFILL
    headers: dict[str, str] = field(default_factory=dict)
    _seen: _Seen | None = field(default=None, init=False, repr=False)

    def __setattr__(self, name: str, value: object) -> None:
        """What was observed holds until something of it changes."""
        object.__setattr__(self, name, value)
        object.__setattr__(self, "_seen", None)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def url(self) -> str:
        return self.config.url

    def serves(self, model: ModelId) -> bool:
        return not self.config.models or model in self.config.models

    def up(self, now: float) -> bool:
        return not self.draining and now >= max(self.down_until_s, self.rests_until_s)

    def mark_down(self, now: float, cool_down_s: float, why: str) -> None:
        self.down_until_s = now + cool_down_s
        if not self.said_silent:
            self.said_silent = True
            log.warning("%s of %s isn't used until it answers: %s", self.name, self.site, why)

    def on_heard(self) -> None:
        """It told its load, whatever had been thought of it."""
        self.down_until_s, self.misses = float("-inf"), 0
        if self.said_silent:
            self.said_silent = False
            log.info("%s of %s answers again", self.name, self.site)

    def on_error(self, now: float, cool_down_s: float) -> None:
        """It failed by itself what another then served. After K_ERRORS_IN_A_ROW, and each one that follows
        them, it rests.
        """
        self.errors += 1
        if self.errors >= K_ERRORS_IN_A_ROW:
            if now >= self.rests_until_s:
                log.warning("%s rests for %g s: %d errors in a row", self.name, cool_down_s, self.errors)
            self.rests_until_s = now + cool_down_s

    def on_answered(self) -> None:
        """It had part in an answer."""
        self.errors, self.rests_until_s = 0, float("-inf")

    async def close(self) -> None:
        self.upstream.close()
        await self.session.close()

    def observe(self, now: float, max_age_s: float) -> InstanceObservation:
        """Its load: what this router knows to be there, and what the server reports beyond that as others'.

        A server that reports too little gains nothing by it: our own requests on it still count. What they
        take is known in seconds, as predicted when they were sent; others' tokens become seconds where the
        server's speed is known, else all of it is told in tokens.

        Each decision asks this of every server, and for most nothing has changed but how far they are.
        """
        seen = self._seen
        if seen is None or now >= seen.until_s or max_age_s != seen.max_age_s:
            seen = self._look(now, max_age_s)
            object.__setattr__(self, "_seen", seen)
        if seen.others_s is None or not self.prefilling.jobs:
            return seen.idle
        backlog_s = self.prefilling.backlog_s(now) + seen.others_s
        return InstanceObservation(*seen.before, backlog_s, *seen.behind, seen.others_tokens)

    def _look(self, now: float, max_age_s: float) -> _Seen:
        fresh = now - self.reported.at_s <= max_age_s
        said = self.reported if fresh else Reported(max_running=self.reported.max_running)
        decodes = self.role is Role.DECODE
        free = None
        if fresh and said.total_tokens is not None:
            free = max(0, said.total_tokens - said.used_tokens)
        limit = self.config.max_running or self.reported.max_running
        ours = max(0, self.in_flight - said.waiting) if decodes else 0
        others_tokens = max(0, said.waiting_uncached_tokens - self.told_tokens)
        speed = self.reported.prefill_tokens_per_s
        others_s = None
        if not others_tokens or speed:
            others_s = others_tokens / speed if speed else 0.0
        back_s = max(self.down_until_s, self.rests_until_s)
        before = (
            self.name,
            self.site,
            self.role,
            max(self.reported.at_s, 0.0),
            "",
            max(said.running, ours),
            said.waiting,
            others_tokens + self.pending_tokens,
        )
        behind = (
            self.chunk_tokens,
            self.prefill_requests or math.inf,
            speed,
            free,
            self.reported.total_tokens,
            limit,
            now >= back_s and not self.broken,
            self.draining,
        )
        return _Seen(
            until_s=min(
                self.reported.at_s + max_age_s - K_INSTANT_S if fresh else math.inf,
                back_s if now < back_s else math.inf,
            ),
            max_age_s=max_age_s,
            before=before,
            others_s=others_s,
            behind=behind,
            others_tokens=others_tokens,
            idle=InstanceObservation(*before, others_s, *behind, others_tokens),
        )


class ServerPool:
    """All servers of the configuration, by name."""

    def __init__(self) -> None:
        self._handles: dict[str, ServerHandle] = {}
        self._leaving: list[ServerHandle] = []
        self._sites: list[SiteId] = []
        self._serving: dict[ModelId, Sequence[tuple[SiteId, Sequence[ServerHandle]]]] = {}
        """What `serving` found; none of it after a change."""

    def __iter__(self) -> Iterator[ServerHandle]:
        return iter(self._handles.values())

    def get(self, name: str) -> ServerHandle | None:
        return self._handles.get(name)

    def serving(self, model: ModelId) -> Sequence[tuple[SiteId, Sequence[ServerHandle]]]:
        """Every site, with its servers of the model, a model of the configuration; in the file's order."""
        found = self._serving.get(model)
        if found is None:
            here = [handle for handle in self if handle.serves(model)]
            found = self._serving[model] = [
                (site, [handle for handle in here if handle.site == site]) for site in self._sites
            ]
        return found

    def apply(
        self, config: RouterConfig, keys: Mapping[str, str]
    ) -> tuple[list[ServerHandle], list[ServerHandle]]:
        """Take over a configuration and its `keys_of`: handles that came and that left. Must run on the
        event loop.

        An unchanged server keeps its connections and figures; one that left is closed when its last request
        has ended (`sweep`), and one that changed, if only its key, is both.
        """
        wanted = {server.name: (site, server) for site, server in config.servers()}
        left = [
            handle
            for handle in self
            if wanted.get(handle.name) != (handle.site, handle.config)
            or handle.headers.get("Authorization") != _bearer(keys.get(handle.name))
        ]
        for handle in left:
            handle.draining = True
            del self._handles[handle.name]
            self._leaving.append(handle)
        came = []
        for name, (site, server) in wanted.items():
            if name not in self._handles:
                self._handles[name] = _open(site, server, keys.get(name))
                came.append(self._handles[name])
        self._sites = [site.name for site in config.sites]
        self._serving.clear()
        # Keep the file's order: it is the order of preference among equals.
        self._handles = {name: self._handles[name] for name in wanted}
        return came, left

    async def sweep(self) -> None:
        """Close servers that left and have nothing of ours any more."""
        idle = [handle for handle in self._leaving if handle.in_flight == 0]
        self._leaving = [handle for handle in self._leaving if handle.in_flight > 0]
        for handle in idle:
            await handle.close()
        for handle in self:
            handle.upstream.sweep()

    async def close(self) -> None:
        for handle in [*self._handles.values(), *self._leaving]:
            await handle.close()
        self._handles.clear()
        self._leaving.clear()


def keys_of(config: RouterConfig) -> dict[str, str]:
    """The servers' own keys by name, as their files are now. Raises ConfigError. Blocks."""
    found = {}
    for _, server in config.servers():
        if server.admin_key_file is not None:
            read_key(f"{server.name}.admin_key_file", server.admin_key_file)  # it is wanted later: say so now
        if server.key_file is not None:
            found[server.name] = read_key(f"{server.name}.key_file", server.key_file)
    return found


def read_key(field: str, file: str) -> str:
    """What a header can carry. Raises ConfigError."""
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not ASCII"
        raise ConfigError("the configuration", field, file, f"can't be read: {why}") from None
    if not _KEY.fullmatch(key):
        raise ConfigError("the configuration", field, file, "expected a file with one word, the key")
    return key


def _bearer(key: str | None) -> str | None:
    return None if key is None else f"Bearer {key}"


def _open(site: SiteId, server: Server, key: str | None) -> ServerHandle:
    headers = {"Content-Type": "application/json"}
    bearer = _bearer(key)
    if bearer is not None:
        headers["Authorization"] = bearer
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=K_KEEP_ALIVE_S,
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=K_CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=True,
        skip_auto_headers=("User-Agent",),
        read_bufsize=1 << 17,
    )
    upstream = UpstreamPool(server.url, headers)
    return ServerHandle(site, server, session, upstream, role=Role(server.role), headers=headers)


def least_loaded(handles: Iterable[ServerHandle], now: float, max_age_s: float) -> ServerHandle | None:
    """The prefill server that would be free first; None without any."""
    best, best_key = None, (float("inf"), float("inf"))
    for handle in handles:
        seen = handle.observe(now, max_age_s)
        wait_s = seen.prefill_backlog_s
        if wait_s is None:
            wait_s = seen.waiting_uncached_tokens / K_TOKENS_PER_S
        key = (wait_s, float(handle.in_flight))
        if key < best_key:
            best, best_key = handle, key
    return best


def least_running(handles: Iterable[ServerHandle], now: float, max_age_s: float) -> ServerHandle | None:
    """The decode server whose batch is emptiest relative to its limit; None without any."""
    best, best_key = None, (float("inf"), float("inf"))
    for handle in handles:
        seen = handle.observe(now, max_age_s)
        busy = seen.running + seen.waiting
        key = (busy / (seen.max_running or 64), float(handle.in_flight))
        if key < best_key:
            best, best_key = handle, key
    return best
