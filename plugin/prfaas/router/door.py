"""The door: a client's request from its headers to the last byte of its answer.

Before the first token a failed attempt is followed by another, by another path; the client notices the time
alone. From the first token on the stream is the client's: what breaks it is told in an error event. Each
request ends exactly once: answered, refused, told of an error, or left by its client.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from functools import partial

import aiohttp
from aiohttp import web

from prfaas.config.router import ApiKey, Model, RouterConfig
from prfaas.router.attempt import Attempt, AttemptFailed, FailureKind, Opened, Route
from prfaas.router.body import (
    Asked,
    Endpoint,
    body_of,
    merge_prompt_logprobs,
    read_body,
    too_large,
    unpacked,
    with_fields,
)
from prfaas.router.clients import Clients, Wishes
from prfaas.router.errors import BadRequest, DoorError, NoPath, Overloaded
from prfaas.router.moves import bring
from prfaas.router.outcome import Outcome, answer_headers
from prfaas.router.prefixes import Caches
from prfaas.router.relay import EventStream, Relay
from prfaas.router.scheduler import Scheduler
from prfaas.router.ticket import Ticket
from prfaas.router.tokens import OffLoop, Prompt, PromptReader
from prfaas.telemetry.router_metrics import RouterMetrics

log = logging.getLogger("prfaas.router")

K_DEFAULT_MODEL = "default"
"""What SGLang takes a request without a model to name."""
K_CLIENT_LEFT = 499
K_ROOMS = 1 << 62


class Door:
    """Handlers of the three endpoints that generate."""

    def __init__(
        self,
        config: RouterConfig,
        scheduler: Scheduler,
        clients: Clients,
        readers: Mapping[str, PromptReader],
        off_loop: OffLoop,
        metrics: RouterMetrics,
        *,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        caches: Caches | None = None,
    ) -> None:
        self._scheduler, self._clients, self._off_loop = scheduler, clients, off_loop
        self._metrics, self._rng, self._clock = metrics, rng, clock
        self._on_outcome, self._caches = on_outcome, caches or Caches()
        self.background: set[asyncio.Task[None]] = set()
        """Aborts and prefill answers that are still under way."""
        self.apply(config, readers)

    def apply(self, config: RouterConfig, readers: Mapping[str, PromptReader]) -> None:
        """Take over a configuration; running requests keep what they began with."""
        self._config, self._readers = config, readers
        self._models: dict[str, Model] = {}
        for model in config.models:
            for name in (model.name, *model.aliases):
                self._models[name] = model

    async def handle(self, request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
        """aiohttp's handler. Answers every DoorError in OpenAI's form."""
        began_s = self._clock()
        outcome = Outcome(at_s=time.time(), request=f"{self._rng.getrandbits(96):024x}", endpoint=endpoint)
        late: list[asyncio.Task[None]] = []
        try:
            key = self._clients.identify(request.headers)
            wishes = self._clients.wishes(key, request.headers)
            outcome.tenant = key.tenant
            with self._clients.admitted(key):
                return await self._serve(request, endpoint, key, wishes, outcome, began_s, late)
        except DoorError as error:
            outcome.status, outcome.error = error.status, error.message
            if isinstance(error, BadRequest):
                self._metrics.refused_input.labels("client", str(error.code)).inc()
            headers = error.headers | answer_headers(outcome)
            return web.Response(
                status=error.status, body=error.body, content_type="application/json", headers=headers
            )
        except (asyncio.CancelledError, ConnectionResetError):
            outcome.status, outcome.error = K_CLIENT_LEFT, outcome.error or "the client left"
            raise
        except Exception as fault:  # logged, and told to the client, by the application
            outcome.status, outcome.error = 500, repr(fault)
            raise
        finally:
            outcome.e2e_s = self._clock() - began_s
            self._metrics.requests.labels(endpoint, str(outcome.status)).inc()
            if outcome.ttft_s is not None:
                self._metrics.e2e.labels(outcome.site or "").observe(outcome.e2e_s)
            if late:
                late[0].add_done_callback(lambda _: self._on_outcome(outcome))
            else:
                self._on_outcome(outcome)

    async def _serve(
        self,
        request: web.Request,
        endpoint: Endpoint,
        key: ApiKey,
        wishes: Wishes,
        outcome: Outcome,
        began_s: float,
        late: list[asyncio.Task[None]],
    ) -> web.StreamResponse:
        """`late` gets what is still to be waited for before the outcome is whole."""
        raw = await self._body(request)
        arrived_s = self._clock()
        coding = request.headers.get("Content-Encoding")
        size = len(raw) if coding is None else None
        asked, model, prompt = await self._off_loop.run(size, lambda: self._read(endpoint, raw, coding))
        outcome.model, outcome.prompt_tokens = model.name, prompt.tokens
        self._metrics.prompt_tokens.observe(prompt.tokens)
        limit = self._most_tokens(model)
        if prompt.tokens > limit * prompt.prompts:
            counted = prompt.tokens if prompt.exact else f"some {prompt.tokens} or more"
            raise BadRequest(
                f"The prompt has {counted} tokens; the limit is {limit}.",
                code="context_length_exceeded",
                param="messages" if endpoint is Endpoint.CHAT else "prompt",
            )
        ticket = Ticket(
            request_id=outcome.request,
            model=model.name,
            tenant=key.tenant,
            slo_class=wishes.slo_class,
            prompt=prompt,
            output_tokens=asked.output_tokens,
            arrived_s=began_s,
            deadline_s=None if wishes.first_token_within_s is None else began_s + wishes.first_token_within_s,
        )
        try:
            attempt, opened = await self._first_token(asked, ticket, outcome, arrived_s)
            try:
                outcome.ttft_s = self._clock() - began_s
                self._told(attempt, ticket, outcome)
                answer = await self._answer(request, asked, attempt, opened, outcome, wishes)
                self._answered(attempt, opened, outcome, began_s)
                return answer
            finally:
                ending = await attempt.close()
                if ending is None:
                    self._compare(attempt, ticket, outcome)
                else:
                    ending.add_done_callback(lambda _: self._compare(attempt, ticket, outcome))
                    late.append(ending)
        finally:
            self._scheduler.on_finished(ticket)

    async def _body(self, request: web.Request) -> bytes:
        limits = self._config.limits
        content = request.content
        if content.is_eof() and content.exception() is None:
            # It came with its head, as short ones do.
            raw = content.read_nowait()
            if len(raw) > limits.max_body_bytes:
                raise too_large(limits.max_body_bytes)
            return raw
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                return await body_of(request, limits.max_body_bytes)
        except TimeoutError:
            raise BadRequest(
                f"The body did not arrive within {limits.body_timeout_s:g} s.", status=408, code="slow_body"
            ) from None
        except (aiohttp.ClientPayloadError, web.RequestPayloadError) as error:
            raise BadRequest(f"The body can't be read: {error}", code="bad_body") from None

    def _read(self, endpoint: Endpoint, raw: bytes, coding: str | None) -> tuple[Asked, Model, Prompt]:
        """Off the event loop for large bodies. Raises BadRequest."""
        asked = read_body(endpoint, unpacked(raw, coding, self._config.limits.max_body_bytes))
        model = self._model(asked)
        return asked, model, self._readers[model.name].read(asked, self._most_tokens(model))

    def _most_tokens(self, model: Model) -> int:
        longest = self._config.limits.max_prompt_tokens
        return min(model.max_prompt_tokens or longest, longest)

    def _model(self, asked: Asked) -> Model:
        name = asked.model
        if name is None or name == K_DEFAULT_MODEL:
            return self._models.get(K_DEFAULT_MODEL, self._config.models[0])
        # "base:adapter" names a LoRA adapter, which the servers resolve.
        found = self._models.get(name) or self._models.get(name.partition(":")[0])
        if found is None:
            raise BadRequest(
                f"The model {name[:128]!r} does not exist.",
                status=404,
                code="model_not_found",
                param="model",
            )
        if name in found.aliases:
            asked.body = with_fields(asked.body, {"model": found.name})
        return found

    async def _first_token(
        self, asked: Asked, ticket: Ticket, outcome: Outcome, arrived_s: float
    ) -> tuple[Attempt, Opened]:
        """Attempt after attempt until one has its first token. Raises DoorError."""
        retry = self._config.retry
        end_s = arrived_s + retry.total_s
        tried: set[tuple[str, str | None]] = set()
        rounds = waits = 0
        last: AttemptFailed | None = None
        while True:
            try:
                route = await self._scheduler.route(ticket)
            except NoPath as none:
                waits += 1
                if last is None or ticket.attempt + waits >= retry.attempts:
                    raise self._gave_up(last) if last else none from None
                # Every path has failed for this request: after a pause they may be tried again.
                self._scheduler.forgive(ticket)
                await self._pause(rounds, end_s, last)
                rounds += 1
                continue
            names = (route.decode.name, route.prefill.name if route.prefill else None)
            if names in tried:
                await self._pause(rounds, end_s, last)
                rounds += 1
            elif not tried:
                self._metrics.dispatched(self._clock() - arrived_s, ticket.held_s)
            tried.add(names)
            decision = ticket.decision
            assert decision is not None
            outcome.site, outcome.reason = decision.prefill_site, decision.reason
            outcome.predicted_ttft_s = decision.predicted_ttft_s
            outcome.attempts = ticket.attempt + 1
            if decision.cache_move is not None:
                outcome.moved_tokens = await bring(
                    route, decision.cache_move, ticket, self._rng, self._metrics, self.background
                )
            outcome.predicted_cached_tokens = ticket.cached.get(route.prefill.name) if route.prefill else None
            room = self._rng.randrange(K_ROOMS)
            outcome.room = room if route.prefill is not None else None
            attempt = Attempt(
                asked,
                route,
                rid=f"{ticket.request_id}-{ticket.attempt:02d}",
                room=room,
                aborts=self.background,
                on_prefill_ended=partial(self._prefill_ended, ticket, ticket.attempt),
                clock=self._clock,
            )
            first = (route.prefill or route.decode).name
            self._caches.on_dispatched(first, ticket.prompt, ticket.cached.get(first, 0))
            predicted_s = decision.predicted_ttft_s or 0.0
            patience_s = max(retry.first_token_min_s, retry.first_token_factor * predicted_s)
            patience_s = min(patience_s, max(0.1, end_s - self._clock()))
            try:
                return attempt, await attempt.open(patience_s, retry.answer_s)
            except AttemptFailed as failed:
                await attempt.close()
                last = failed
                self._failed(ticket, route, failed, outcome)
                if ticket.attempt >= retry.attempts or self._clock() >= end_s:
                    raise self._gave_up(failed) from None
            except BaseException:
                await attempt.close()
                raise

    def _failed(self, ticket: Ticket, route: Route, failed: AttemptFailed, outcome: Outcome) -> None:
        site = route.prefill.site if route.prefill else route.decode.site
        outcome.failures.append(f"{site}: {failed}")
        self._metrics.attempts_failed.labels(site, failed.side, failed.kind).inc()
        self._scheduler.on_failed(ticket, route, failed)

    async def _pause(self, rounds: int, end_s: float, last: AttemptFailed | None) -> None:
        """Before a path that has failed is tried again. Raises when there is no time for it."""
        pause_s = self._config.retry.backoff_s * 2 ** min(rounds, 8)
        if self._clock() + pause_s >= end_s:
            raise self._gave_up(last)
        await asyncio.sleep(pause_s * (0.5 + self._rng.random() / 2))

    def _gave_up(self, last: AttemptFailed | None) -> DoorError:
        retry_after_s = self._config.limits.retry_after_s
        if last is None:
            return NoPath("No server could serve this request.", retry_after_s=retry_after_s)
        if last.kind is FailureKind.REFUSED:
            return Overloaded(
                f"Refused on every path; last: {last.message}",
                code="refused",
                retry_after_s=last.retry_after_s or retry_after_s,
            )
        if last.kind is FailureKind.TIMEOUT:
            return NoPath(
                f"No first token in time: {last.message}",
                status=504,
                code="timeout",
                retry_after_s=retry_after_s,
            )
        return NoPath(f"Every path failed; last: {last}", retry_after_s=retry_after_s)

    def _told(self, attempt: Attempt, ticket: Ticket, outcome: Outcome) -> None:
        """The first token is here."""
        attempt.unbook_tokens()
        answer = attempt.prefill_answer
        if answer is None:
            name = (attempt.route.prefill or attempt.route.decode).name
            self._caches.on_prefilled(name, ticket.prompt, None)
        self._scheduler.on_first_token(ticket, answer.cached_tokens if answer else None)
        self._metrics.ttft.labels(outcome.site or "").observe(outcome.ttft_s or 0.0)

    def _prefill_ended(self, ticket: Ticket, number: int, attempt: Attempt) -> None:
        server = (attempt.route.prefill or attempt.route.decode).name
        self._caches.on_ended(server)
        if attempt.prefill_answer is not None:
            self._caches.on_prefilled(server, ticket.prompt, attempt.prefill_answer.cached_tokens)
            self._scheduler.on_prefill_done(ticket, number)

    def _answered(self, attempt: Attempt, opened: Opened, outcome: Outcome, began_s: float) -> None:
        """To the last byte, or told why not."""
        if outcome.error is None and attempt.route.prefill is not None and outcome.ttft_s is not None:
            from_s = attempt.prefill_ended_s if opened.connection is None else began_s + outcome.ttft_s
            outcome.decode_site = attempt.route.decode.site
            outcome.decode_s = None if from_s is None else max(0.0, self._clock() - from_s)

    def _compare(self, attempt: Attempt, ticket: Ticket, outcome: Outcome) -> None:
        """Was the prefix prediction right?"""
        answer = attempt.prefill_answer
        outcome.cached_tokens = answer.cached_tokens if answer else None
        if outcome.cached_tokens is not None and outcome.predicted_cached_tokens is not None:
            equal = outcome.cached_tokens == outcome.predicted_cached_tokens
            self._metrics.cached_prediction.labels("equal" if equal else "different").inc()

    async def _answer(
        self,
        request: web.Request,
        asked: Asked,
        attempt: Attempt,
        opened: Opened,
        outcome: Outcome,
        wishes: Wishes,
    ) -> web.StreamResponse:
        outcome.status = 200
        headers = answer_headers(outcome, wishes.correlation)
        if opened.connection is None:
            body = merge_prompt_logprobs(asked, opened.first, attempt.prefill_body)
            return web.Response(body=body, content_type=opened.content_type, headers=headers)
        headers["Content-Type"] = "text/event-stream; charset=utf-8"
        headers["Cache-Control"] = "no-cache"
        headers["X-Accel-Buffering"] = "no"
        out = EventStream(request, headers)
        try:
            await self._stream(request, out, attempt, opened, outcome)
        except ConnectionResetError as left:
            # Nothing to be told to anybody, and nothing for the log: clients leave.
            outcome.status, outcome.error = K_CLIENT_LEFT, str(left) or "the client left"
        except Exception as fault:
            # An answer of its own, as the application makes, would land in the middle of the stream.
            log.exception("a fault of the router's own, in a stream")
            outcome.error = repr(fault)
            await out.fail("The router failed; its log says more.", "internal_error")
        return out

    async def _stream(
        self,
        request: web.Request,
        out: EventStream,
        attempt: Attempt,
        opened: Opened,
        outcome: Outcome,
    ) -> None:
        """From the first events to the end of the answer. Raises ConnectionResetError: the client left."""
        assert opened.connection is not None
        stall_s = self._config.limits.client_stall_s
        out.send(opened.first)
        relay = Relay(request, out, opened.connection, opened.cutter)
        cause = await relay.run(self._config.retry.stall_s, stall_s)
        if cause is None:
            attempt.finished()
        else:
            outcome.error = f"the stream broke after its first token: {cause}"
            self._metrics.broken_streams.labels(cause).inc()
            await out.fail(f"The server's stream ended early ({cause}).", "stream_broken")
        await out.write_eof()
