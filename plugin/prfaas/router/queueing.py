"""What this router has in prefill at one server, in seconds by prediction; pure.

A server takes what it has in some order, one step at a time. Whichever it works on, it has been at it since
it last finished something, or since that came: so much of what is predicted is done, never more than the
longest of them, for a prediction may be short.
"""

from __future__ import annotations


class PrefillQueue:
    """`now` never goes back."""

    def __init__(self) -> None:
        self.jobs: dict[int, float] = {}
        """Seconds of each; to be looked at only."""
        self._serial = 0
        self._total_s = self._longest_s = 0.0
        self._since_s = 0.0
        """When the server began to work on what it has."""

    def __len__(self) -> int:
        return len(self.jobs)

    def add(self, prefill_s: float, now: float) -> int:
        """One more of `prefill_s` seconds; a key for `remove`."""
        if not self.jobs:
            self._since_s, self._total_s, self._longest_s = now, 0.0, 0.0
        self._serial += 1
        self.jobs[self._serial] = prefill_s
        self._total_s += prefill_s
        self._longest_s = max(self._longest_s, prefill_s)
        return self._serial

    def remove(self, key: int, now: float) -> None:
        """It is through, or given up. Harmless when it isn't here."""
        prefill_s = self.jobs.pop(key, None)
        if prefill_s is not None:
            self._total_s -= prefill_s
            self._since_s = now
            if prefill_s >= self._longest_s:
                self._longest_s = max(self.jobs.values(), default=0.0)

    def backlog_s(self, now: float) -> float:
        """Seconds of prefill that are left, by prediction."""
        if not self.jobs:
            return 0.0
        done_s = now - self._since_s
        if done_s > self._longest_s:
            done_s = self._longest_s
        left_s = self._total_s - done_s if done_s > 0.0 else self._total_s
        return left_s if left_s > 0.0 else 0.0
