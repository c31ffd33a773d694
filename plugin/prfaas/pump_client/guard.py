"""Guards: how a server takes back memory that a pump reads or writes, at once and for good.

Server and pump share a table of 8-byte words (a memfd). A lease or a transfer has a slot there, holding a
word that is never used again. The pump copies only while it holds the slot's record lock (fcntl, by process)
and has seen the word under it; the server withdraws by zeroing the word, then taking and releasing the lock.
So withdrawing waits for the copy that is running, if there is one, and after it not one byte moves; a pump
that is killed loses its locks with its life, and a server that is stopped while it holds one makes the pump
skip, not wait.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading

from prfaas.model.errors import PrfaasError
from prfaas.pump_client.messages import K_GUARD_SLOTS

K_WORD = struct.Struct("<Q")
K_TABLE_BYTES = K_GUARD_SLOTS * K_WORD.size


class GuardTable:
    """The server's end. Slot 0 guards its registered regions and holds the word 1 for ever."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("prfaas-guards", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, K_TABLE_BYTES)
        self._map = mmap.mmap(self.fd, K_TABLE_BYTES)
        self._free = list(range(K_GUARD_SLOTS - 1, 0, -1))
        self._word = 1
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._ending: set[tuple[int, int]] = set()
        """Withdrawn, while the copy that was running then may still run."""
        self._file_lock = threading.Lock()
        K_WORD.pack_into(self._map, 0, 1)

    def take(self) -> tuple[int, int]:
        """A slot and its new word. Raises PrfaasError when none is free."""
        with self._lock:
            if not self._free:
                raise PrfaasError(f"{K_GUARD_SLOTS - 1} leases and transfers are open: no guard is free")
            slot = self._free.pop()
            self._word += 1
            K_WORD.pack_into(self._map, slot * K_WORD.size, self._word)
            return slot, self._word

    def withdraw(self, slot: int, word: int) -> None:
        """After this returns the pump neither reads nor writes under the guard, whichever thread was the
        first to withdraw it. Once withdrawn, nothing happens.
        """
        mark = (slot, word)
        with self._ended:
            if K_WORD.unpack_from(self._map, slot * K_WORD.size)[0] != word:
                self._ended.wait_for(lambda: mark not in self._ending)
                return
            K_WORD.pack_into(self._map, slot * K_WORD.size, 0)
            self._ending.add(mark)
        # Record locks belong to the process: two threads here would both hold one, so they take turns.
        try:
            with self._file_lock:
                fcntl.lockf(self.fd, fcntl.LOCK_EX, K_WORD.size, slot * K_WORD.size)
                fcntl.lockf(self.fd, fcntl.LOCK_UN, K_WORD.size, slot * K_WORD.size)
            with self._lock:
                self._free.append(slot)
        finally:
            with self._ended:
                self._ending.discard(mark)
                self._ended.notify_all()

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)
