"""Shadow prices of prefill instances and links, in requests delayed a second of use.

At the optimum a request of uncached length l goes out exactly when

    T_local(l) · μ_local  >  T_prfaas(l) · μ_prfaas + S_kv(l) · μ_link

with one multiplier (Lagrange) a resource. A second of use of a resource delays everybody who comes before
its queue is next empty: that is its true price, in seconds of delay to others a second of use, and what
`Resource` estimates. With a queue of Q seconds, at load ρ and λ requests a second, the queue is empty after
Q / (1 − ρ), and so many are delayed:

    μ = λ · Q / (1 − ρ)

Under overload prices grow with the queues until the mix that fills every resource alike is found; the
threshold that a report would have to compute is where both sides are equal, and moves by itself with load
and bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

K_RATE_S = 20.0  # s, time constant of load and request rate
K_LOAD_LIMIT = 0.9  # ρ is taken as at most this: what is measured isn't known better


@dataclass(slots=True)
class Resource:
    """A site's prefill instances together, or a link. Work is in seconds of the whole resource."""

    price: float = 0.0
    """μ: last computed, for logs."""
    backlog_s: float = 0.0
    """Q: last seen, for logs."""
    _work_per_s: float = 0.0
    _requests_per_s: float = 0.0
    _as_of_s: float = field(default=-math.inf)

    def on_work(self, work_s: float, now: float) -> None:
        """A request that will use it for work_s was sent its way."""
        kept = self._kept(now)
        self._work_per_s = self._work_per_s * kept + work_s / K_RATE_S
        self._requests_per_s = self._requests_per_s * kept + 1 / K_RATE_S
        self._as_of_s = now

    def at(self, backlog_s: float, gain: float, now: float) -> float:
        """μ at a queue of backlog_s."""
        kept = self._kept(now)
        load = min(K_LOAD_LIMIT, self._work_per_s * kept)
        self.backlog_s = backlog_s
        self.price = gain * self._requests_per_s * kept * backlog_s / (1 - load)
        return self.price

    def _kept(self, now: float) -> float:
        return math.exp(-(now - self._as_of_s) / K_RATE_S) if now > self._as_of_s else 1.0
