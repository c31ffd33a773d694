"""Ends a server whose owner is gone: what was killed by -9 can't end what it had started."""

from __future__ import annotations

import os
import select
import threading

K_OWNER = "PRFAAS_CPU_OWNER"
"""The process that started the server and is to end it; unset for one that was started by hand."""
K_STATUS = 3


def end_with_owner() -> None:
    """For each of a server's processes."""
    owner = os.environ.get(K_OWNER)
    if owner is None:
        return
    try:
        descriptor = os.pidfd_open(int(owner))
    except ProcessLookupError:
        os._exit(K_STATUS)
    except OSError:  # a kernel that has no such thing
        return
    threading.Thread(target=_wait, args=(descriptor,), name="owner", daemon=True).start()


def _wait(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    poller.poll()
    os._exit(K_STATUS)
