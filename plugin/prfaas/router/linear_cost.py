"""What a site's instances take, by the figures of the router's own file."""

from __future__ import annotations

from dataclasses import dataclass

from prfaas.config.router import CostFile


@dataclass(frozen=True, slots=True)
class LinearCost:
    """T_prefill(l) and S_kv(l) as two straight lines, from the configuration."""

    config: CostFile

    def prefill_s(self, tokens: float, /) -> float:
        return self.config.base_s + tokens / self.config.prefill_tokens_per_s

    def kv_bytes(self, tokens: float, /) -> float:
        return self.config.state_bytes + tokens * self.config.kv_bytes_per_token
