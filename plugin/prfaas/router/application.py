"""The router's web application: which path is answered by what, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from prfaas.model.errors import PrfaasError
from prfaas.router.body import Endpoint
from prfaas.router.errors import BadRequest, DoorError
from prfaas.router.pages import as_json, decisions_page, health_page, model_page, models_page

if TYPE_CHECKING:
    from prfaas.router.service import Router

log = logging.getLogger("prfaas.router")


class ClientFaults(logging.Logger):
    """aiohttp's log. What clients send that isn't HTTP is counted, rather than told with a traceback."""

    def __init__(self, on_fault: Callable[[], None]) -> None:
        super().__init__("prfaas.router.http")
        self.parent = log
        self._on_fault = on_fault

    def handle(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            self._on_fault()
        else:
            super().handle(record)


async def _expected(request: web.Request) -> web.Response | None:
    """`Expect: 100-continue`, and a clear no to anything else."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        if request.version >= (1, 1) and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return None
    said = BadRequest("Expect: only 100-continue is known.", status=417, code="unknown_expectation")
    return web.Response(status=417, body=said.body, content_type="application/json")


class Application:
    """Handlers over a router's parts."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def build(self) -> web.Application:
        app = web.Application(middlewares=[self._errors_in_form])
        for endpoint in Endpoint:
            app.router.add_post(endpoint.value, self._generating(endpoint), expect_handler=_expected)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        for path in ("/health", "/health_generate"):
            app.router.add_get(path, self._health)
        app.router.add_get("/metrics", self._metrics_page)
        app.router.add_get("/decisions", self._decisions)
        app.router.add_get("/roles", self._roles)
        app.router.add_post("/reload", self._reload_asked)
        for path in ("/server_info", "/get_server_info", "/get_model_info", "/model_info"):
            app.router.add_get(path, self._server_info)
        return app

    def _generating(
        self, endpoint: Endpoint
    ) -> Callable[[web.Request], Coroutine[None, None, web.StreamResponse]]:
        async def handler(request: web.Request) -> web.StreamResponse:
            return await self._router.door.handle(request, endpoint)

        return handler

    @web.middleware
    async def _errors_in_form(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Errors of pages, and aiohttp's own (404, 405), in OpenAI's form."""
        try:
            return await handler(request)
        except DoorError as error:
            return web.Response(
                status=error.status, body=error.body, content_type="application/json", headers=error.headers
            )
        except web.HTTPException as error:
            if error.status < 400:
                raise
            said = BadRequest(
                f"{request.method} {request.path[:128]}: {error.reason}",
                status=error.status,
                code="no_such_page",
            )
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return web.Response(
                status=error.status, body=said.body, content_type="application/json", headers=headers
            )
        except (asyncio.CancelledError, ConnectionResetError):
            raise
        except Exception:
            log.exception("a fault of the router's own, at %s", request.path[:128])
            fault = DoorError("The router failed; its log says more.")
            return web.Response(status=500, body=fault.body, content_type="application/json")

    def _administrator(self, request: web.Request) -> None:
        if not self._router.clients.identify(request.headers).admin:
            raise BadRequest("This key may not.", status=403, kind="permission_error", code="not_admin")

    async def _models(self, request: web.Request) -> web.Response:
        self._router.clients.identify(request.headers)
        return as_json(models_page(self._router.config, self._router.started_s))

    async def _model(self, request: web.Request) -> web.Response:
        self._router.clients.identify(request.headers)
        return as_json(model_page(self._router.config, request.match_info["name"], self._router.started_s))

    async def _health(self, request: web.Request) -> web.Response:
        healthy, page = health_page(
            self._router.config, self._router.servers, self._router.links, self._router.clock()
        )
        return as_json(page, 200 if healthy else 503)

    async def _metrics_page(self, request: web.Request) -> web.Response:
        now = self._router.clock()
        metrics = self._router.metrics
        metrics.in_flight.set(self._router.clients.in_flight)
        metrics.held.set(self._router.scheduler.pen.held)
        for gauge in (metrics.server_up, metrics.server_in_flight, metrics.link_up, metrics.link_rate):
            gauge.clear()
        for handle in self._router.servers:
            metrics.server_up.labels(handle.name, handle.site, handle.role).set(handle.up(now))
            metrics.server_in_flight.labels(handle.name).set(handle.in_flight)
        for link, estimate in self._router.links.estimates(now).items():
            metrics.link_up.labels(str(link)).set(estimate.up)
            metrics.link_rate.labels(str(link)).set(estimate.rate_bps)
        for figure, value in self._router.scheduler.policy.get_log_data().items():
            metrics.policy_figures.labels(figure).set(value)
        return web.Response(body=metrics.page(), headers={"Content-Type": metrics.content_type})

    async def _decisions(self, request: web.Request) -> web.Response:
        self._administrator(request)
        return as_json(decisions_page(self._router.scheduler, request.query))

    async def _roles(self, request: web.Request) -> web.Response:
        self._administrator(request)
        return as_json(self._router.roles.page())

    async def _reload_asked(self, request: web.Request) -> web.Response:
        self._administrator(request)
        try:
            await self._router.reload()
        except PrfaasError as error:
            raise BadRequest(str(error), status=422, code="bad_configuration") from None
        return as_json({"status": "reloaded"})

    async def _server_info(self, request: web.Request) -> web.Response:
        """What SGLang's tools look for at a server, as far as a router has it."""
        self._router.clients.identify(request.headers)
        model = self._router.config.models[0]
        return as_json(
            {
                "router": "prfaas",
                "policy": self._router.config.policy.name,
                "model_path": model.name,
                "served_model_name": model.name,
                "tokenizer_path": model.tokenizer or model.name,
                "is_generation": True,
                "internal_states": [],
            }
        )
