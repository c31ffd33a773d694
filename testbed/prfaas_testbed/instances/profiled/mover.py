"""How a profiled instance's bytes reach another site; the shape, and the way within one process for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class MoveFailed(Exception):
    """The bytes didn't arrive; the message says why."""


@dataclass
class Moved:
    """A finished send, by the receiver's word."""

    payload_bytes: int
    resent_blocks: int = 0


class Sender(Protocol):
    """The prefill side."""

    async def memory(self, room: int, size_bytes: int) -> memoryview:
        """Source memory of one request, until `forget`."""
        ...

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
        """Source bytes [offset, offset + size) to the lease at offset − skip_bytes; `last`: nothing follows.

        Returns at the receiver's word that they are applied. Raises MoveFailed.
        """
        ...

    async def forget(self, room: int) -> None: ...


class Receiver(Protocol):
    """The decode side."""

    async def lease(self, room: int, size_bytes: int, timeout_s: float) -> tuple[str, memoryview]:
        """The grant to show to the sender, and the (poisoned) memory that it may write until `release`.

        Raises MoveFailed.
        """
        ...

    async def landed(self, room: int, timeout_s: float) -> None:
        """Until all that the sender had is applied. Raises MoveFailed."""
        ...

    async def release(self, room: int) -> None:
        """Not one byte is written after this returns."""
        ...
