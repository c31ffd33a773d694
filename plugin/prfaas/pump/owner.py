"""One server attached to this pump by the control socket: its memory, its leases, its transfers."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from prfaas.model.decisions import Verdict
from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import FailureReason
from prfaas.pump.memory import Gone, OwnerMemory
from prfaas.pump.submitted import NotRegistered, planned, u64
from prfaas.pump_client import messages as m
from prfaas.transfer.frames import Forward, Open
from prfaas.transfer.receiving import Lease
from prfaas.transfer.segments import U64, Ranges, iov
from prfaas.transfer.sending import Completed, SendEvent

if TYPE_CHECKING:
    from prfaas.pump.desk import LinkDesk
    from prfaas.pump.server import Pump

log = logging.getLogger(__name__)

K_READ_BYTES = 1 << 20
K_UNUSED_S = 30.0
"""So long after its deadline an offer whose bytes don't come is given up: a server that forgot to release it
would take its place from others for as long as it lives.
"""
K_BACKLOG_MAX_BYTES = 64 << 20
"""A server that doesn't read what happened to its transfers is cut off at so much."""
R, W = selectors.EVENT_READ, selectors.EVENT_WRITE


@dataclass(slots=True)
class Promised:
    """An offer of this server, and its bytes not yet acknowledged in whole transfers."""

    desk: LinkDesk
    left_bytes: int
    until_s: float
    """After this it is given up, unless a transfer of it is under way."""


