"""The prefix index as the router keeps it: fed by the servers' KV events, asked for each prompt."""

from __future__ import annotations

from collections.abc import Mapping

from prfaas.config.router import Model, RouterConfig
from prfaas.model.ids import ModelId
from prfaas.router.fleet import ServerHandle
from prfaas.router.tokens import Hasher, Prompt
from prfaas.telemetry.router_metrics import RouterMetrics


class PrefixBook:
    """Who has which prefix. Without KV events nothing is known, and nothing promised."""

    def __init__(self, config: RouterConfig, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self.apply(config)

    def apply(self, config: RouterConfig) -> None:
        self._config = config

    def hasher(self, model: Model) -> Hasher | None:
        return None

    def add_server(self, handle: ServerHandle) -> None:
        return None

    def remove_server(self, name: str) -> None:
        return None

    def cached_tokens(self, model: ModelId, prompt: Prompt) -> Mapping[str, int]:
        return {}

    def on_batch(self, server: str, sequence: int, payload: bytes) -> None:
        return None

    def on_lost(self, server: str) -> None:
        return None
