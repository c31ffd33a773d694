"""What stands between a server and its pump, whichever pump that is: memory, leases, transfers, offers, and
the questions that wait for an answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from prfaas.model.decisions import Verdict
from prfaas.model.transfer import FailureReason, Outcome
from prfaas.pump_client import messages as m
from prfaas.pump_client.base import Arrival, Offer, Region, Transfer
from prfaas.pump_client.guard import GuardTable
from prfaas.pump_client.lease import LocalLease
from prfaas.transfer.segments import Ranges

log = logging.getLogger(__name__)

K_TOLD_AGAIN = (m.Register, m.Grant, m.Submit, m.Offer, m.Expose)
"""What every new pump is told anyway, of all that stands then: said twice, it would be refused."""


@dataclass(slots=True)
class _Sent:
    transfer: Transfer
    message: m.Submit
    deadline_s: float
    """On the monotonic clock; what the message says is the time that was left when it was sent."""


@dataclass(slots=True)
class _Asked:
    offer: Offer
    message: m.Offer
    at_s: float
    """When it was first asked: the message's times count from then."""
    acked_bytes: int = 0
    """Of its transfers that have ended."""

    @property
    def left_bytes(self) -> int:
        return max(0, self.message.size_bytes - self.acked_bytes)

    def again(self, now: float) -> m.Offer:
        """The same question, with the bytes and the time left."""
        since_s, first = now - self.at_s, self.message
        return msgspec.structs.replace(
            first,
            size_bytes=self.left_bytes,
            deadline_s=max(0.0, first.deadline_s - since_s),
            first_in_s=max(0.0, first.first_in_s - since_s),
            ready_in_s=max(0.0, first.ready_in_s - since_s),
        )


