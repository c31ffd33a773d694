"""What each stage of a transfer costs alone, in processor seconds a gigabyte: copy, checksum, socket, TLS.

Each is run by itself in this process, on memory larger than the caches and in blocks as the pump's: what the
pump uses above their sum is its own turns (Python, messages, waking up).
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from prfaas.config.pump import PumpConfig
from prfaas.pump.memory import Buffer, OwnerMemory
from prfaas.pump.tls import TlsContext, TlsEnd
from prfaas.pump_client.guard import GuardTable
from prfaas.transfer.frames import checksum
from prfaas.transfer.segments import U64
from prfaas_testbed.bench.certificates import tls_for
from prfaas_testbed.bench.harness import Progress, Row, median
from prfaas_testbed.bench.places import K_SITES

K_BLOCK_BYTES: int = PumpConfig.model_fields["block_bytes"].default
K_SEGMENT_BYTES = 65536
K_POOL_BYTES = 256 << 20
K_STAGES = ("copy out", "checksum", "socket", "TLS", "copy in")


def measure(workdir: Path, seconds: float, repetitions: int, progress: Progress) -> list[Row]:
    """A row for each stage: processor seconds a GB, of both ends together where both have it."""
    values: dict[str, list[float]] = {stage: [] for stage in K_STAGES}
    with closing(GuardTable()) as guards, closing(OwnerMemory(os.getpid(), os.dup(guards.fd))) as memory:
        guard, block, blocks = guards.take(), Buffer(K_BLOCK_BYTES), _Blocks()
        for _ in range(repetitions):
            values["copy out"].append(
                _cost(lambda: memory.read(guard, blocks.next(), block.address), seconds)
            )
            values["copy in"].append(
                _cost(lambda: memory.write(guard, blocks.next(), block.address), seconds)
            )
            values["checksum"].append(2 * _cost(lambda: checksum(block.view), seconds))
            plain = _socket_cost(block, seconds, None)
            values["socket"].append(plain)
            values["TLS"].append(_socket_cost(block, seconds, workdir / "keys") - plain)
    rows = [{"stage": stage, "cpu_s_per_gb": found} for stage, found in values.items()]
    progress("stages: " + ", ".join(f"{s} {median(v):.3f}" for s, v in values.items()) + " CPU s/GB")
    return rows


class _Blocks:
    """Scattered pieces of a pool, block after block, never twice the same before all were used."""

    def __init__(self) -> None:
        self._pool = np.ones(K_POOL_BYTES, np.uint8)
        places = np.random.default_rng(7).permutation(K_POOL_BYTES // K_SEGMENT_BYTES).astype(np.uint64)
        address = np.uint64(self._pool.ctypes.data)
        self._starts: U64 = address + places * np.uint64(K_SEGMENT_BYTES)
        self._at, self._n = 0, K_BLOCK_BYTES // K_SEGMENT_BYTES

    def next(self) -> U64:
        starts = self._starts[self._at : self._at + self._n]
        self._at = (self._at + self._n) % len(self._starts)
        return np.stack((starts, np.full(self._n, K_SEGMENT_BYTES, np.uint64)), axis=1)


def _cost(block: Callable[[], object], seconds: float) -> float:
    """Processor seconds a GB of something done to one block at a time."""
    began_s, used_s, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began_s < seconds:
        block()
        n += 1
    return (time.process_time() - used_s) / (n * K_BLOCK_BYTES / 1e9)


def _socket_cost(block: Buffer, seconds: float, keys: Path | None) -> float:
    """Both ends of a loopback connection in turns; `keys`: with mutual TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    ends: list[TlsEnd | socket.socket] = [dialled, accepted]
    for sock in (dialled, accepted):
        sock.setblocking(False)
    if keys is not None:
        ends = [_secured(sock, keys, dialled=sock is dialled) for sock in (dialled, accepted)]
        _shake(ends)
    a, b, target = *ends, Buffer(K_BLOCK_BYTES)
    try:
        return _cost(lambda: _pass(a, b, block.view, target.view), seconds)
    finally:
        for end in ends:
            (end if isinstance(end, socket.socket) else end.sock).close()


def _secured(sock: socket.socket, keys: Path, *, dialled: bool) -> TlsEnd:
    files = tls_for(keys, K_SITES["sender" if dialled else "receiver"])
    context = TlsContext(server=not dialled, site_file=files.site_file, authorities=files.authorities)
    return context.end(sock, dialled=dialled)


def _shake(ends: list[TlsEnd | socket.socket]) -> None:
    waiting = [end for end in ends if not isinstance(end, socket.socket)]
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                continue
            waiting.remove(end)


def _pass(
    a: TlsEnd | socket.socket, b: TlsEnd | socket.socket, source: memoryview, target: memoryview
) -> None:
    """One block from a to b."""
    sent = got = 0
    while got < len(source):
        try:
            while sent < len(source):
                sent += a.send(source[sent:])
            if not isinstance(a, socket.socket):
                a.flush()
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        try:
            while got < len(target):
                got += b.recv_into(target[got:])
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
