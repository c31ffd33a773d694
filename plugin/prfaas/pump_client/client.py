"""The client of a pump on the same machine.

One thread reads what the pump says; calls write to the control socket at once or, when it is full, leave it
to that thread. Bytes of a transfer never pass through this process: the pump reads and writes its memory
(pump/memory.py).
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence

import msgspec
from numpy.typing import ArrayLike

from prfaas.config.pump import PumpConfig
from prfaas.model.errors import LocalProtocolError, MachineError, PrfaasError
from prfaas.model.transfer import FailureReason, LeaseGrant, Outcome, TransferKind
from prfaas.pump_client import messages as m
from prfaas.pump_client.base import Offer, PumpClient, Region, Transfer
from prfaas.pump_client.guard import GuardTable
from prfaas.pump_client.joining import Joining
from prfaas.pump_client.lease import LocalLease
from prfaas.pump_client.standing import K_TOLD_AGAIN, Standing, calling_back, register_message
from prfaas.transfer.segments import Ranges, as_u64, iov
from prfaas.transfer.strides import segments_told

log = logging.getLogger(__name__)

K_ANSWER_S = 10.0
K_RESTART_PAUSE_S = 0.1
K_READ_BYTES = 1 << 18
K_ROOMS_UNDER_WAY = 65536


class LocalPumpClient(PumpClient):
    """See PumpClient. `open` is the way to make one."""

    def __init__(self, config: PumpConfig, name: str, *, start: bool) -> None:
        self._joining = Joining(config, name, start=start)
        self._guards = GuardTable()
        self._lock = threading.RLock()
        self._standing = Standing(self._lock, self._guards)
        self._counts: dict[tuple[int, str], int] = {}
        self._serials = itertools.count(1)
        self._ids = itertools.count(secrets.randbits(31) << 32 | 1)
        self._out = bytearray()
        self._closed = self._alone = False
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._sock: socket.socket | None = None
        try:
            self._sock, self._attached = self._joining.join(self._guards.fd)
            self._selector.register(self._sock, selectors.EVENT_READ)
        except BaseException:
            self._free()
            raise
        self._thread = threading.Thread(target=self._run, name="prfaas-pump-client", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, config: PumpConfig, *, name: str = "", start: bool = True) -> LocalPumpClient:
        """Join the node's pump; start one if there is none and `start`. Raises MachineError."""
        return cls(config, name or f"pid {os.getpid()}", start=start)

    @property
    def address(self) -> str:
        return self._attached.address

    @property
    def in_callback(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def site(self) -> str:
        return self._attached.site

    @property
    def pump_pid(self) -> int:
        return self._attached.pump_pid

    @property
    def session_id(self) -> str:
        return f"{self.address}#{self._joining.token.hex()}"

    # Memory and leases

    def register(self, regions: Sequence[Region]) -> None:
        with self._lock:
            self._standing.registered.add(regions)
            self._send(register_message(next(self._serials), regions))

    def deregister(self, addresses: Sequence[int]) -> None:
        with self._lock:
            self._standing.registered.remove(addresses)
            serial = next(self._serials)
            question = self._standing.add_question(serial)
            self._send(m.Deregister(serial, as_u64(list(addresses)).tobytes()))
        question.wait(K_ANSWER_S)

    def grant_lease(
        self, room: int, generation: int, regions: Sequence[Region], deadline_s: float, *,
        expected_sources: int = 1, site: str = "",
    ) -> LocalLease:  # fmt: skip
        with self._lock:  # another thread may be registering, or letting go
            held = self._standing.registered.holds_all(Ranges(regions))
        if not held:
            raise LocalProtocolError("a lease on memory that isn't registered")
        slot, word = self._guards.take()
        rows = iov([a for a, _ in regions], [n for _, n in regions])
        message = m.Grant(
            secrets.randbits(62) | 1, secrets.token_bytes(16), room, generation, rows[:, 0].tobytes(),
            rows[:, 1].tobytes(), deadline_s, site, slot, word,
        )  # fmt: skip
        grant = LeaseGrant(
            self.address, message.lease_id, message.token, room, generation, self._attached.window_bytes,
            self.site,
        )  # fmt: skip
        lease = LocalLease(self.revoke, grant, message, expected_sources, time.monotonic() + deadline_s)
        with self._lock:
            self._send_guarded(message)
            self._standing.add_lease(lease)
        return lease

    def revoke(self, lease: LocalLease) -> None:
        """See Lease.revoke."""
        lease.revoked = True
        self._guards.withdraw(lease.message.guard_slot, lease.message.guard_word)
        with self._lock:
            if self._standing.drop_lease(lease):
                self._send(m.Revoke(lease.message.lease_id))
        lease.wake()

    # Transfers

    def submit(
        self, grant: LeaseGrant, sources: ArrayLike, destinations: ArrayLike, lengths: ArrayLike, *,
        kind: TransferKind, deadline_s: float, last: bool = False, source: str = "",
        offer: Offer | None = None,
    ) -> Transfer:  # fmt: skip
        with self._lock:
            key = (grant.lease_id, source)
            index = self._counts.get(key, 0)
            transfer = self._submit(
                grant, sources, destinations, lengths, kind, deadline_s, index, index + 1 if last else 0,
                source, offer.key if offer else "",
            )  # fmt: skip
            self._counts.pop(key, None)
            if not last:
                self._counts[key] = index + 1
                if len(self._counts) > K_ROOMS_UNDER_WAY:
                    del self._counts[next(iter(self._counts))]
            return transfer

    def submit_raw(
        self, session_id: str, sources: ArrayLike, destinations: ArrayLike, lengths: ArrayLike, *,
        deadline_s: float,
    ) -> Transfer:  # fmt: skip
        address, mark, token = session_id.rpartition("#")
        try:
            grant = LeaseGrant(address, 0, bytes.fromhex(token), 0, 0, self._attached.window_bytes)
        except ValueError:
            mark = ""
        if not mark:
            raise LocalProtocolError(f"{session_id!r} names no client of a pump")
        with self._lock:
            return self._submit(
                grant, sources, destinations, lengths, TransferKind.RAW, deadline_s, 0, 0, "", ""
            )

    def _submit(
        self, grant: LeaseGrant, sources: ArrayLike, destinations: ArrayLike, lengths: ArrayLike,
        kind: TransferKind, deadline_s: float, index: int, count: int, source: str, offer: str,
    ) -> Transfer:  # fmt: skip
        transfer = Transfer(next(self._ids))
        src, dst, size, strides = segments_told(sources, destinations, lengths)
        slot, word = self._guards.take()
        message = m.Submit(
            transfer.transfer_id, grant.address, grant.room, grant.generation, grant.lease_id, grant.token,
            grant.window_bytes, kind.value, deadline_s, src, dst, size, slot, word, index, count, source,
            grant.site, offer, strides,
        )  # fmt: skip
        self._send_guarded(message)
        self._standing.add_transfer(transfer, message)
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        with self._lock:
            message = self._standing.submitted(transfer)
            if message is not None:
                self._send(m.Cancel(transfer.transfer_id))
        if message is not None:
            self._guards.withdraw(message.guard_slot, message.guard_word)
            outcome = Outcome(False, FailureReason.CANCELLED, "by this server")
            self._standing.end(transfer.transfer_id, outcome)
        # Where the pump's word was quicker, the thread that heard it may be about to say so.
        transfer.wait(K_ANSWER_S)

    def offer(
        self, site: str, size_bytes: int, deadline_s: float, *,
        first_in_s: float = 0.0, ready_in_s: float = 0.0, may_queue: bool = True,
    ) -> Offer:  # fmt: skip
        with self._lock:
            offer = Offer(str(next(self._serials)), site)
            message = m.Offer(offer.key, site, size_bytes, deadline_s, first_in_s, ready_in_s, may_queue)
            self._standing.add_offer(offer, message)
            self._send(message)
        return offer

    def release(self, offer: Offer) -> None:
        with self._lock:
            if self._standing.drop_offer(offer):
                self._send(m.Release(offer.key))

    def prepare(self, address: str) -> None:
        with self._lock:
            self._send(m.Prepare(address))

    def expose(self, host: str, port: int) -> None:
        message = m.Expose(host, port)
        with self._lock:
            self._standing.exposed.append(message)
            self._send(message)

    def forward(
        self, peer: str, host: str, port: int, *, site: str = "", timeout_s: float = K_ANSWER_S
    ) -> str:
        with self._lock:
            known = self._standing.forwarded(peer, host, port)
        if known is not None:
            return known
        message = m.Forward(next(self._serials), peer, site, host, port)
        reply = self._ask(message, timeout_s)
        if reply.error:
            raise PrfaasError(reply.error)
        address = str(reply.body["address"])
        with self._lock:
            self._standing.add_forward(message, address)
        return address

    def stats(self, timeout_s: float = 5.0) -> dict[str, object]:
        return self._ask(m.AskStats(next(self._serials)), timeout_s).body

    def _ask(self, message: m.Forward | m.AskStats, timeout_s: float) -> m.Reply:
        """The pump's answer. Whoever asks waits for the thread that hears it, and would for itself."""
        if self.in_callback:
            raise PrfaasError(
                "a callback can't ask the pump: its answer is heard when the callback has ended"
            )
        with self._lock:
            question = self._standing.add_question(message.serial)
            self._send(message)
        reply = question.wait(timeout_s)
        if reply is None:
            raise PrfaasError("the pump doesn't answer")
        return reply

    # The control socket

    def _send(self, message: m.Message) -> None:
        """Under the lock. What the socket can't take now, the thread sends; what is said while there is no
        pump, the next one hears.
        """
        if self._closed:
            raise PrfaasError("the pump client is closed")
        data = m.encode(message)
        if self._sock is None and isinstance(message, K_TOLD_AGAIN):
            return
        self._out += data
        if not self._flush():
            os.write(self._wake_out, b"x")

    def _send_guarded(self, message: m.Submit | m.Grant) -> None:
        """Under the lock. What can't be said gives its guard back."""
        try:
            self._send(message)
        except PrfaasError:
            self._guards.withdraw(message.guard_slot, message.guard_word)
            raise

    def _flush(self) -> bool:
        """Under the lock. Whether all is sent (or waits for a new pump)."""
        if self._sock is None:
            return True
        try:
            while self._out:
                n = self._sock.send(self._out)
                del self._out[:n]
        except BlockingIOError:
            return False
        except OSError:
            pass  # The thread sees the end of the connection as well, and tells all to the next pump.
        return True

    def _run(self) -> None:
        inbox = m.Inbox()
        while not self._closed:
            with self._lock:
                sock = self._sock
                want = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
                if sock is not None:
                    self._selector.modify(sock, want)
            if sock is None:
                inbox = m.Inbox()
                self._reattach()
                continue
            for key, mask in self._selector.select():
                if key.fd == self._wake_in:
                    os.read(self._wake_in, 4096)
                    continue
                if mask & selectors.EVENT_WRITE:
                    with self._lock:
                        self._flush()
                if mask & selectors.EVENT_READ and not self._read(sock, inbox):
                    self._detach()

    def _read(self, sock: socket.socket, inbox: m.Inbox) -> bool:
        """Handle what there is; False when the pump has gone."""
        try:
            data = sock.recv(K_READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        try:
            messages = [m.decode_to_server(body) for body in inbox.feed(data)]
        except (msgspec.MsgspecError, ValueError) as error:
            log.error("the pump sends what isn't a message: %s", error)
            return False
        for message in messages:
            calling_back(self._standing.hear, message)
        return True

    def _detach(self) -> None:
        with self._lock:
            sock, self._sock = self._sock, None
            self._out.clear()
            self._standing.drop_questions()
        if sock is not None:
            self._selector.unregister(sock)
            sock.close()

    def _reattach(self) -> None:
        """The pump died: join or start another and tell it all that is under way. Deadlines still hold."""
        calling_back(self._standing.expire)
        try:
            sock, attached = self._joining.join(self._guards.fd)
        except MachineError as error:
            if not self._alone:
                log.warning("no pump: %s", error)
            self._alone = True
            self._selector.select(K_RESTART_PAUSE_S)
            return
        self._alone = False
        self._selector.register(sock, selectors.EVENT_READ)
        with self._lock:
            # At once with the retelling: what another thread says from here on comes after it.
            self._sock, self._attached = sock, attached
            self._out += self._standing.told_again(next(self._serials))
            n_transfers = len(self._standing.transfers)
            self._flush()
        log.warning("the pump had gone; another is at work (%d transfers go on)", n_transfers)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            leases, transfers = self._standing.leases, self._standing.transfers
        for lease in leases:
            self.revoke(lease)
        for transfer in transfers:
            self.cancel(transfer)
        with self._lock:
            self._closed = True
        os.write(self._wake_out, b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join(K_ANSWER_S)
        self._detach()
        self._free()

    def _free(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._selector.close()
        os.close(self._wake_in)
        os.close(self._wake_out)
        self._guards.close()
