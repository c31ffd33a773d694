"""The client of a pump on the same machine.

One thread reads what the pump says; calls write to the control socket at once or, when it is full, leave it
to that thread. Bytes of a transfer never pass through this process: the pump reads and writes its memory
(pump/memory.py).
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from prfaas.config.pump import PumpConfig
from prfaas.model.decisions import Verdict
from prfaas.model.errors import LocalProtocolError, MachineError, PrfaasError
from prfaas.model.transfer import FailureReason, LeaseGrant, Outcome, TransferKind
from prfaas.pump_client import launch
from prfaas.pump_client import messages as m
from prfaas.pump_client.base import Arrival, Offer, PumpClient, Region, Transfer
from prfaas.pump_client.guard import GuardTable
from prfaas.pump_client.lease import LocalLease
from prfaas.transfer.segments import Ranges, as_u64, iov

log = logging.getLogger(__name__)

K_PR_SET_PTRACER = 0x59616D61
K_ATTACH_S = 10.0
K_RESTART_PAUSE_S = 0.1
K_READ_BYTES = 1 << 18
K_ROOMS_UNDER_WAY = 65536
K_TOLD_AGAIN = (m.Register, m.Grant, m.Submit)
"""What every new pump is told anyway, of all that stands then: said twice, it would be refused."""


class LocalPumpClient(PumpClient):
    """See PumpClient. `open` is the way to make one."""

    def __init__(self, config: PumpConfig, name: str, *, start: bool) -> None:
        self._config, self._name, self._may_start = config, name, start
        self._token = secrets.token_bytes(16)
        self._guards = GuardTable()
        self._probe = ctypes.create_string_buffer(secrets.token_bytes(16), 16)
        self._registered = Ranges()
        self._lock = threading.RLock()
        self._transfers: dict[int, tuple[Transfer, m.Submit, float]] = {}
        self._leases: dict[int, LocalLease] = {}
        self._replies: dict[int, tuple[threading.Event, list[m.Reply]]] = {}
        self._offers: dict[str, Offer] = {}
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
            self._sock, self._attached = self._attach()
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
    def site(self) -> str:
        return self._attached.site

    @property
    def pump_pid(self) -> int:
        return self._attached.pump_pid

    @property
    def session_id(self) -> str:
        return f"{self.address}#{self._token.hex()}"

    # Memory and leases

    def register(self, regions: Sequence[Region]) -> None:
        with self._lock:
            self._registered.add(regions)
            self._send(_register(next(self._serials), regions))

    def deregister(self, addresses: Sequence[int]) -> None:
        with self._lock:
            self._registered.remove(addresses)
            serial = next(self._serials)
            event, _ = self._expect(serial)
            self._send(m.Deregister(serial, as_u64(list(addresses)).tobytes()))
        event.wait(K_ATTACH_S)

    def grant_lease(
        self, room: int, generation: int, regions: Sequence[Region], deadline_s: float, *,
        expected_sources: int = 1, site: str = "",
    ) -> LocalLease:  # fmt: skip
        if not self._registered.holds_all(Ranges(regions)):
            raise LocalProtocolError("a lease on memory that isn't registered")
        slot, word = self._guards.take()
        rows = iov([a for a, _ in regions], [n for _, n in regions])
        message = m.Grant(
            secrets.randbits(62) | 1, secrets.token_bytes(16), room, generation, rows[:, 0].tobytes(),
            rows[:, 1].tobytes(), deadline_s, site, slot, word,
        )  # fmt: skip
        grant = LeaseGrant(
            self.address,
            message.lease_id,
            message.token,
            room,
            generation,
            self._attached.window_bytes,
            self.site,
        )
        lease = LocalLease(self.revoke, grant, message, expected_sources, time.monotonic() + deadline_s)
        with self._lock:
            self._leases[message.lease_id] = lease
            self._send(message)
        return lease

    def revoke(self, lease: LocalLease) -> None:
        """See Lease.revoke."""
        lease.revoked = True
        self._guards.withdraw(lease.message.guard_slot, lease.message.guard_word)
        with self._lock:
            if self._leases.pop(lease.message.lease_id, None) is not None:
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
            index = self._counts.pop(key, 0)
            if not last:
                self._counts[key] = index + 1
                if len(self._counts) > K_ROOMS_UNDER_WAY:
                    del self._counts[next(iter(self._counts))]
            return self._submit(
                grant, sources, destinations, lengths, kind, deadline_s, index, index + 1 if last else 0,
                source, offer.key if offer else "",
            )  # fmt: skip

    def submit_raw(
        self,
        session_id: str,
        sources: ArrayLike,
        destinations: ArrayLike,
        lengths: ArrayLike,
        *,
        deadline_s: float,
    ) -> Transfer:
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
        src, dst, size = (as_u64(x).tobytes() for x in (sources, destinations, lengths))
        slot, word = self._guards.take()
        message = m.Submit(
            transfer.transfer_id, grant.address, grant.room, grant.generation, grant.lease_id, grant.token,
            grant.window_bytes, kind.value, deadline_s, src, dst, size, slot, word, index, count, source,
            grant.site, offer,
        )  # fmt: skip
        self._transfers[transfer.transfer_id] = (transfer, message, time.monotonic() + deadline_s)
        self._send(message)
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        with self._lock:
            entry = self._transfers.get(transfer.transfer_id)
            if entry is not None:
                self._send(m.Cancel(transfer.transfer_id))
        if entry is not None:
            self._guards.withdraw(entry[1].guard_slot, entry[1].guard_word)
            self._end(transfer.transfer_id, Outcome(False, FailureReason.CANCELLED, "by this server"))

    def offer(
        self, site: str, size_bytes: int, deadline_s: float, *,
        first_in_s: float = 0.0, ready_in_s: float = 0.0,
        may_queue: bool = True,
    ) -> Offer:  # fmt: skip
        with self._lock:
            offer = Offer(str(next(self._serials)), site)
            self._offers[offer.key] = offer
            self._send(m.Offer(offer.key, site, size_bytes, deadline_s, first_in_s, ready_in_s, may_queue))
        return offer

    def release(self, offer: Offer) -> None:
        with self._lock:
            if self._offers.pop(offer.key, None) is not None:
                self._send(m.Release(offer.key))

    def prepare(self, address: str) -> None:
        with self._lock:
            self._send(m.Prepare(address))

    def stats(self, timeout_s: float = 5.0) -> dict[str, object]:
        with self._lock:
            serial = next(self._serials)
            event, replies = self._expect(serial)
            self._send(m.AskStats(serial))
        event.wait(timeout_s)
        if not replies:
            raise PrfaasError("the pump doesn't answer")
        return replies[0].body

    def _expect(self, serial: int) -> tuple[threading.Event, list[m.Reply]]:
        entry: tuple[threading.Event, list[m.Reply]] = (threading.Event(), [])
        self._replies[serial] = entry
        return entry

    def _end(self, transfer_id: int, outcome: Outcome) -> None:
        with self._lock:
            entry = self._transfers.pop(transfer_id, None)
        if entry is not None:
            transfer, message, _ = entry
            if message.count or not outcome.ok:
                self._offers.pop(message.offer, None)
            self._guards.withdraw(message.guard_slot, message.guard_word)
            transfer.end(outcome)

    # The control socket

    def _send(self, message: m.Message) -> None:
        """Under the lock. What the socket can't take now, the thread sends; what is said while there is no
        pump, the next one hears.
        """
        if self._closed:
            raise PrfaasError("the pump client is closed")
        if self._sock is None and isinstance(message, K_TOLD_AGAIN):
            return
        self._out += m.encode(message)
        if not self._flush():
            os.write(self._wake_out, b"x")

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
            # The thread sees the end of the connection as well, and tells all to the next pump.
            return True
        return True

    def _attach(self) -> tuple[socket.socket, m.Attached]:
        """Join a pump: its connection and its answer. Raises MachineError."""
        sock = (
            launch.connect_or_start(self._config)
            if self._may_start
            else launch.connect(self._config.control_path)
        )
        if sock is None:
            raise MachineError(f"no pump answers at {self._config.control_path}")
        try:
            sock.settimeout(K_ATTACH_S)
            pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            # Under Yama's ptrace_scope 1 the pump may touch our memory only by our leave.
            ctypes.CDLL(None).prctl(K_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)
            hello = m.Attach(
                m.K_CONTROL_VERSION, self._name, self._token, ctypes.addressof(self._probe), self._probe.raw
            )
            data = m.encode(hello)
            sent = socket.send_fds(sock, [data], [self._guards.fd])
            sock.sendall(data[sent:])
            answer = _first_answer(sock)
        except OSError as error:
            sock.close()
            raise MachineError(f"the pump at {self._config.control_path} doesn't answer: {error}") from None
        if not isinstance(answer, m.Attached):
            sock.close()
            raise MachineError(answer.error if isinstance(answer, m.Refused) else "the pump answers nonsense")
        sock.setblocking(False)
        return sock, answer

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
        for body in inbox.feed(data):
            try:
                self._handle(m.decode_to_server(body))
            except msgspec.MsgspecError as error:
                log.error("the pump sends what isn't a message: %s", error)
                return False
            except Exception:
                # A callback of the user's: it must not end the thread that all others depend on.
                log.exception("a callback failed")
        return True

    def _handle(self, message: m.ToServer) -> None:
        match message:
            case m.Ended():
                reason = FailureReason(message.reason) if message.reason else None
                self._end(
                    message.transfer_id,
                    Outcome(
                        message.ok, reason, message.detail, message.payload_bytes, message.resent_blocks,
                        message.elapsed_s,
                    ),
                )  # fmt: skip
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
                    entry = self._replies.pop(message.serial, None)
                if entry is not None:
                    entry[1].append(message)
                    entry[0].set()
                elif message.error:
                    log.warning("the pump refused: %s", message.error)
            case m.OfferNews():
                with self._lock:
                    offer = self._offers.get(message.key)
                    if offer is not None and message.verdict == Verdict.REFUSED.value:
                        del self._offers[message.key]
                if offer is not None:
                    offer.alone = message.alone
                    offer.hear(message.verdict, message.reason, message.retry_after_s, message.finish_in_s)
            case m.Refused():
                log.warning("the pump ends the connection: %s", message.error)

    def _detach(self) -> None:
        with self._lock:
            sock, self._sock = self._sock, None
            self._out.clear()
            for event, _ in self._replies.values():
                event.set()
            self._replies.clear()
        if sock is not None:
            self._selector.unregister(sock)
            sock.close()

    def _reattach(self) -> None:
        """The pump died: join or start another and tell it all that is under way. Deadlines still hold."""
        self._expire()
        try:
            sock, attached = self._attach()
        except MachineError as error:
            if not self._alone:
                log.warning("no pump: %s", error)
            self._alone = True
            self._selector.select(K_RESTART_PAUSE_S)
            return
        self._alone = False
        now = time.monotonic()
        self._selector.register(sock, selectors.EVENT_READ)
        with self._lock:
            # At once with the retelling: what another thread says from here on comes after it.
            self._sock, self._attached = sock, attached
            regions = self._registered.regions
            if regions:
                self._out += m.encode(_register(next(self._serials), regions))
            for lease in self._leases.values():
                lease.message.deadline_s = max(0.0, lease.expires_s - now)
                self._out += m.encode(lease.message)
            for _, message, deadline in self._transfers.values():
                message.deadline_s = max(0.0, deadline - now)
                self._out += m.encode(message)
            self._flush()
        log.warning("the pump had gone; another is at work (%d transfers go on)", len(self._transfers))

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [key for key, (_, _, deadline) in self._transfers.items() if deadline <= now]
        for key in late:
            self._end(key, Outcome(False, FailureReason.PUMP_LOST, "no pump until the deadline"))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            leases, transfers = list(self._leases.values()), [t for t, _, _ in self._transfers.values()]
        for lease in leases:
            self.revoke(lease)
        for transfer in transfers:
            self.cancel(transfer)
        with self._lock:
            self._closed = True
        os.write(self._wake_out, b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join(K_ATTACH_S)
        self._detach()
        self._free()

    def _free(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._selector.close()
        os.close(self._wake_in)
        os.close(self._wake_out)
        self._guards.close()

    def __enter__(self) -> LocalPumpClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _first_answer(sock: socket.socket) -> m.ToServer:
    """The pump's first message. The pump says nothing more until it is asked, so nothing is left over."""
    inbox = m.Inbox()
    while True:
        data = sock.recv(65536)
        if not data:
            raise ConnectionError("it closed the connection")
        bodies = inbox.feed(data)
        if bodies:
            try:
                return m.decode_to_server(bodies[0])
            except msgspec.MsgspecError as error:
                raise ConnectionError(str(error)) from None


def _register(serial: int, regions: Sequence[Region]) -> m.Register:
    rows = np.array(regions, dtype=np.uint64).reshape(-1, 2)
    return m.Register(serial, rows[:, 0].tobytes(), rows[:, 1].tobytes())
