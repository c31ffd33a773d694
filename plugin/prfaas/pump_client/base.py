"""What SGLang's process, or a profiled instance, asks of a pump. Sizes in bytes, times in seconds, addresses
as integers.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

from numpy.typing import ArrayLike

from prfaas.model.decisions import RefusalReason, Verdict
from prfaas.model.transfer import LeaseGrant, Outcome, TransferKind

Region = tuple[int, int]
"""(address, length) in this process."""


class Transfer:
    """A transfer under way. Ends once, with an Outcome; callbacks run on the client's own thread and must be
    short.
    """

    def __init__(self, transfer_id: int) -> None:
        self.transfer_id = transfer_id
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._outcome: Outcome | None = None
        self._callbacks: list[Callable[[Transfer], None]] = []

    @property
    def outcome(self) -> Outcome | None:
        """None while it is under way."""
        return self._outcome

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """The outcome, or None if it hasn't ended in time."""
        self._done.wait(timeout_s)
        return self._outcome

    def add_done_callback(self, callback: Callable[[Transfer], None]) -> None:
        """Call it when the transfer ends; at once if it has ended."""
        with self._lock:
            if self._outcome is None:
                self._callbacks.append(callback)
                return
        callback(self)

    def end(self, outcome: Outcome) -> bool:
        """For the client: say how it ended. The first word counts; whether this was it."""
        with self._lock:
            if self._outcome is not None:
                return False
            self._outcome = outcome
            callbacks, self._callbacks = self._callbacks, []
        self._done.set()
        for callback in callbacks:
            callback(self)
        return True


class Offer:
    """A transfer's place on a link, asked for before there are bytes: admitted, queued, or refused with a
    reason.

    A queued one is admitted later by itself, or refused; an admitted one may be told that it will be late
    (`late`). Admitted is for good: when the pump that keeps the promise is lost, and the next one has no
    room for it, that makes it late as well.
    """

    def __init__(self, key: str, site: str) -> None:
        self.key, self.site = key, site
        self.verdict: Verdict | None = None
        self.reason: RefusalReason | None = None
        self.retry_after_s: float | None = None
        self.finish_in_s: float | None = None
        """When the transfer is predicted to be through, counted from when that was said."""
        self.late = self.alone = False
        self._changed = threading.Condition()
        self._callbacks: list[Callable[[Offer], None]] = []

    def wait(self, timeout_s: float | None = None) -> Verdict | None:
        """The first decision (admitted, queued or refused); None when there is none in time."""
        with self._changed:
            self._changed.wait_for(lambda: self.verdict is not None, timeout_s)
        return self.verdict

    def add_callback(self, callback: Callable[[Offer], None]) -> None:
        """Call it at every change, on the client's own thread; at once if there was one."""
        with self._changed:
            self._callbacks.append(callback)
            known = self.verdict is not None
        if known:
            callback(self)

    def hear(self, verdict: str, reason: str, retry_after_s: float | None, finish_in_s: float | None) -> None:
        """For the client: the ledger's word."""
        with self._changed:
            admitted = self.verdict is Verdict.ADMITTED
            self.late = verdict == "late" or (admitted and verdict != Verdict.ADMITTED.value)
            if not self.late:
                self.verdict = Verdict(verdict)
                self.reason = _refusal(reason)
                self.retry_after_s = retry_after_s
            self.finish_in_s = finish_in_s
            callbacks = list(self._callbacks)
            self._changed.notify_all()
        for callback in callbacks:
            callback(self)


def _refusal(reason: str) -> RefusalReason | None:
    """A ledger of a later version may know more reasons: its word still ends the wait."""
    try:
        return RefusalReason(reason) if reason else None
    except ValueError:
        return RefusalReason.BAD_REQUEST


class Arrival:
    """A peer's transfer to a lease of ours: whole (`ok`), or broken with a reason."""

    __slots__ = ("count", "detail", "index", "kind", "ok", "payload_bytes", "reason", "source", "transfer_id")

    def __init__(
        self, transfer_id: int, kind: str, index: int, count: int, source: str, payload_bytes: int, ok: bool,
        reason: str, detail: str,
    ) -> None:  # fmt: skip
        self.transfer_id, self.kind, self.index, self.count = transfer_id, kind, index, count
        self.source, self.payload_bytes, self.ok = source, payload_bytes, ok
        self.reason, self.detail = reason, detail


