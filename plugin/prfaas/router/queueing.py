"""What this router has in prefill at one server, in seconds by prediction; pure.

A server takes what it has in some order, one step at a time. Whichever it works on, it has been at it since
it last finished something, or since that came: so much of what is predicted is done, never more than the
longest of them, for a prediction may be short.
"""

from __future__ import annotations


class PrefillQueue:
    """`now` never goes back."""

    def __init__(self) -> None:
        self._jobs: dict[int, float] = {}
        self._serial = 0
        self._total_s = 0.0
        self._since_s = 0.0
        """When the server began to work on what it has."""

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, prefill_s: float, now: float) -> int:
        """One more of `prefill_s` seconds; a key for `remove`."""
        if not self._jobs:
            self._since_s, self._total_s = now, 0.0
        self._serial += 1
        self._jobs[self._serial] = prefill_s
        self._total_s += prefill_s
        return self._serial

    def remove(self, key: int, now: float) -> None:
        """It is through, or given up. Harmless when it isn't here."""
        prefill_s = self._jobs.pop(key, None)
        if prefill_s is not None:
            self._total_s -= prefill_s
            self._since_s = now

    def backlog_s(self, now: float) -> float:
        """Seconds of prefill that are left, by prediction."""
        if not self._jobs:
            return 0.0
        done_s = min(max(0.0, now - self._since_s), max(self._jobs.values()))
        return max(0.0, self._total_s - done_s)
