"""What is under way from one site to another: transfers, the pipe that carries them, the links under it.

A pipe moves nothing by itself: network.py says what rate each of its transfers has, and until when.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from prfaas.config.topology import Impairments
from prfaas.transfer.order import SendOrder


class Transfer:
    """Bytes on their way. `on_landed(now)` is called when the last one is at the other end."""

    __slots__ = ("available", "deadline_s", "on_landed", "sent", "serial", "started_s", "total_bytes")

    def __init__(self, total_bytes: int, deadline_s: float, on_landed: Callable[[float], None]) -> None:
        self.total_bytes, self.deadline_s, self.on_landed = total_bytes, deadline_s, on_landed
        self.available = 0.0
        self.sent = 0.0
        self.started_s: float | None = None
        self.serial = 0
        """Order of announcement on its pipe."""


@dataclass(slots=True, eq=False)
class Link:
    """One directed link as it is now."""

    id: str
    state: Impairments
    cross_bps: float = 0.0
    """Taken by traffic that has a rate of its own (UDP)."""
    cross_streams: int = 0
    """Greedy streams of others, which take their share each."""
    users: dict[Pipe, None] = field(default_factory=dict)
    """Active pipes over it."""

    @property
    def rate_bps(self) -> float:
        if self.state.down:
            return 0.0
        rate = math.inf if self.state.rate_mbps is None else self.state.rate_mbps * 1e6
        return max(0.0, rate - self.cross_bps)


class Pipe:
    """All transfers from one site to another."""

    def __init__(self, source: str, target: str, links: list[Link], streams: int) -> None:
        self.source, self.target, self.links, self.streams = source, target, links, streams
        self.cold_streams = streams
        """Of those that gather speed."""
        self.order: SendOrder[Transfer] = SendOrder()
        self.transfers: dict[Transfer, None] = {}
        self.begun: list[Transfer] = []
        """Those of which bytes have become available, as they were announced."""
        self.announced = 0
        self.rates: dict[Transfer, float] = {}
        """Bytes a second of each transfer that can send since `updated_s`, as they were announced."""
        self.updated_s = 0.0
        self.capacity = 0.0
        """Bytes a second of payload that all its transfers get together."""
        self.plan = 0
        self.busy_since_s: float | None = None
        self.active_since_s = 0.0
        """Since when it has had something to send without a break, and the speed for it."""
        self.idle_since_s = -math.inf
        self.silent_since_s: float | None = None
        """Since when its streams have been sending into a dead link, or have yet to find that it is back."""
        self.resumes_s = -math.inf
        """When they do."""
        self.ever_busy = False
        self.sent_bytes = 0.0
        self.forget()

    def forget(self) -> None:
        """The links may have changed: what is worked out of them is no longer known."""
        self._delay_s: float | None = None
        self._loss: float | None = None
        self.rtt_s: float | None = None
        self.full_bps: float | None = None
        """Bits a second of payload once its streams have gathered speed, with its links to itself."""

    @property
    def up(self) -> bool:
        return all(link.rate_bps > 0 for link in self.links)

    @property
    def carries(self) -> bool:
        """Whether what is sent arrives: its links are up, and its streams have found that out."""
        return self.silent_since_s is None and self.up

    @property
    def delay_s(self) -> float:
        """One way."""
        if self._delay_s is None:
            self._delay_s = sum(link.state.delay_ms for link in self.links) / 1e3
        return self._delay_s

    @property
    def loss(self) -> float:
        """Share of packets lost on the way."""
        if self._loss is None:
            self._loss = 1 - math.prod(1 - link.state.mean_loss for link in self.links)
        return self._loss

    @property
    def backlog_bytes(self) -> float:
        return sum([one.available - one.sent for one in self.begun])

    def as_of(self, now: float) -> tuple[float, float]:
        """Bytes sent so far, and those that wait, at `now`: looking changes nothing."""
        passed_s = now - self.updated_s
        moved = sum(
            [min(rate * passed_s, one.available - one.sent) for one, rate in self.rates.items()], start=0.0
        )
        return self.sent_bytes + moved, self.backlog_bytes - moved

    def announce(self, transfer: Transfer) -> None:
        self.announced += 1
        transfer.serial = self.announced
        self.transfers[transfer] = None

    def join(self, transfer: Transfer) -> None:
        """It has something to send; how fast is said later."""
        rates = self.rates
        if transfer not in rates:
            rates[transfer] = 0.0
            if len(rates) > 1:
                self.rates = dict(sorted(rates.items(), key=_serial_of))

    def leave(self, transfer: Transfer) -> None:
        """It has landed, or was dropped."""
        del self.transfers[transfer]
        self.rates.pop(transfer, None)
        if transfer.started_s is not None:
            self.begun.remove(transfer)
        self.order.remove(transfer)


def _serial_of(entry: tuple[Transfer, float]) -> int:
    return entry[0].serial
