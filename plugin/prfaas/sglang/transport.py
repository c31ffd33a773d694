"""What the backend asks of whatever moves its bytes: leases on the decode side, transfers on the prefill
side.

The backend speaks to this; `connect()` gives the node's pump behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prfaas.config.backend import BackendConfig
from prfaas.model.transfer import LeaseGrant, Outcome, TransferKind

U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Segments:
    """Scattered bytes: where they are, where they go, how long each piece is. Arrays of one length,
    uint64.
    """

    source: U64
    destination: U64
    length: U64

    @property
    def total_bytes(self) -> int:
        return int(self.length.sum())

    def __len__(self) -> int:
        return int(self.length.size)


@dataclass(frozen=True)
class Order:
    """One transfer as the prefill side asks for it."""

    grant: LeaseGrant
    kind: TransferKind
    segments: Segments
    deadline_s: float
    """Seconds it may take from now."""
    source: str
    """This sender among those that fill the lease: its rank."""
    index: int
    """Its place among this source's transfers to the lease."""
    count: int
    """How many those are; 0 while it isn't known."""


class Lease(ABC):
    """The decode side's end of a lease."""

    grant: LeaseGrant

    @abstractmethod
    def revoke(self) -> None:
        """End it now: after this returns not one byte is written to its pages. Waits only for a copy that
        runs; needs no word from the sender. Idempotent."""


class Sending(ABC):
    """The prefill side's end of a transfer."""

    @abstractmethod
    def cancel(self) -> None:
        """Stop sending; its outcome still comes, once. Idempotent."""


class Transport(ABC):
    """Calls don't block on the network; callbacks come from a thread of the transport's and must not
    block.
    """

    address: str
    """host:port of this node's pump as peers dial it."""

    @abstractmethod
    def register(self, regions: Sequence[tuple[int, int]]) -> None:
        """Let (address, length) memory of this process be read from and, under leases, written to."""

    @abstractmethod
    def deregister(self, addresses: Sequence[int]) -> None: ...

    @abstractmethod
    def lease(
        self,
        room: int,
        generation: int,
        pieces: U64,
        deadline_s: float,
        sources: int,
        on_end: Callable[[Outcome], None],
    ) -> Lease:
        """A lease on `pieces`, rows (address, length). `on_end` comes once: ok when all that `sources`
        senders said they would send has landed; not ok when it can't any more."""

    @abstractmethod
    def send(self, order: Order, on_done: Callable[[Outcome], None]) -> Sending:
        """Start a transfer. `on_done` comes once; ok is the receiver's word."""

    @abstractmethod
    def close(self) -> None: ...


def connect(config: BackendConfig) -> Transport:
    """The node's pump, found or started. Raises PrfaasError."""
    from prfaas.sglang.pump_transport import PumpTransport

    return PumpTransport(config)
