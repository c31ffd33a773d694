"""Memory that several threads of one server register and let go of while others lease theirs."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np

K_PIECE_BYTES = 4096
K_LONG_S = 1.0  # it took a tenth of that to go wrong


def test_a_lease_is_granted_while_other_threads_register_and_let_go_of_memory(pair):
    _, _, west = pair
    memory = np.zeros(64 * K_PIECE_BYTES, np.uint8)
    # No two follow on in memory: each is a range of its own. The leased one is the last.
    pieces = [(memory.ctypes.data + 2 * i * K_PIECE_BYTES, K_PIECE_BYTES) for i in range(32)]
    *others, kept = pieces
    west.register([kept])
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            west.register(others)
            west.deregister([address for address, _ in others])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=come_and_go) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        room, end_s = 0, time.monotonic() + K_LONG_S
        while time.monotonic() < end_s:
            room += 1
            west.grant_lease(room, 0, [kept], 60).revoke()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
