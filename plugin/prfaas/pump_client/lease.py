"""A lease as its owner's process holds it: what has arrived, and the way to end it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prfaas.model.transfer import LeaseGrant
from prfaas.pump_client import messages as m
from prfaas.pump_client.base import Arrival, Lease


class LocalLease(Lease):
    """See Lease. Completion is counted here, so that it outlives a pump."""

    def __init__(
        self,
        revoke: Callable[[LocalLease], None],
        grant: LeaseGrant,
        message: m.Grant,
        expected: int,
        expires_s: float,
    ) -> None:
        self.grant = grant
        self.message, self.expires_s = message, expires_s
        self._revoke, self._expected = revoke, expected
        self._arrivals: dict[int, Arrival] = {}
        self._failure: Arrival | None = None
        self._changed = threading.Condition()
        self._callbacks: list[Callable[[Lease], None]] = []
        self.revoked = False

    @property
    def complete(self) -> bool:
        done: dict[str, int] = {}
        count: dict[str, int] = {}
        for arrival in list(self._arrivals.values()):
            done[arrival.source] = done.get(arrival.source, 0) + 1
            count[arrival.source] = max(count.get(arrival.source, 0), arrival.count)
        return sum(0 < count[s] <= n for s, n in done.items()) >= self._expected

    @property
    def failure(self) -> Arrival | None:
        return self._failure

    @property
    def arrivals(self) -> list[Arrival]:
        return list(self._arrivals.values())

    def wait(self, timeout_s: float | None = None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.complete or self._failure or self.revoked, timeout_s)
        return self.complete

    def add_callback(self, callback: Callable[[Lease], None]) -> None:
        with self._changed:
            self._callbacks.append(callback)
            ready = bool(self._arrivals) or self._failure is not None
        if ready:
            callback(self)

    def revoke(self) -> None:
        self._revoke(self)

    def arrived(self, arrival: Arrival) -> None:
        """For the client: the pump's word on one transfer."""
        with self._changed:
            if arrival.ok:
                self._arrivals.setdefault(arrival.transfer_id, arrival)
            elif self._failure is None and not self.revoked:
                self._failure = arrival
            self._changed.notify_all()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback(self)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
