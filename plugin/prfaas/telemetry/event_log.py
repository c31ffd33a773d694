"""JSON lines to a file, off the event loop, bounded in memory and on disk.

`add` never blocks and never raises: a line that finds the buffer full, or the disk, is dropped and counted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

K_FLUSH_S = 0.25
K_BUFFER_BYTES = 16 << 20


class EventLog:
    """One file. `run` is its writer; `close` writes what is left."""

    def __init__(
        self, path: Path, *, max_bytes: int, on_dropped: Callable[[int], None] = lambda lines: None
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._on_dropped = on_dropped
        self._lines: list[bytes] = []
        self._buffered_bytes = 0

    def add(self, event: object) -> None:
        """Anything that msgspec can encode."""
        line = msgspec.json.encode(event) + b"\n"
        if self._buffered_bytes + len(line) > K_BUFFER_BYTES:
            self._on_dropped(1)
            return
        self._lines.append(line)
        self._buffered_bytes += len(line)

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await asyncio.sleep(K_FLUSH_S)
            if self._lines:
                lines = self._take()
                if not await asyncio.to_thread(self._write, lines):
                    self._on_dropped(len(lines))

    def close(self) -> None:
        lines = self._take()
        if lines and not self._write(lines):
            self._on_dropped(len(lines))

    def _take(self) -> list[bytes]:
        lines, self._lines, self._buffered_bytes = self._lines, [], 0
        return lines

    def _write(self, lines: list[bytes]) -> bool:
        try:
            with open(self._path, "ab") as file:
                file.write(b"".join(lines))
                full = file.tell() >= self._max_bytes
            if full:
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        except OSError:
            return False
        return True
