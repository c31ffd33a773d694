"""A profiled instance's bytes over the node's pump: the same client, leases and refusals as the plugin's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from prfaas.config.loading import load
from prfaas.config.pump import PumpConfig
from prfaas.model.errors import ConfigError, PrfaasError
from prfaas.model.transfer import FailureReason, LeaseGrant, TransferKind
from prfaas.pump_client import Lease, LocalPumpClient, Transfer
from prfaas_testbed.instances.profiled.mover import Moved, MoveFailed, Receiver, Sender
from prfaas_testbed.instances.profiled.settings import Settings

K_POISON = 0xA5


async def open_movers(
    settings: Settings, stack: contextlib.AsyncExitStack
) -> tuple[Sender | None, Receiver | None]:
    """Both ends over one client, since roles can be switched; none for an instance that moves nothing."""
    if settings.pump is None:
        if settings.role != "collocated":
            raise ConfigError(settings.name, "pump", None, f"a {settings.role} instance needs a pump's file")
        return None, None
    config = load(settings.pump, PumpConfig)
    client = await asyncio.to_thread(LocalPumpClient.open, config, name=settings.name)
    stack.callback(client.close)
    pumped = Pumped(client)
    return pumped, pumped


class Pumped:
    """Sender and Receiver over one pump client. Memory is registered for as long as its request lives."""

    def __init__(self, client: LocalPumpClient) -> None:
        self._client = client
        self._sources: dict[int, NDArray[np.uint8]] = {}
        self._sending: dict[int, list[Transfer]] = {}
        self._leases: dict[int, tuple[Lease, NDArray[np.uint8]]] = {}

    # Sender

    async def memory(self, room: int, size_bytes: int) -> memoryview:
        source = np.empty(size_bytes, dtype=np.uint8)
        self._client.register([(source.ctypes.data, size_bytes)])
        self._sources[room] = source
        return memoryview(source)  # type: ignore[arg-type]

    async def send(
        self,
        room: int,
        grant: str,
        offset: int,
        skip_bytes: int,
        size_bytes: int,
        last: bool,
        timeout_s: float,
    ) -> Moved:
        try:
            base, _, text = grant.partition("|")
            lease, target = LeaseGrant.from_text(text), int(base) + offset - skip_bytes
        except ValueError as error:
            raise MoveFailed(f"not a grant: {error}") from None
        transfer = self._client.submit(
            lease,
            [self._sources[room].ctypes.data + offset],
            [target],
            [size_bytes],
            kind=TransferKind.KV,
            deadline_s=timeout_s,
            last=last,
        )
        self._sending.setdefault(room, []).append(transfer)
        done = asyncio.Event()
        transfer.add_done_callback(_setting(done))
        await done.wait()
        outcome = transfer.outcome
        assert outcome is not None
        if not outcome.ok:
            raise MoveFailed(f"{outcome.reason}: {outcome.detail}")
        return Moved(outcome.payload_bytes, outcome.resent_blocks)

    async def forget(self, room: int) -> None:
        for transfer in self._sending.pop(room, []):
            if transfer.outcome is None:
                self._client.cancel(transfer)
        source = self._sources.pop(room, None)
        if source is not None:
            await asyncio.to_thread(self._client.deregister, [source.ctypes.data])

    # Receiver

    async def lease(self, room: int, size_bytes: int, timeout_s: float) -> tuple[str, memoryview]:
        target = np.full(size_bytes, K_POISON, dtype=np.uint8)
        self._client.register([(target.ctypes.data, size_bytes)])
        try:
            lease = self._client.grant_lease(room, 1, [(target.ctypes.data, size_bytes)], timeout_s)
        except PrfaasError as error:
            await asyncio.to_thread(self._client.deregister, [target.ctypes.data])
            raise MoveFailed(f"no lease: {error}") from None
        self._leases[room] = (lease, target)
        # The memory is one piece, and the sender names places by their address here.
        return f"{target.ctypes.data}|{lease.grant.to_text()}", memoryview(target)  # type: ignore[arg-type]

    async def landed(self, room: int, timeout_s: float) -> None:
        lease, _ = self._leases[room]
        changed = asyncio.Event()
        lease.add_callback(_setting(changed))
        try:
            async with asyncio.timeout(timeout_s):
                while not lease.complete and lease.failure is None:
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            raise MoveFailed(f"{FailureReason.DEADLINE}: not whole within {timeout_s:g} s") from None
        if lease.failure is not None:
            raise MoveFailed(f"{lease.failure.reason}: {lease.failure.detail}")

    async def release(self, room: int) -> None:
        entry = self._leases.pop(room, None)
        if entry is not None:
            lease, target = entry
            lease.revoke()
            await asyncio.to_thread(self._client.deregister, [target.ctypes.data])


def _setting(event: asyncio.Event) -> Callable[[object], None]:
    """A callback for the client's own thread."""
    loop = asyncio.get_running_loop()

    def call(_: object) -> None:
        loop.call_soon_threadsafe(event.set)

    return call
