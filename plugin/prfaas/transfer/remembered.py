"""The last entries of many, in memory that doesn't grow once it has been filled."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Remembered(Generic[Key, Value]):
    """At most `most` entries, and never fewer than the last `most // 2`.

    Two generations: when the younger one is full, the elder one goes whole. A table from which the oldest is
    taken for each new one is made anew, larger, every so many entries: that of 8,192 took 0.6 MiB at once
    beside the one before, which a process that never rests doesn't get back.
    """

    def __init__(self, most: int) -> None:
        if most < 2:
            raise ValueError(f"at least two are remembered, not {most}")
        self._half = most // 2
        self._young: dict[Key, Value] = {}
        self._old: dict[Key, Value] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def __contains__(self, key: Key) -> bool:
        return key in self._young or key in self._old

    def get(self, key: Key) -> Value | None:
        found = self._young.get(key)
        return found if found is not None else self._old.get(key)

    def put(self, key: Key, value: Value) -> None:
        """One that is known already is the newest now."""
        self._old.pop(key, None)
        self._young[key] = value
        if len(self._young) >= self._half:
            self._old, self._young = self._young, {}
