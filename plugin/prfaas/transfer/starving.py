"""For how long a sender had nothing to send: what it delivered meanwhile says nothing against the link."""

from __future__ import annotations


class Starving:
    """Counts the seconds without anything to send. `now` may repeat; it doesn't go back."""

    def __init__(self, now: float) -> None:
        self._since_s: float | None = now
        self._taken_s = now
        self._before_s = 0.0

    def look(self, has_work: bool, now: float, lasts_s: float = 0.0) -> None:
        """Whether there is something to send now. Without it, what was handed over lasts for `lasts_s` yet,
        as seen when the last of it was handed over.
        """
        if has_work:
            if self._since_s is not None:
                self._before_s += max(0.0, now - max(self._since_s, self._taken_s))
                self._since_s = None
        elif self._since_s is None:
            self._since_s = now + lasts_s

    @property
    def starved(self) -> bool:
        return self._since_s is not None

    def take_s(self, now: float) -> float:
        """Seconds without work since this was last asked."""
        seconds, self._before_s = self._before_s, 0.0
        if self._since_s is not None:
            seconds += max(0.0, now - max(self._since_s, self._taken_s))
        self._taken_s = now
        return seconds
