"""Everything of one router, put together: what is started, reloaded and stopped.

Several routers may serve the same servers: they share nothing and don't know of each other. Rooms and
request ids are random, so they can't meet; each reads every server's load, KV events and every link's
estimate for itself, and so sees the others' work as soon as servers report it (within `loads.interval_s`).
Limits and counts (keys, requests in flight, held requests), last decisions and the policy's prices are each
router's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import zmq.asyncio
from aiohttp import web

from prfaas.config.pump import is_loopback
from prfaas.config.router import RouterConfig
from prfaas.model.errors import ConfigError, MachineError, PrfaasError
from prfaas.router.application import Application, ClientFaults
from prfaas.router.clients import Clients
from prfaas.router.door import Door
from prfaas.router.fleet import ServerHandle, ServerPool
from prfaas.router.kv_events import KvEventReader
from prfaas.router.link_status import LinkWatcher
from prfaas.router.links import LinkBook
from prfaas.router.loads import LoadPoller
from prfaas.router.outcome import Outcome
from prfaas.router.pages import record_row
from prfaas.router.prefixes import PrefixBook, hashers
from prfaas.router.reloading import prepare, refuse_fixed
from prfaas.router.roles import RoleKeeper
from prfaas.router.scheduler import Scheduler
from prfaas.router.ticket import Record
from prfaas.router.tls import load_certificates, tls_context
from prfaas.router.tokens import OffLoop, PromptReader
from prfaas.telemetry.event_log import EventLog
from prfaas.telemetry.router_metrics import RouterMetrics

log = logging.getLogger("prfaas.router")

K_SWEEP_S = 1.0
K_GRACE_S = 30.0
"""Running requests have this long to end when the router stops."""


class Router:
    """One front door. `start`, any number of `reload`, `stop`; all on one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        reread: Callable[[], RouterConfig] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`reread` reads the configuration anew. Raises ConfigError, UsageError for what can't be served."""
        self.config = config
        self.metrics = RouterMetrics()
        self.servers = ServerPool()
        self._prepared = prepare(config, {})
        self._reread = reread
        self.clock = clock
        self.started_s = time.time()
        # Rooms must differ between routers that share servers; a seed is for tests alone.
        self._rng = random.Random(
            int.from_bytes(os.urandom(16), "big") if config.seed is None else config.seed
        )
        self.links = LinkBook(cool_down_s=config.retry.cool_down_s, max_age_s=config.loads.max_age_s)
        self.links.apply(config.links, cool_down_s=config.retry.cool_down_s, max_age_s=config.loads.max_age_s)
        self.prefixes = PrefixBook(
            config, lambda cause: self.metrics.refused_input.labels("kv_events", cause).inc()
        )
        self._log = self._open_log(config)
        self.scheduler = Scheduler(
            config,
            self.servers,
            self.links,
            costs=lambda file: self._prepared.costs[file],
            prefixes=self.prefixes,
            clock=clock,
            on_record=self._on_record,
            on_decided=self.metrics.decide.observe,
        )
        self.roles = RoleKeeper(
            config,
            self.servers,
            self.metrics,
            profiles=lambda found: {site.name: self._prepared.costs[site.cost] for site in found.sites},
            snapshot=lambda now: self.scheduler.snapshot(self.config.models[0].name, (), now),
            policy=lambda: self.scheduler.policy,
            clock=clock,
            on_step=self._on_event,
            on_news=self.scheduler.pen.wake,
        )
        self.clients = Clients(config)
        self._off_loop = OffLoop(
            inline_bytes=config.limits.inline_bytes, threads=config.limits.tokenise_threads
        )
        self.door = Door(
            config,
            self.scheduler,
            self.clients,
            self._readers(config),
            self._off_loop,
            self.metrics,
            rng=self._rng,
            clock=clock,
            on_outcome=self._on_outcome,
            caches=self.prefixes,
        )
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._zmq: zmq.asyncio.Context | None = None
        self._runner: web.AppRunner | None = None
        self._listeners: list[asyncio.Server] = []
        self._tls = tls_context(config.listen.tls) if config.listen.tls else None
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Future[None]] = set()
        self._refused_connections = 0

    # Building blocks

    def _readers(self, config: RouterConfig) -> dict[str, PromptReader]:
        """By model, set to hash what somebody tells of."""
        readers = {name: reader for name, (_, reader) in self._prepared.readers.items()}
        for name, hasher in hashers(config).items():
            readers[name].hasher = hasher
        return readers

    def _open_log(self, config: RouterConfig) -> EventLog | None:
        if config.logs.events is None:
            return None
        path = Path(config.logs.events)
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError("the configuration", "logs.events", str(path), "expected a file to write to")
        return EventLog(
            path,
            max_bytes=config.logs.max_bytes,
            on_dropped=self.metrics.log_dropped.inc,
        )

    def _on_record(self, record: Record) -> None:
        decision = record.decision
        self.metrics.decisions.labels(decision.policy, decision.action, record.site or "").inc()
        self.roles.on_record(record)
        if self._log is not None:
            self._log.add(record_row(record))

    def _on_outcome(self, outcome: Outcome) -> None:
        self.roles.on_outcome(outcome)
        self._on_event(outcome)

    def _on_event(self, event: object) -> None:
        if self._log is not None:
            self._log.add(event)

    # Life

    async def start(self) -> tuple[str, int]:
        """Listen; where. Raises MachineError when the address is taken."""
        listen = self.config.listen
        self._zmq = zmq.asyncio.Context()
        await self._adopt(self.config)
        self._spawn("", self._sweep())
        self._spawn("", self.roles.run())
        if self._log is not None:
            self._spawn("", self._log.run())
        limits = self.config.limits
        self._runner = web.AppRunner(
            Application(self).build(),
            handle_signals=False,
            access_log=None,
            logger=ClientFaults(self.metrics.refused_input.labels("client", "not http").inc),
            auto_decompress=False,  # bounded, and off the event loop: see the body
            handler_cancellation=True,
            keepalive_timeout=limits.idle_timeout_s,
            max_field_size=limits.max_header_bytes,
            max_line_size=limits.max_header_bytes,
            shutdown_timeout=K_GRACE_S,
            tcp_keepalive=True,
            lingering_time=1.0,
        )
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            listener = await loop.create_server(
                self._protocol,
                listen.host,
                listen.port,
                ssl=self._tls,
                backlog=listen.backlog,
                reuse_port=listen.reuse_port or None,
            )
        except OSError as error:
            await self.stop()
            # asyncio's own words repeat the address; a name that isn't known has no number of the system's.
            number = error.errno or 0
            why = os.strerror(number) if number > 0 else error.strerror or str(error)
            raise MachineError(f"can't listen on {listen.host}:{listen.port}: {why}") from None
        self._listeners.append(listener)
        host, port = listener.sockets[0].getsockname()[:2]
        log.info("listening on %s:%d", host, port)
        if not self.config.keys and not is_loopback(host):
            log.warning("no keys: whoever reaches %s may ask, read /decisions and post /reload", host)
        return host, port

    def _protocol(self) -> asyncio.Protocol:
        """A connection's handler, or one that closes it at once when there are too many."""
        assert self._runner is not None
        assert self._runner.server is not None
        if len(self._runner.server.connections) >= self.config.limits.max_connections:
            self._refused_connections += 1
            self.metrics.refused_input.labels("client", "too many connections").inc()
            return _Busy()
        handler: asyncio.Protocol = self._runner.server()
        return handler

    def _spawn(self, owner: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(_tell_of_death)
        self._tasks.setdefault(owner, []).append(task)

    async def _end(self, owner: str) -> None:
        tasks = self._tasks.pop(owner, [])
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _adopt(self, config: RouterConfig) -> None:
        """Take over a configuration's servers and links: those that left are heard no more, those that came
        are."""
        wanted = {f"link {link.model_dump_json()}" for link in config.links}
        _, left = self.servers.apply(config, self._prepared.server_keys)
        for owner in [name for name in self._tasks if name.startswith("link ") and name not in wanted]:
            await self._end(owner)
        for handle in left:
            await self._end(handle.name)
            self.prefixes.remove_server(handle.name)
        for name in self.prefixes.apply(config):
            await self._end(name)
        for handle in self.servers:
            if handle.name not in self._tasks:
                self._watch(handle)
        for link in config.links:
            owner = f"link {link.model_dump_json()}"
            if link.status_url is not None and owner not in self._tasks:
                watcher = LinkWatcher(
                    link,
                    self.links,
                    self.metrics,
                    rng=self._rng,
                    authority=self._prepared.authorities.get(link.status_ca or ""),
                    clock=self.clock,
                )
                self._spawn(owner, watcher.run())

    def _watch(self, handle: ServerHandle) -> None:
        poller = LoadPoller(
            handle,
            lambda: self.config.loads,
            lambda: self.config.retry.cool_down_s,
            self.metrics,
            rng=self._rng,
            clock=self.clock,
            on_news=self.scheduler.pen.wake,
        )
        self._spawn(handle.name, poller.run())
        if handle.config.kv_events is not None:
            assert self._zmq is not None
            self.prefixes.add_server(handle)
            reader = KvEventReader(
                handle.name, handle.config.kv_events, self.prefixes, self.metrics, self._zmq
            )
            self._spawn(handle.name, reader.run())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(K_SWEEP_S)
            await self.servers.sweep()

    async def reload(self) -> None:
        """Read the configuration again and take it over; running requests end as they began. Who asked for it
        may leave: it is taken over whole.

        Raises ConfigError or UsageError, and then nothing has changed.
        """
        reloading = asyncio.ensure_future(self._reload())
        self._reloads.add(reloading)
        reloading.add_done_callback(self._reloads.discard)
        await asyncio.shield(reloading)

    async def _reload(self) -> None:
        async with self._reloading:
            try:
                if self._reread is None:
                    raise ConfigError(
                        "the configuration", "the file", None, "this router was not read from one"
                    )
                config = await asyncio.to_thread(self._reread)
                refuse_fixed(self.config, config)
                prepared = await asyncio.to_thread(prepare, config, self._prepared.readers)
                if self._tls is not None and config.listen.tls is not None:
                    load_certificates(self._tls, config.listen.tls)
                before, self._prepared = self._prepared, prepared
                try:
                    self.scheduler.apply(config)  # makes a policy before it changes anything
                except PrfaasError:
                    self._prepared = before
                    raise
            except PrfaasError:
                self.metrics.reloads.labels("refused").inc()
                raise
            # From here on nothing can fail.
            self.config = config
            self.roles.apply(config)
            self.links.apply(
                config.links, cool_down_s=config.retry.cool_down_s, max_age_s=config.loads.max_age_s
            )
            self.clients.apply(config)
            self.door.apply(config, self._readers(config))
            self._off_loop.inline_bytes = config.limits.inline_bytes
            await self._adopt(config)
            self.metrics.reloads.labels("done").inc()
            log.info("configuration reloaded")

    async def stop(self) -> None:
        """Take nothing new, let running requests end (for K_GRACE_S at most), close everything."""
        for listener in self._listeners:
            listener.close()
        log.info("stopping: %d under way have %g s to end", self.clients.in_flight, K_GRACE_S)
        if self._runner is not None:
            await self._runner.cleanup()
        for under_way in (self.door.background, self._reloads):
            if under_way:
                await asyncio.wait(under_way, timeout=K_GRACE_S)
        for owner in list(self._tasks):
            await self._end(owner)
        await self.servers.close()
        self._off_loop.close()
        if self._zmq is not None:
            self._zmq.destroy(linger=0)
        if self._log is not None:
            self._log.close()


class _Busy(asyncio.Protocol):
    """Closes its connection at once: the limit of connections is reached."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _tell_of_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a watcher died: %r", error, exc_info=error)


async def serve(router: Router, *, until: asyncio.Event, reload: asyncio.Event) -> None:
    """Run a started router until told to stop; reload when told to. Faults of a reload are logged."""
    stopping = asyncio.ensure_future(until.wait())
    try:
        while not until.is_set():
            reloading = asyncio.ensure_future(reload.wait())
            await asyncio.wait({stopping, reloading}, return_when=asyncio.FIRST_COMPLETED)
            if reload.is_set():
                reload.clear()
                try:
                    await router.reload()
                except PrfaasError as error:
                    log.error("reload refused, the former configuration stays: %s", error)
                except Exception:  # whatever it is, requests are served on
                    log.exception("a fault of the router's own, at a reload")
            else:
                reloading.cancel()
    finally:
        stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stopping
        await router.stop()