class Lease(ABC):
    """The right, given to peers, to write to some of our pages for one room and generation."""

    grant: LeaseGrant
    """What to send to the peers."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether every expected source has sent all it said it would, and all of it is applied."""

    @property
    @abstractmethod
    def failure(self) -> Arrival | None:
        """The first transfer that broke; None so far."""

    @property
    @abstractmethod
    def arrivals(self) -> list[Arrival]: ...

    @abstractmethod
    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it is complete, has failed or is revoked; whether it is complete."""

    @abstractmethod
    def add_callback(self, callback: Callable[[Lease], None]) -> None:
        """Call it (on the client's own thread) at every arrival, and at once if there were any."""

    @abstractmethod
    def revoke(self) -> None:
        """End the lease. Local: waits only for the copy that is running now, never for a peer or the pump's
        word.

        After it returns not one byte is written to the pages. A second call does nothing.
        """


class PumpClient(ABC):
    """One server's connection to its node's pump. All methods may be called from any thread, and don't block
    but where they say so. If the pump dies another is started, and what was under way goes on.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """host:port that peers dial: the pump's. Leases carry it."""

    @property
    @abstractmethod
    def session_id(self) -> str:
        """Names this client's registered memory to `submit_raw` elsewhere: "host:port#token"."""

    @abstractmethod
    def register(self, regions: Sequence[Region]) -> None:
        """Let transfers read and leases name this memory. Raises LocalProtocolError: impossible region."""

    @abstractmethod
    def deregister(self, addresses: Sequence[int]) -> None:
        """Forget regions. Blocks until the pump has: after it returns no raw transfer writes there. Revoke
        leases first.
        """

    @abstractmethod
    def grant_lease(
        self, room: int, generation: int, regions: Sequence[Region], deadline_s: float, *,
        expected_sources: int = 1, site: str = "",
    ) -> Lease:  # fmt: skip
        """Let peers write to `regions`, which are registered, for `deadline_s` at most. `site`: only that one
        may.

        `expected_sources`: how many senders, each with its own `source`, must be done for the lease to be
        complete.
        """

    @abstractmethod
    def submit(
        self, grant: LeaseGrant, sources: ArrayLike, destinations: ArrayLike, lengths: ArrayLike, *,
        kind: TransferKind, deadline_s: float, last: bool = False, source: str = "",
        offer: Offer | None = None,
    ) -> Transfer:  # fmt: skip
        """Send segments, sources[i] (ours) to destinations[i] (the lease's), asynchronously.

        `last`: this source sends nothing more to the lease; only then can the lease be complete. The source
        memory must stay as it is until the transfer ends. A refusal is an outcome, not an exception.
        """

    @abstractmethod
    def submit_raw(
        self,
        session_id: str,
        sources: ArrayLike,
        destinations: ArrayLike,
        lengths: ArrayLike,
        *,
        deadline_s: float,
    ) -> Transfer:
        """As `submit`, to memory that the peer has registered, without a lease (Mooncake's contract)."""

    @abstractmethod
    def offer(
        self, site: str, size_bytes: int, deadline_s: float, *,
        first_in_s: float = 0.0, ready_in_s: float = 0.0,
        may_queue: bool = True,
    ) -> Offer:  # fmt: skip
        """Ask the ledger of the link to `site` whether `size_bytes` may be through within `deadline_s`.

        The bytes come into being from first_in_s to ready_in_s. Where no ledger is configured it is admitted.
        Give it to `submit`, which ends its promise with the transfer, or to `release`.
        """

    @abstractmethod
    def release(self, offer: Offer) -> None:
        """Its bytes won't come. A second call does nothing."""

    @abstractmethod
    def cancel(self, transfer: Transfer) -> None:
        """End a transfer. After it returns its source memory isn't read any more; its outcome is `cancelled`,
        unless it ended before.
        """

    @abstractmethod
    def prepare(self, address: str) -> None:
        """Have the streams to a peer open before the first transfer needs them."""

    @abstractmethod
    def expose(self, host: str, port: int) -> None:
        """Let programs of other sites reach this endpoint of the node, by their pump and this one, while this
        client is attached.
        """

    @abstractmethod
    def forward(self, peer: str, host: str, port: int, *, site: str = "", timeout_s: float = 10.0) -> str:
        """host:port on loopback that leads to an endpoint which the node of the pump at `peer` exposes; the
        same at every call. `site`: the one that the peer must prove to be of. Blocks for the pump's answer,
        the first time. Raises PrfaasError, for a first time in a callback too.
        """

    @abstractmethod
    def stats(self, timeout_s: float = 5.0) -> dict[str, object]:
        """The pump's counters (see pump.server.Pump.stats). Blocks for the answer. Raises PrfaasError without
        one, and in a callback.
        """

    @property
    @abstractmethod
    def in_callback(self) -> bool:
        """Whether the caller is on the thread that runs callbacks of transfers, leases and offers: it is the
        one that hears the pump, so that nothing that the pump has to answer can be asked there.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the pump: leases end, transfers are cancelled. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
