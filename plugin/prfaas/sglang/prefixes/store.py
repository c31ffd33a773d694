"""Host memory that holds pages and states by their keys, the one that was longest unused being evicted first.

What came or was copied together is a *chunk*: it lies in one piece, and is evicted as one. No SGLang, no
clock: callers say what time it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prfaas.model.errors import LocalProtocolError
from prfaas.sglang.staging import Staging

Key = bytes
"""Of a page: of its tokens and of all before it. Of a state: its last page's."""


@dataclass(eq=False)
class Chunk:
    """Items of one pool, one after the other."""

    pool: str
    keys: tuple[Key, ...]
    address: int
    item_bytes: int
    kept_until_s: float = 0.0
    """Not evicted before: somebody was told that it is here, and will come for it."""
    readers: int = 0
    """Copies out of it that are under way."""

    @property
    def size_bytes(self) -> int:
        return len(self.keys) * self.item_bytes


@dataclass(frozen=True)
class Run:
    """Items `first` to `first + count` of those that were asked for, in one piece of memory."""

    first: int
    count: int
    address: int


class PrefixStore:
    """Its methods may be called from any thread."""

    def __init__(self, memory: Staging) -> None:
        self._memory = memory
        self._lock = threading.RLock()
        self._chunks: dict[int, Chunk] = {}
        """By address: what is held, the longest unused first."""
        self._where: dict[tuple[str, Key], tuple[Chunk, int]] = {}

    def room(self, pool: str, keys: Sequence[Key], item_bytes: int, now_s: float) -> Chunk | None:
        """Memory for these items, others being evicted for it; nobody finds it before `keep`. None: there is
        none, the items being larger than the store, or all in it kept or read."""
        chunk = Chunk(pool, tuple(keys), 0, item_bytes)
        with self._lock:
            try:
                while (address := self._memory.take(chunk.size_bytes)) is None:
                    if not self._evict_one(now_s):
                        return None
            except LocalProtocolError:
                return None
            chunk.address = address
        return chunk

    def _evict_one(self, now_s: float) -> bool:
        for chunk in self._chunks.values():
            if not chunk.readers and chunk.kept_until_s <= now_s:
                self._drop(chunk)
                return True
        return False

    def _drop(self, chunk: Chunk) -> None:
        del self._chunks[chunk.address]
        for key in chunk.keys:
            if self._where.get((chunk.pool, key), (None, 0))[0] is chunk:
                del self._where[chunk.pool, key]
        self._memory.give(chunk.address)

    def keep(self, chunk: Chunk, count: int | None = None) -> None:
        """Its first `count` items (all of them) are there, and are found from now on. What is held already
        stays as it is."""
        count = len(chunk.keys) if count is None else count
        with self._lock:
            new = [
                (at, key) for at, key in enumerate(chunk.keys[:count]) if (chunk.pool, key) not in self._where
            ]
            if not new:
                self._memory.give(chunk.address)
                return
            chunk.keys = chunk.keys[:count]
            self._chunks[chunk.address] = chunk
            for at, key in new:
                self._where[chunk.pool, key] = (chunk, at)

    def give_back(self, chunk: Chunk) -> None:
        """It was got by `room`, and isn't to be kept."""
        self._memory.give(chunk.address)

    def holds(self, pool: str, key: Key) -> bool:
        with self._lock:
            return (pool, key) in self._where

    def leading(self, pool: str, keys: Sequence[Key], keep_until_s: float = 0.0) -> int:
        """How many of the keys, from the first on, are held. They count as used, and stay until then."""
        with self._lock:
            found = 0
            used: dict[int, Chunk] = {}
            for key in keys:
                entry = self._where.get((pool, key))
                if entry is None:
                    break
                used[entry[0].address] = entry[0]
                found += 1
            # The beginning last: without it the rest is of no use, so that it goes last.
            for chunk in reversed(used.values()):
                chunk.kept_until_s = max(chunk.kept_until_s, keep_until_s)
                self._chunks[chunk.address] = self._chunks.pop(chunk.address)
        return found

    @contextmanager
    def reading(self, pool: str, keys: Sequence[Key]) -> Iterator[list[Run]]:
        """Where the items are, in as few pieces as they lie in; none is evicted inside. Raises KeyError, with
        the first that isn't held. Afterwards they aren't kept any more, however long they were to be.
        """
        with self._lock:
            entries = [self._where[pool, key] for key in keys]
            chunks = {entry[0].address: entry[0] for entry in entries}.values()
            for chunk in chunks:
                chunk.readers += 1
        try:
            yield _runs(entries)
        finally:
            with self._lock:
                for chunk in chunks:
                    chunk.readers -= 1
                    chunk.kept_until_s = 0.0

    def clear(self) -> None:
        """All goes but what is being read; that isn't found any more either, and goes when it is next in
        turn."""
        with self._lock:
            for chunk in list(self._chunks.values()):
                if not chunk.readers:
                    self._drop(chunk)
            self._where.clear()

    @property
    def held(self) -> dict[str, int]:
        """Items by pool."""
        with self._lock:
            found: dict[str, int] = {}
            for pool, _ in self._where:
                found[pool] = found.get(pool, 0) + 1
            return found


def _runs(entries: Sequence[tuple[Chunk, int]]) -> list[Run]:
    runs: list[Run] = []
    end = -1
    for i, (chunk, at) in enumerate(entries):
        address = chunk.address + at * chunk.item_bytes
        if address == end:
            runs[-1] = Run(runs[-1].first, runs[-1].count + 1, runs[-1].address)
        else:
            runs.append(Run(i, 1, address))
        end = address + chunk.item_bytes
    return runs