class Question:
    """Something that the pump is asked."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._reply: m.Reply | None = None

    def wait(self, timeout_s: float) -> m.Reply | None:
        """The answer; None without one in time, or when the pump went before it answered."""
        self._over.wait(timeout_s)
        return self._reply

    def end(self, reply: m.Reply | None) -> None:
        self._reply = reply
        self._over.set()


class Standing:
    """See the module. `lock` is the client's, so that what is kept and what is sent change together. Callers
    hold it, but not for `end`, `expire` and `hear`: these take it themselves, and call back without it.
    """

    def __init__(self, lock: threading.RLock, guards: GuardTable) -> None:
        self._lock, self._guards = lock, guards
        self.registered = Ranges()
        self._transfers: dict[int, _Sent] = {}
        self._leases: dict[int, LocalLease] = {}
        self._offers: dict[str, _Asked] = {}
        self._questions: dict[int, Question] = {}
        self.exposed: list[m.Expose] = []
        self._forwards: dict[tuple[str, str, int], tuple[m.Forward, str]] = {}

    def forwarded(self, peer: str, host: str, port: int) -> str | None:
        """Where an endpoint was forwarded to."""
        known = self._forwards.get((peer, host, port))
        return known[1] if known else None

    def add_forward(self, message: m.Forward, address: str) -> None:
        self._forwards[message.peer, message.host, message.port] = (message, address)

    def _drop_forward(self, serial: int) -> None:
        """The pump after the one that listened can't: another program may have the port."""
        with self._lock:
            for key, (message, _) in list(self._forwards.items()):
                if message.serial == serial:
                    del self._forwards[key]

    @property
    def leases(self) -> list[LocalLease]:
        return list(self._leases.values())

    @property
    def transfers(self) -> list[Transfer]:
        return [sent.transfer for sent in self._transfers.values()]

    def add_lease(self, lease: LocalLease) -> None:
        self._leases[lease.message.lease_id] = lease

    def drop_lease(self, lease: LocalLease) -> bool:
        """Whether it stood."""
        return self._leases.pop(lease.message.lease_id, None) is not None

    def add_transfer(self, transfer: Transfer, message: m.Submit) -> None:
        deadline_s = time.monotonic() + message.deadline_s
        self._transfers[transfer.transfer_id] = _Sent(transfer, message, deadline_s)

    def submitted(self, transfer: Transfer) -> m.Submit | None:
        """How it was submitted; None when it has ended."""
        sent = self._transfers.get(transfer.transfer_id)
        return sent.message if sent is not None else None

    def add_offer(self, offer: Offer, message: m.Offer) -> None:
        self._offers[offer.key] = _Asked(offer, message, time.monotonic())

    def drop_offer(self, offer: Offer) -> bool:
        """Whether it stood."""
        return self._offers.pop(offer.key, None) is not None

    def add_question(self, serial: int) -> Question:
        self._questions[serial] = question = Question()
        return question

    def drop_questions(self) -> None:
        """The pump has gone, and answers nothing that it was asked."""
        for question in self._questions.values():
            question.end(None)
        self._questions.clear()

    # Ends

    def end(self, transfer_id: int, outcome: Outcome) -> None:
        """A transfer is over. One that has ended already is ignored."""
        with self._lock:
            sent = self._transfers.pop(transfer_id, None)
            asked = self._offers.get(sent.message.offer) if sent is not None else None
            if sent is not None and asked is not None:
                asked.acked_bytes += outcome.payload_bytes
                if sent.message.count or not outcome.ok:
                    del self._offers[sent.message.offer]
        if sent is not None:
            self._guards.withdraw(sent.message.guard_slot, sent.message.guard_word)
            sent.transfer.end(outcome)

    def expire(self) -> None:
        """There is no pump: end the transfers whose time is up."""
        now = time.monotonic()
        with self._lock:
            late = [key for key, sent in self._transfers.items() if sent.deadline_s <= now]
        for key in late:
            self.end(key, Outcome(False, FailureReason.PUMP_LOST, "no pump until the deadline"))

    # Between the server and a pump

    def hear(self, message: m.ToServer) -> None:
        """What the pump says."""
        match message:
            case m.Ended():
                self.end(message.transfer_id, _outcome(message))
            case m.Arrived():
                with self._lock:
                    lease = self._leases.get(message.lease_id)
                if lease is not None:
                    lease.arrived(
                        Arrival(
                            message.transfer_id, message.kind, message.index, message.count, message.source,
                            message.payload_bytes, message.ok, message.reason, message.detail,
                        )
                    )  # fmt: skip
            case m.Reply():
                with self._lock:
                    question = self._questions.pop(message.serial, None)
                if question is not None:
                    question.end(message)
                elif message.error:
                    log.warning("the pump refused: %s", message.error)
                    self._drop_forward(message.serial)
            case m.OfferNews():
                self._hear_of_offer(message)
            case m.Refused():
                log.warning("the pump ends the connection: %s", message.error)

    def _hear_of_offer(self, news: m.OfferNews) -> None:
        with self._lock:
            asked = self._offers.get(news.key)
            if asked is not None and news.verdict == Verdict.REFUSED.value:
                del self._offers[news.key]
        if asked is not None:
            asked.offer.alone = news.alone
            asked.offer.hear(news.verdict, news.reason, news.retry_after_s, news.finish_in_s)

    def told_again(self, serial: int) -> bytearray:
        """All that a new pump must hear first, as it goes over the socket. `serial`: of the registration."""
        now = time.monotonic()
        out = bytearray()
        regions = self.registered.regions
        if regions:
            out += m.encode(register_message(serial, regions))
        for endpoint in self.exposed:
            out += m.encode(endpoint)
        for forward, address in self._forwards.values():
            # At the port that programs know already; where it is taken by now, who asks next gets another.
            out += m.encode(msgspec.structs.replace(forward, listen=address))
        for lease in self._leases.values():
            lease.message.deadline_s = max(0.0, lease.expires_s - now)
            out += m.encode(lease.message)
        # A transfer's offer goes before it, so that the ledger which takes the one shrinks with the other.
        # What was admitted has its place in the ledger of the pump that admitted it, maybe not in the next
        # one's: it is asked for again, before what only waited.
        asked_again = sorted(self._offers.values(), key=lambda x: x.offer.verdict is not Verdict.ADMITTED)
        for asked in asked_again:
            if asked.left_bytes:
                out += m.encode(asked.again(now))
        for sent in self._transfers.values():
            sent.message.deadline_s = max(0.0, sent.deadline_s - now)
            out += m.encode(sent.message)
        return out


def calling_back(call: Callable[..., None], *arguments: object) -> None:
    """For what runs users' callbacks on the client's thread: none that fails may end it, since all others
    depend on it.
    """
    try:
        call(*arguments)
    except Exception:
        log.exception("a callback failed")


def _outcome(message: m.Ended) -> Outcome:
    """A pump of a later version may know more reasons: a transfer that has ended for one still ends here."""
    reason, detail = None, message.detail
    if message.reason:
        try:
            reason = FailureReason(message.reason)
        except ValueError:
            reason, detail = FailureReason.BAD_REQUEST, f"{message.reason}: {message.detail}"
    return Outcome(
        message.ok, reason, detail, message.payload_bytes, message.resent_blocks, message.elapsed_s
    )


def register_message(serial: int, regions: Sequence[Region]) -> m.Register:
    rows = np.array(regions, dtype=np.uint64).reshape(-1, 2)
    return m.Register(serial, rows[:, 0].tobytes(), rows[:, 1].tobytes())
