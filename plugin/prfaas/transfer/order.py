"""Order of sending: which transfer's bytes leave next. One object, drawn from by the pump, integrated by the
simulator.

Of the link's rate, three parts are given at every instant among the transfers that can send:
  K_DEADLINE   to the earliest deadline (EDF: misses none while all can be met);
  K_SHORTEST   to the fewest bytes left (SRPT: small never waits for large);
  K_EQUAL      to all in equal parts (so none starves: each of n gets at least K_EQUAL / n).
A transfer may hold more than one part; one alone holds all. Ties go to the one that came first. `shares` says
the parts; `draw` hands out blocks so that bytes drawn follow them within one block (deficit counters, as in
deficit round robin). The pump draws by line.py, which gives the same parts without going through all.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from prfaas.model.errors import LocalProtocolError

K_DEADLINE = 0.6
K_SHORTEST = 0.2
K_EQUAL = 0.2

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class _Entry:
    remaining_bytes: int
    deadline_s: float
    serial: int
    owed_bytes: float = 0.0


class SendOrder(Generic[Key]):
    """Transfers under way on one link. Times are on the caller's monotonic clock, passed in as `now`."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._serial = 0
        self._backlog_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    @property
    def backlog_bytes(self) -> int:
        return self._backlog_bytes

    def add(self, key: Key, remaining_bytes: int, deadline_s: float) -> None:
        """A transfer with bytes to send. Raises LocalProtocolError if it is already there or has none."""
        if key in self._entries or remaining_bytes <= 0:
            raise LocalProtocolError(f"transfer {key!r} with {remaining_bytes} bytes can't join the order")
        self._serial += 1
        self._entries[key] = _Entry(remaining_bytes, deadline_s, self._serial)
        self._backlog_bytes += remaining_bytes

    def remove(self, key: Key) -> None:
        """Forget it, sent or not; unknown ones are ignored."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._backlog_bytes -= entry.remaining_bytes
            if entry.owed_bytes:
                self._forgive(entry.owed_bytes)

    def add_bytes(self, key: Key, more_bytes: int) -> None:
        """Bytes to send again (lost with a stream, or refused as corrupt)."""
        self._entries[key].remaining_bytes += more_bytes
        self._backlog_bytes += more_bytes

    def remaining_bytes(self, key: Key) -> int:
        return self._entries[key].remaining_bytes

    def shares(self, now: float, eligible: Collection[Key] | None = None) -> dict[Key, float]:
        """Each transfer's part of the rate at `now`, adding up to 1 (or to nothing, without transfers).

        `eligible` names those that can send (they hold credit and bytes); the others get none. A deadline
        that has passed can't be met any more and counts as the latest.
        """
        entries = self._among(eligible)
        if not entries:
            return {}
        if len(entries) == 1:
            return {entries[0][0]: 1.0}
        equal = K_EQUAL / len(entries)
        result = {key: equal for key, _ in entries}
        result[self._urgent(entries, now)] += K_DEADLINE
        result[self._short(entries)] += K_SHORTEST
        return result

    def draw(self, now: float, block_bytes: int, eligible: Collection[Key] | None = None) -> Key | None:
        """The transfer whose block goes next; None if none can send. Tell `sent` how many bytes it was."""
        shares = self.shares(now, eligible)
        if not shares:
            return None
        # Who is owed most, counting what this block's time brings each. Serial order breaks ties.
        entries = self._entries
        return max(
            shares, key=lambda k: (entries[k].owed_bytes + shares[k] * block_bytes, -entries[k].serial)
        )

    def sent(self, now: float, key: Key, sent_bytes: int, eligible: Collection[Key] | None = None) -> None:
        """`sent_bytes` of `key` left. The debts move by the shares that held; the last byte ends its place
        here.
        """
        entries = self._entries
        entry = entries[key]
        if eligible is None or len(eligible) != 1 or key not in eligible:  # one alone is owed what it gets
            for other, share in self.shares(now, eligible).items():
                entries[other].owed_bytes += share * sent_bytes
            entry.owed_bytes -= sent_bytes
        entry.remaining_bytes = left = entry.remaining_bytes - sent_bytes
        self._backlog_bytes -= sent_bytes
        if left <= 0:
            self._backlog_bytes -= left
            del entries[key]
            if entry.owed_bytes:
                self._forgive(entry.owed_bytes)

    def _forgive(self, owed_bytes: float) -> None:
        """What one that leaves owed or was owed is spread over the rest, so that debts always add up to
        nothing.
        """
        if self._entries:
            part = owed_bytes / len(self._entries)
            for entry in self._entries.values():
                entry.owed_bytes += part

    def _among(self, eligible: Iterable[Key] | None) -> list[tuple[Key, _Entry]]:
        if eligible is None:
            return list(self._entries.items())
        return [(key, self._entries[key]) for key in eligible if key in self._entries]

    @staticmethod
    def _urgent(entries: list[tuple[Key, _Entry]], now: float) -> Key:
        return min(entries, key=lambda item: (item[1].deadline_s <= now, item[1].deadline_s, item[1].serial))[
            0
        ]

    @staticmethod
    def _short(entries: list[tuple[Key, _Entry]]) -> Key:
        return min(entries, key=lambda item: (item[1].remaining_bytes, item[1].serial))[0]
