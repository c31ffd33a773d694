"""What a sweep's process does that is killed while it sends: to be named to that process."""

from __future__ import annotations

import os
import select
import signal
from multiprocessing.connection import Connection
from typing import Any


def result_of(size: int) -> bytes:
    """So many bytes. From now on this process dies half-way in what a pipe doesn't take at once."""
    whole: Any = Connection._send_bytes  # type: ignore[attr-defined]

    def send(self: Connection, message: memoryview) -> None:
        if len(message) > select.PIPE_BUF:
            os.write(self.fileno(), bytes(message[:8]))
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, message)

    Connection._send_bytes = send  # type: ignore[attr-defined]
    return bytes(size)
