"""Who sends next among many, by order.py's shares, without going through all of them for every block.

The three parts of the rate are three accounts: at every block each is credited its part, and the one with the
most pays for it. K_DEADLINE's block goes to the earliest deadline, K_SHORTEST's to the fewest bytes left,
K_EQUAL's to whoever has had the fewest bytes of that account. So each transfer's bytes follow its share
within a block or two of each account. Every order is a heap whose entries are dropped when they come up and
don't hold any more.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from prfaas.transfer.order import K_DEADLINE, K_EQUAL, K_SHORTEST

Key = TypeVar("Key", bound=Hashable)
PARTS = (K_DEADLINE, K_SHORTEST, K_EQUAL)
DEADLINE, SHORTEST, EQUAL = range(3)
K_STALE_MOST = 64
"""A heap is made anew when it holds so many entries more than twice what stands in line."""


@dataclass(slots=True)
class _Place:
    serial: int
    deadline_s: float
    remaining_bytes: int
    served_bytes: int


class Line(Generic[Key]):
    """Transfers that can send now. Times are on the caller's monotonic clock, passed in as `now`."""

    def __init__(self) -> None:
        self._places: dict[Key, _Place] = {}
        self._served: dict[Key, int] = {}
        self._serial = 0
        self._owed = [0.0, 0.0, 0.0]
        self._drawn: tuple[Key | None, int] = (None, EQUAL)
        self._earliest: list[tuple[float, int, Key]] = []
        self._passed: list[tuple[float, int, Key]] = []
        self._shortest: list[tuple[int, int, Key]] = []
        self._least: list[tuple[int, int, Key]] = []
        self._fair_bytes = 0.0
        """What one that had stood in line from the start would have had of K_EQUAL: newcomers begin there."""

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def join(self, key: Key, remaining_bytes: int, deadline_s: float) -> None:
        """It can send so many bytes. One that stands in line keeps its place, with these."""
        place = self._places.get(key)
        if place is None:
            self._serial += 1
            served = max(self._served.pop(key, 0), int(self._fair_bytes))
            self._places[key] = place = _Place(self._serial, deadline_s, 0, served)
            heapq.heappush(self._earliest, (deadline_s, place.serial, key))
            heapq.heappush(self._least, (place.served_bytes, place.serial, key))
        if place.remaining_bytes != remaining_bytes:
            place.remaining_bytes = remaining_bytes
            heapq.heappush(self._shortest, (remaining_bytes, place.serial, key))
        self._tidy()

    def leave(self, key: Key, *, for_good: bool = False) -> None:
        """It can't send for now; what it has had isn't forgotten, unless it goes `for_good`."""
        place = self._places.pop(key, None)
        if for_good:
            self._served.pop(key, None)
        elif place is not None:
            self._served[key] = place.served_bytes

    def next(self, now: float, block_bytes: int) -> Key | None:
        """Whose block goes next. Tell `sent` how many bytes it was."""
        if len(self._places) < 2:
            return next(iter(self._places), None)
        owed = [debt + part * block_bytes for debt, part in zip(self._owed, PARTS, strict=True)]
        account = owed.index(max(owed))
        key = (self._urgent(now), self._short(), self._poorest())[account]
        self._drawn = (key, account)
        return key

    def sent(self, key: Key, sent_bytes: int) -> None:
        """A block of it left. It leaves the line with its last byte."""
        place = self._places[key]
        if len(self._places) > 1:
            account = self._drawn[1] if self._drawn[0] == key else EQUAL
            for i, part in enumerate(PARTS):
                self._owed[i] += part * sent_bytes
            self._owed[account] -= sent_bytes
            if account == EQUAL:
                self._fair_bytes += sent_bytes / len(self._places)
                place.served_bytes += sent_bytes
                heapq.heappush(self._least, (place.served_bytes, place.serial, key))
        self._drawn = (None, EQUAL)
        place.remaining_bytes -= sent_bytes
        if place.remaining_bytes <= 0:
            del self._places[key]
        else:
            heapq.heappush(self._shortest, (place.remaining_bytes, place.serial, key))
            self._tidy()

    def _urgent(self, now: float) -> Key:
        heap = self._earliest
        while heap:
            deadline_s, serial, key = heap[0]
            if self._stands(key, serial) and deadline_s > now:
                return key
            # One that has passed can't be met any more and counts as the latest.
            entry = heapq.heappop(heap)
            if self._stands(key, serial):
                heapq.heappush(self._passed, entry)
        while not self._stands(self._passed[0][2], self._passed[0][1]):
            heapq.heappop(self._passed)
        return self._passed[0][2]

    def _short(self) -> Key:
        while True:
            remaining_bytes, serial, key = self._shortest[0]
            if self._stands(key, serial) and self._places[key].remaining_bytes == remaining_bytes:
                return key
            heapq.heappop(self._shortest)

    def _poorest(self) -> Key:
        while True:
            served_bytes, serial, key = self._least[0]
            if self._stands(key, serial) and self._places[key].served_bytes == served_bytes:
                return key
            heapq.heappop(self._least)

    def _stands(self, key: Key, serial: int) -> bool:
        place = self._places.get(key)
        return place is not None and place.serial == serial

    def _tidy(self) -> None:
        most = 2 * len(self._places) + K_STALE_MOST
        standing = self._places.items()
        if len(self._shortest) > most:
            self._shortest = [(p.remaining_bytes, p.serial, key) for key, p in standing]
            heapq.heapify(self._shortest)
        if len(self._least) > most:
            self._least = [(p.served_bytes, p.serial, key) for key, p in standing]
            heapq.heapify(self._least)
        if len(self._earliest) + len(self._passed) > most:
            self._earliest, self._passed = [(p.deadline_s, p.serial, key) for key, p in standing], []
            heapq.heapify(self._earliest)
