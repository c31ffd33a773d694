"""Fairness between tenants: who took more than its share of late waits behind, and is refused sooner.

A tenant's share is its weight over the weights of the tenants seen of late; what it took is its prefill
seconds, forgotten with time constant K_FORGET_S. Being above the share moves a request back by at most
K_LAG_S, so that nobody starves: a request that waits long enough comes before everything newer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prfaas.model.ids import TenantId

K_FORGET_S = 60.0  # s
K_LAG_S = 10.0  # s, most that a tenant's requests are moved back
K_EVEN = 1.25  # times its share that a tenant may take before it counts as above
K_LENIENCY = (0.5, 1.5)  # factors on the slack before shedding: far above the share, far below it
K_GONE = 1e-3  # prefill seconds below which a tenant isn't there any more


@dataclass(slots=True)
class _Taken:
    """Seconds that fade."""

    seconds: float
    as_of_s: float

    def at(self, now: float) -> float:
        return (
            self.seconds * math.exp((self.as_of_s - now) / K_FORGET_S) if now > self.as_of_s else self.seconds
        )

    def add(self, more_s: float, now: float) -> None:
        self.seconds = self.at(now) + more_s
        self.as_of_s = max(now, self.as_of_s)


class TenantShares:
    """Prefill seconds by tenant, of late."""

    def __init__(self, weights: Mapping[TenantId, float]) -> None:
        self._weights = dict(weights)
        self._taken: dict[TenantId, _Taken] = {}
        self._all = _Taken(0.0, 0.0)
        self._all_weights = 0.0
        self._sweep_at = 64

    def on_work(self, tenant: TenantId, prefill_s: float, now: float) -> None:
        """A request of `tenant` was sent that takes so many prefill seconds."""
        taken = self._taken.get(tenant)
        if taken is None:
            taken = self._taken[tenant] = _Taken(0.0, now)
            self._all_weights += self._weight(tenant)
        taken.add(prefill_s, now)
        self._all.add(prefill_s, now)
        if len(self._taken) >= self._sweep_at:
            self._forget(now)

    def excess(self, tenant: TenantId, now: float) -> float:
        """What it took over what it may: 1 is exactly its share, 0 nothing; 1 while no other is there."""
        mine = self._taken.get(tenant)
        if mine is not None and len(self._taken) == 1:
            return 1.0
        total_s = self._all.at(now)
        if total_s <= 0:
            return 1.0
        if mine is None:
            return 0.0
        return (mine.at(now) / total_s) / (self._weight(tenant) / self._all_weights)

    def lag_s(self, tenant: TenantId, now: float) -> float:
        """How far its requests are moved back in the order of service."""
        if len(self._taken) < 2 and tenant in self._taken:
            return 0.0  # no other is there
        over = self.excess(tenant, now) - K_EVEN
        return 0.0 if over <= 0 else K_LAG_S * min(1.0, over)

    def leniency(self, tenant: TenantId, now: float) -> float:
        """Factor on the slack before its requests are shed; 1 for a tenant that is alone or even."""
        least, most = K_LENIENCY
        return min(most, max(least, 2.0 - self.excess(tenant, now)))

    def _weight(self, tenant: TenantId) -> float:
        return self._weights.get(tenant, 1.0)

    def _forget(self, now: float) -> None:
        for name in [name for name, taken in self._taken.items() if taken.at(now) < K_GONE]:
            del self._taken[name]
        self._all_weights = sum(self._weight(name) for name in self._taken)
        self._sweep_at = max(64, 2 * len(self._taken))