class Owner:
    """See the module. Its key in the core is its owner token."""

    def __init__(self, pump: Pump, sock: socket.socket) -> None:
        self.pump = pump
        self.name = ""
        self.token = b""
        self.registered = Ranges()
        self.transfers: dict[int, str] = {}
        self.leases: set[int] = set()
        self.offers: dict[str, Promised] = {}
        self.promised: dict[int, str] = {}
        """Transfer to the offer it was admitted by."""
        self.closing: set[int] = set()
        """Transfers that end their offer's promise: the last ones of their rooms."""
        self._sock = sock
        self._inbox = m.Inbox()
        self._out = bytearray()
        self._mask = R
        self._memory: OwnerMemory | None = None
        self._fds: list[int] = []
        self.closed = False
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid, self.uid, _ = struct.unpack("3i", credentials)
        sock.setblocking(False)
        pump.loop.add(sock.fileno(), R, self, first=True)

    @property
    def memory(self) -> OwnerMemory:
        if self._memory is None:
            raise Gone("the server has not attached its memory")
        return self._memory

    def on_ready(self, mask: int, now: float) -> None:
        if self.closed:
            return
        try:
            if mask & W:
                self._flush()
            if mask & R:
                self.read(now)
        except OSError as error:
            self.close(str(error), now)

    def read(self, now: float) -> None:
        """Handle what the server has sent, until its socket is empty."""
        while not self.closed:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, K_READ_BYTES, 4)
            except BlockingIOError:
                return
            except ConnectionError:
                data, fds = b"", []
            self._fds += fds
            if not data:
                self.close("", now)
                return
            try:
                for body in self._inbox.feed(data):
                    self._handle(m.decode_to_pump(body), now)
            except (msgspec.MsgspecError, ValueError) as error:
                self.close(f"not a message: {error}", now)
            except (PrfaasError, Gone) as error:
                self.close(str(error), now)

    def send(self, message: m.Message) -> None:
        """Queue a message; a server that doesn't read is cut off before its queue grows without bound."""
        if self.closed:
            return
        self._out += m.encode(message)
        if len(self._out) > K_BACKLOG_MAX_BYTES:
            self.pump.loop.call_at(0, lambda now: self.close("it doesn't read its messages", now))
            return
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                n = self._sock.send(self._out)
                del self._out[:n]
        except BlockingIOError:
            pass
        except ConnectionError:
            self._out.clear()
        mask = R | W if self._out else R
        if mask != self._mask and not self.closed:
            self._mask = mask
            self.pump.loop.modify(self._sock.fileno(), mask, self)

    def _handle(self, message: m.ToPump, now: float) -> None:
        if isinstance(message, m.Attach):
            self._attach(message)
            return
        if self._memory is None:
            raise PrfaasError("the first message must be attach")
        match message:
            case m.Register():
                self._answer(message.serial, lambda: self.registered.add(_rows(message)))
            case m.Deregister():
                self._answer(message.serial, lambda: self.registered.remove(u64(message.addresses).tolist()))
            case m.Grant():
                self._grant(message, now)
            case m.Revoke():
                self.leases.discard(message.lease_id)
                self.pump.end_lease(message.lease_id, now)
            case m.Submit():
                self._submit(message, now)
            case m.Cancel():
                address = self.transfers.get(message.transfer_id)
                if address is not None:
                    self.pump.peer(address, now).cancel(
                        message.transfer_id, FailureReason.CANCELLED, "by the sender", now
                    )
            case m.Offer():
                self._offer(message, now)
            case m.Release():
                self._release(message.key, now)
            case m.Prepare():
                self._prepare(message.address, now)
            case m.Expose():
                self.pump.exposed.expose(message.host, message.port, self)
            case m.Forward():
                self._forward(message)
            case m.AskStats():
                self.send(m.Reply(message.serial, "", self.pump.stats(now)))

    def _answer(self, serial: int, call: Callable[[], None]) -> None:
        try:
            call()
        except PrfaasError as error:
            self.send(m.Reply(serial, str(error)))
        else:
            self.send(m.Reply(serial))

    def _forward(self, message: m.Forward) -> None:
        target = Forward(message.host, message.port)
        try:
            address = self.pump.forwards.open(message.peer, message.site, target, message.listen, self)
        except (PrfaasError, ValueError) as error:
            self.send(m.Reply(message.serial, str(error)))
        else:
            self.send(m.Reply(message.serial, body={"address": address}))

    def _attach(self, message: m.Attach) -> None:
        if self._memory is not None or not self._fds:
            raise PrfaasError("attach comes once, with the guard table")
        if message.version != m.K_CONTROL_VERSION:
            self.send(m.Refused(f"control version {message.version}, here {m.K_CONTROL_VERSION}"))
            raise PrfaasError("another control version")
        if self.uid not in (os.getuid(), 0):
            raise PrfaasError(f"user {self.uid} may not use this pump")
        if len(message.owner_token) < 16 or self.pump.owner(message.owner_token) is not None:
            raise PrfaasError("the owner's token is weak or taken")
        fd, self._fds = self._fds[0], self._fds[1:]
        faults = self.pump.config.faults
        memory = OwnerMemory(self.pid, fd, faults.pause_copy_s if faults else 0.0)
        problem = memory.probe(message.probe_address, message.probe)
        if problem is not None:
            memory.close()
            self.send(m.Refused(f"the pump can't read its server's memory ({problem}); see prfaas doctor"))
            raise PrfaasError(problem)
        self._memory, self.name, self.token = memory, message.name, message.owner_token
        self.pump.attach(self)
        self.send(
            m.Attached(
                m.K_CONTROL_VERSION,
                self.pump.address,
                self.pump.config.site,
                os.getpid(),
                self.pump.boot,
                self.pump.config.block_bytes,
                self.pump.config.window_bytes,
            )
        )

    def _grant(self, message: m.Grant, now: float) -> None:
        lease = Lease(
            message.lease_id, message.token, message.room, message.generation, Ranges(_rows(message)),
            now + message.deadline_s, self.token, message.site, (message.guard_slot, message.guard_word),
        )  # fmt: skip
        try:
            self.pump.receiving.grant(lease, self.registered)
            self.leases.add(lease.lease_id)
        except PrfaasError as error:
            log.warning("%s: lease %d refused: %s", self.name, message.lease_id, error)
            reason = FailureReason.BAD_REQUEST.value
            self.send(m.Arrived(message.lease_id, 0, "", 0, 0, "", 0, False, reason, str(error)))

    def _submit(self, message: m.Submit, now: float) -> None:
        opening = Open(
            message.room, message.generation, message.lease_id, message.token, message.kind, 0, 0,
            message.deadline_s, message.index, message.count, message.source,
        )  # fmt: skip
        reason = FailureReason.BAD_REQUEST
        try:
            plan_of = planned(message, self.registered)
            self.transfers[message.transfer_id] = message.address
            if message.offer:
                self.promised[message.transfer_id] = message.offer
                if message.count:
                    self.closing.add(message.transfer_id)
            self.pump.peer(message.address, now).submit(
                message.site,
                message.transfer_id, opening, plan_of,
                message.window_bytes, now + message.deadline_s, self.memory,
                (message.guard_slot, message.guard_word), self._ended, now,
            )  # fmt: skip
        except (PrfaasError, ValueError) as error:
            if isinstance(error, NotRegistered):
                reason = FailureReason.SOURCE_REFUSED
            self.transfers.pop(message.transfer_id, None)
            self.closing.discard(message.transfer_id)
            self._release(self.promised.pop(message.transfer_id, ""), now)
            self.send(m.Ended(message.transfer_id, False, reason.value, str(error), 0, 0, 0.0))

    def _prepare(self, address: str, now: float) -> None:
        """The address came from another site: what is none costs its own transfers, and nobody else's."""
        try:
            self.pump.peer(address, now).prepare(now)
        except ValueError as error:
            log.warning("%s: no peer to be ready for: %s", self.name, error)

    def _offer(self, message: m.Offer, now: float) -> None:
        desk = self.pump.desks.get(message.site)
        if desk is None:
            # Nobody keeps promises on that link: what comes may go.
            self.pump.tell_unkept(message.site)
            self.send(m.OfferNews(message.key, "admitted", finish_in_s=None))
            return
        key = self._ledger_key(message.key)
        until_s = now + message.deadline_s + K_UNUSED_S
        self.offers[message.key] = Promised(desk, message.size_bytes, until_s)
        body = {
            "size_bytes": message.size_bytes,
            "deadline_s": message.deadline_s,
            "first_in_s": message.first_in_s,
            "ready_in_s": message.ready_in_s,
            "may_queue": message.may_queue,
        }  # fmt: skip
        desk.offer(key, body, lambda _, what: self._offer_news(message.key, what), now)

    def _offer_news(self, key: str, what: dict[str, Any]) -> None:
        """How an offer stands now. Nobody asks about a refused one again."""
        self.send(m.OfferNews(key, **what))
        if what["verdict"] == Verdict.REFUSED.value:
            self._release(key, self.pump.loop.now())

    def _ledger_key(self, key: str) -> str:
        """What the ledger knows an offer by. Its host may still hold what a pump before this one asked for
        the same server: that must not make this pump's question a duplicate (see LedgerHost.offer).
        """
        return f"{self.pump.boot.hex()[:8]}/{self.token.hex()}/{key}"

    def _release(self, key: str, now: float) -> None:
        offer = self.offers.pop(key, None)
        if offer is not None:
            offer.desk.release(self._ledger_key(key), now)

    def tell_progress(self, now: float) -> None:
        """Let the ledger know what is still to come of the transfers it has promised."""
        acked: dict[str, int] = {}
        for transfer_id, key in self.promised.items():
            address = self.transfers.get(transfer_id)
            if address is not None:
                sending = self.pump.peer(address, now).sending
                acked[key] = acked.get(key, 0) + sending.acknowledged_bytes(transfer_id)
        for key, acked_bytes in acked.items():
            offer = self.offers.get(key)
            if offer is not None:
                left = max(0, offer.left_bytes - acked_bytes)
                offer.desk.progress(self._ledger_key(key), left, now)
        for key in [key for key, x in self.offers.items() if key not in acked and now > x.until_s]:
            log.warning("%s: offer %s is given up: nothing is under way for it", self.name, key)
            self._release(key, now)

    def _ended(self, event: SendEvent) -> None:
        self.transfers.pop(event.transfer_id, None)
        key = self.promised.pop(event.transfer_id, "")
        if key in self.offers:
            offer, now = self.offers[key], self.pump.loop.now()
            offer.left_bytes = max(0, offer.left_bytes - event.payload_bytes)
            if event.transfer_id in self.closing or not isinstance(event, Completed):
                self._release(key, now)
            else:
                offer.desk.progress(self._ledger_key(key), offer.left_bytes, now)
        self.closing.discard(event.transfer_id)
        ok = isinstance(event, Completed)
        reason, detail = ("", "") if isinstance(event, Completed) else (event.reason.value, event.detail)
        self.pump.count_ended(event)
        self.send(
            m.Ended(
                event.transfer_id,
                ok,
                reason,
                detail,
                event.payload_bytes,
                event.resent_blocks,
                self.pump.loop.now() - event.started_s,
            )
        )

    def close(self, why: str, now: float) -> None:
        if self.closed:
            return
        self.closed = True
        if why:
            log.warning("server %s (pid %d) is cut off: %s", self.name or "?", self.pid, why)
        self.pump.loop.remove(self._sock.fileno())
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        for transfer_id, address in list(self.transfers.items()):
            self.pump.peer(address, now).cancel(
                transfer_id, FailureReason.OWNER_GONE, "the sender has gone", now
            )
        for key in list(self.offers):
            self._release(key, now)
        self.pump.detach(self, now)
        if self._memory is not None:
            self._memory.close()


def _rows(message: m.Register | m.Grant) -> U64:
    return iov(u64(message.addresses), u64(message.lengths))
