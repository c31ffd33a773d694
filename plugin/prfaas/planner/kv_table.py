"""KV throughput of models, and what clusters of them send: the report's table 3 and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prfaas.model.profiles import Curve, ProfileError
from prfaas.planner.equations import cluster_egress_bps


@dataclass(frozen=True)
class KvRow:
    """Φ of one model on one instance, at some lengths."""

    model: str
    kind: str
    tokens: tuple[float, ...]
    kv_throughput_bps: tuple[float, ...]

    def at(self, tokens: float) -> float:
        """Φ(l), linear between the table's lengths. Φ may fall with l. Raises ProfileError outside them."""
        x, y = self.tokens, self.kv_throughput_bps
        if not x[0] <= tokens <= x[-1]:
            raise ProfileError("tokens", f"{tokens:g} lies outside the table, {x[0]:g} to {x[-1]:g}")
        for i in range(len(x) - 1):
            if tokens <= x[i + 1]:
                return y[i] + (y[i + 1] - y[i]) * (tokens - x[i]) / (x[i + 1] - x[i])
        return y[-1]


def egress_bps(row: KvRow, gpus: float, gpus_per_instance: float, tokens: float) -> float:
    """B ≈ (N / P) · Φ(L_avg) of a cluster."""
    return cluster_egress_bps(gpus, gpus_per_instance, row.at(tokens))


def table_of_profile(prefill: Curve, kv: Curve, tokens: Sequence[float]) -> list[float]:
    """Φ(l) of a profile, bits a second."""
    return [8 * kv(t) / prefill(t) for t in tokens]
