"""Python's search for cycles, held back while a simulation runs.

A world is tens of thousands of objects that live as long as it does, and a request a dozen that go by
themselves at its end (World takes the cycles apart). Searching all of them again and again takes a seventh of
the time and finds nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

K_THRESHOLDS = (100_000, 20, 20)  # new objects, and searches of the young before one of the older


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Within, the search is rare and leaves what was there before alone. May be nested."""
    before = gc.get_threshold()
    frozen_before = gc.get_freeze_count()
    gc.set_threshold(*K_THRESHOLDS)
    gc.freeze()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen_before:
            gc.unfreeze()
