"""Proof that what landed is what was sent: digests on both sides, pages overwritten when leased, faults that
show that the comparison can fail. Nothing of this runs unless the configuration asks for it.

A row is one JSON object a room and side: {"side": "sent"|"landed", "room", "generation", "source", "pages",
"kv": [digest of each layer buffer, over its pages in order], "state": {"0": […]}, "aux": […], "bytes": {kind:
n}}. Digests are CRC32C. Rows of a room are equal, field by field, when the same bytes are in both sides'
memory.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
from numpy.typing import NDArray

from prfaas.model.transfer import TransferKind
from prfaas.sglang.planning import Segments

logger = logging.getLogger(__name__)

K_POISON = 0x5A  # bfloat16 0x5A5A is 1.5e16: attention to such a page can't go unnoticed

Bytes = NDArray[np.uint8]


def memory(address: int, length: int) -> Bytes:
    """This process's memory as an array. The caller keeps it alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))


def digest_items(
    pointer: int, item_bytes: int, indices: Sequence[int] | NDArray[Any], before: int = 0
) -> int:
    """CRC32C over items of a buffer in the order of `indices`, going on from `before`."""
    items = np.asarray(indices, dtype=np.int64)
    if items.size == 0 or item_bytes == 0:
        return before
    table = memory(pointer, (int(items.max()) + 1) * item_bytes).reshape(-1, item_bytes)
    return int(crc32c.crc32c(np.ascontiguousarray(table[items]).data.cast("B"), before))


def digest_buffers(
    pointers: Sequence[int],
    item_bytes: Sequence[int],
    indices: Sequence[int] | NDArray[Any],
    before: Sequence[int] | None = None,
) -> list[int]:
    """One digest a buffer."""
    starts = before or [0] * len(pointers)
    return [
        digest_items(pointer, size, indices, start)
        for pointer, size, start in zip(pointers, item_bytes, starts, strict=True)
    ]


def poison(pieces: NDArray[np.uint64]) -> None:
    """Overwrite memory, rows (address, length)."""
    for address, length in pieces.tolist():
        ctypes.memset(address, K_POISON, length)


class Rows:
    """Appends rows to one file of this process; safe from any thread."""

    def __init__(self, directory: Path, role: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{role}-{os.getpid()}.jsonl"
        self._lock = threading.Lock()
        self._missing = 0

    def write(self, row: Mapping[str, Any]) -> None:
        """A row that can't be written (a full disk) is left out, and said so: it's a proof that is missing
        then, and no reason to fail a transfer."""
        line = (json.dumps(row, separators=(",", ":")) + "\n").encode()
        with self._lock:
            try:
                with self.path.open("ab", buffering=0) as out:
                    whole = out.tell()
                    if out.write(line) < len(line):
                        out.truncate(whole)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._missing += 1
                if self._missing.bit_count() == 1:
                    words = "prfaas: verify: %s: %s; rows that are missing: %d"
                    logger.error(words, self.path, error.strerror, self._missing)


class KvFault:
    """What a prefill server does to KV on purpose, for a control: kinds as in the configuration, for all
    rooms or by room."""

    def __init__(self, kind: str | None, rooms: Mapping[int, str] | None = None) -> None:
        self._kind, self._rooms = kind, dict(rooms or {})
        self._zeros: Bytes = np.zeros(0, dtype=np.uint8)
        self._dropped: set[int] = set()
        self._lock = threading.Lock()

    def prepare(self, longest_bytes: int, register: Any) -> None:
        """Memory of zeros to send from, as long as the longest buffer."""
        if "zero" in (self._kind, *self._rooms.values()):
            self._zeros = np.zeros(longest_bytes, dtype=np.uint8)
            register([(int(self._zeros.ctypes.data), longest_bytes)])

    def apply(self, kind: TransferKind, segments: Segments, room: int, page_bytes: int) -> Segments:
        """The segments that are sent instead."""
        fault = self._rooms.get(room, self._kind)
        if fault is None or kind is not TransferKind.KV or len(segments) == 0:
            return segments
        if fault == "zero":
            source = np.full_like(segments.source, int(self._zeros.ctypes.data))
            return Segments(source, segments.destination, segments.length)
        with self._lock:
            if room in self._dropped:
                return segments
            self._dropped.add(room)
        # The first page of the first segment: a page of one layer's K.
        step = np.uint64(min(page_bytes, int(segments.length[0])))
        source, destination, length = (
            column.copy() for column in (segments.source, segments.destination, segments.length)
        )
        source[0] += step
        destination[0] += step
        length[0] -= step
        full = length > 0
        return Segments(source[full], destination[full], length[full])


def compare(sent: Sequence[Mapping[str, Any]], landed: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """By room: "equal", what differs first, or which side has no row. With one source a room."""
    by_room = {int(row["room"]): row for row in sent}
    verdicts = dict.fromkeys(by_room, "no row of what landed")
    for row in landed:
        room = int(row["room"])
        other = by_room.get(room)
        if other is None:
            verdicts[room] = "no row of what was sent"
            continue
        wrong = [name for name in ("pages", "kv", "state", "aux") if row[name] != other[name]]
        verdicts[room] = f"{', '.join(wrong)} differ" if wrong else "equal"
    return verdicts


def read_rows(directory: Path, side: str) -> list[dict[str, Any]]:
    """All rows of one side under a directory."""
    rows = [
        json.loads(line)
        for path in sorted(directory.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [row for row in rows if row["side"] == side]
