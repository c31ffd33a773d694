"""SGLang's own methods as a planner: they work out which bytes go where, an engine that only writes down
hears it.

Mooncake's manager maps ranks, layers, slices for unequal tensor parallelism and every kind of state to lists
of (source, destination, length), and hands them to its engine. Ours records them, so that the mapping stays
SGLang's and follows its changes, while sending is ours: asynchronous, with leases, KV beside state beside
auxiliary data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prfaas.pump_client import PumpClient

U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Segments:
    """Scattered bytes: where they are, where they go, how long each piece is. Arrays of one length."""

    source: U64
    destination: U64
    length: U64

    @property
    def total_bytes(self) -> int:
        return int(self.length.sum())

    def some(self, rows: NDArray[np.bool_]) -> Segments:
        """Those of them."""
        return Segments(self.source[rows], self.destination[rows], self.length[rows])

    def __len__(self) -> int:
        return int(self.length.size)


def joined(parts: Sequence[Segments]) -> Segments:
    """One after the other."""
    if not parts:
        empty = np.empty(0, dtype=np.uint64)
        return Segments(empty, empty, empty)
    columns = ("source", "destination", "length")
    return Segments(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))


class Column(np.ndarray[Any, np.dtype[np.int64]]):
    """Numbers that stay an array where SGLang's mapping makes a list of them.

    With unequal tensor parallelism that is a number for each token, layer, K and V, and lists of them keep
    the server's interpreter busy for longer than both pumps are with the bytes.
    """

    def tolist(self) -> Any:
        return self

    def __bool__(self) -> bool:
        """As a list's."""
        return self.size > 0


def as_column(values: Sequence[int] | NDArray[Any]) -> U64:
    """As they are; what is one number many times isn't looked at one by one."""
    n = len(values)
    if isinstance(values, list) and n > 1 and values[0] == values[-1] and values.count(values[0]) == n:
        return np.full(n, values[0], dtype=np.uint64)
    return np.asarray(values).astype(np.uint64).view(np.ndarray)


class Recorder:
    """Segments that one thread's plan comes to, in order."""

    def __init__(self) -> None:
        self._source: list[U64] = []
        self._destination: list[U64] = []
        self._length: list[U64] = []

    def add(self, source: Sequence[int], destination: Sequence[int], length: Sequence[int]) -> None:
        for column, values in (
            (self._source, source),
            (self._destination, destination),
            (self._length, length),
        ):
            column.append(as_column(values))

    def segments(self) -> Segments:
        """All of it, pieces of no length left out."""
        if not self._source:
            empty = np.empty(0, dtype=np.uint64)
            return Segments(empty, empty, empty)
        source, destination, length = (
            np.concatenate(column) for column in (self._source, self._destination, self._length)
        )
        segments, full = Segments(source, destination, length), length > 0
        return segments if full.all() else segments.some(full)


class RecordingEngine:
    """What Mooncake's manager takes for its engine: registration is passed on, transfers are written down."""

    def __init__(self, pump: PumpClient, session_id: str) -> None:
        self._pump, self._session_id = pump, session_id
        self._here = threading.local()

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Everything this thread asks to transfer inside goes into the recorder."""
        recorder = Recorder()
        self._here.recorder = recorder
        try:
            yield recorder
        finally:
            self._here.recorder = None

    def batch_register(self, ptrs: Sequence[int], lengths: Sequence[int]) -> int:
        self._pump.register(list(zip(ptrs, lengths, strict=True)))
        return 0

    def batch_deregister(self, ptrs: Sequence[int]) -> int:
        self._pump.deregister(list(ptrs))
        return 0

    def batch_transfer_sync(
        self, session_id: str, source: Sequence[int], destination: Sequence[int], length: Sequence[int]
    ) -> int:
        recorder: Recorder | None = getattr(self._here, "recorder", None)
        if recorder is None:
            raise RuntimeError("a transfer outside of a plan: this path of SGLang's isn't one prfaas knows")
        recorder.add(source, destination, length)
        return 0

    def get_session_id(self) -> str:
        return self._session_id

    def send_probe(self, session_id: str) -> int:
        return 0


class InlineExecutor:
    """An executor that runs a task where it is submitted: recording is by thread."""

    def submit(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        pass


def page_pieces(
    pointers: Sequence[int], item_lengths: Sequence[int], indices: Sequence[int] | NDArray[Any]
) -> U64:
    """Rows (address, length) of the items `indices` of every buffer, neighbours joined. [runs x buffers,
    2].
    """
    items = np.unique(np.asarray(indices, dtype=np.int64))
    if items.size == 0 or not len(pointers):
        return np.empty((0, 2), dtype=np.uint64)
    first = np.flatnonzero(np.concatenate(([True], np.diff(items) != 1)))
    starts = items[first].astype(np.uint64)
    counts = np.diff(np.append(first, items.size)).astype(np.uint64)
    rows = [
        np.stack((np.uint64(pointer) + starts * np.uint64(size), counts * np.uint64(size)), axis=1)
        for pointer, size in zip(pointers, item_lengths, strict=True)
        if size > 0
    ]
    return np.concatenate(rows) if rows else np.empty((0, 2), dtype=np.uint64)
