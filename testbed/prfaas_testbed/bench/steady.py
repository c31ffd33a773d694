"""What an engine carries while there is always more to send: the goodput of every engine over a link.

On an operator's link transfers wait for one another, and what counts is what it carries meanwhile. iperf3
answers just that: its first seconds are left out, and so is what is on its way when its time is up. Other
engines are asked the same. They get more than goes in the time, and what lies in the receiver's pages is
counted when the same first seconds are over and when the time is up: in the pages themselves, whatever an
engine says of it, with the queue not empty at either moment. From the first call to the last byte is a figure
of its own (`whole`), in which the ways there and back and the last stream's end count; what one transfer
takes is measured in latency.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.layout import Layout
from prfaas_testbed.bench.worker import Worker

K_BEYOND_S = 0.5
"""Of the link, handed over beyond the time that counts: enough to keep the queue full while the pages are
counted. What is handed over beyond is waited for, in each repetition.
"""


@dataclass(frozen=True)
class Span:
    """The time that counts, in seconds from the first call."""

    warm_s: float
    """Left out."""
    seconds: float

    @property
    def end_s(self) -> float:
        return self.warm_s + self.seconds


@dataclass(frozen=True)
class Counted:
    """Bytes in the receiver's pages at the span's beginning and end, which are on CLOCK_MONOTONIC."""

    began_s: float
    began_bytes: int
    ended_s: float
    ended_bytes: int

    @property
    def mbps(self) -> float:
        return (self.ended_bytes - self.began_bytes) * 8e-6 / (self.ended_s - self.began_s)


class Move(Protocol):
    """Moves bytes from the first page on until so many are sent or the time is up, and calls `meanwhile` once
    it has begun; what it did (bytes, began_s, ended_s at least).
    """

    def __call__(
        self, *, total_bytes: int, limit_s: float, meanwhile: Callable[[], None] | None = None
    ) -> dict[str, Any]: ...


def span_of(cell: Cell, layout: Layout, limit_s: float) -> Span | None:
    """None without a link, and where one is so fast that pages would be written again within the time, and
    what landed couldn't be told from what had. Pure.
    """
    if cell.ceiling_mbps is None:
        return None
    span = Span(cell.warm_s, cell.steady_s(limit_s))
    fits = cell.ceiling_mbps * 1e6 / 8 * span.end_s <= layout.total_bytes
    return span if fits else None


def bytes_for(cell: Cell, seconds: float, most_bytes: int) -> int:
    """What a link can't have carried after so long, nor for K_BEYOND_S more. Pure."""
    if cell.ceiling_mbps is None:
        return most_bytes
    return min(most_bytes, int(cell.ceiling_mbps * 1e6 / 8 * (seconds + cell.rtt_s + K_BEYOND_S)))


def move_and_count(
    move: Move, ends: Mapping[str, Worker], cell: Cell, layout: Layout, value: int, limit_s: float
) -> tuple[dict[str, Any], Counted | None]:
    """One repetition of an engine whose sender's pages hold `value`, the receiver's don't; what it did, and
    what was counted unless it was done before the time was up. Raises WorkerError.
    """
    span = span_of(cell, layout, limit_s)
    if span is None:
        return move(total_bytes=cell.total_bytes, limit_s=limit_s), None
    counts: list[tuple[float, int]] = []

    def count() -> None:
        began_s = time.perf_counter()
        for at_s in (span.warm_s, span.end_s):
            if ends["sender"].has_answered(began_s + at_s - time.perf_counter()):
                return
            now_s, landed_bytes = ends["receiver"].call(
                "count", offsets=layout.offsets, segment_bytes=layout.segment_bytes, value=value
            )
            counts.append((now_s, landed_bytes))

    enough_bytes = bytes_for(cell, span.end_s, layout.total_bytes)
    moved = move(total_bytes=enough_bytes, limit_s=span.end_s, meanwhile=count)
    if len(counts) < 2 or counts[1][0] > moved["ended_s"]:
        return moved, None
    return moved, Counted(*counts[0], *counts[1])


def columns(moved_bytes: int, seconds: float, counted: Counted | None) -> dict[str, Any]:
    """`goodput_mbps` of a sample, and what it was taken over. Pure."""
    whole = moved_bytes * 8e-6 / seconds
    if counted is None:
        return {"goodput_mbps": whole, "over": "whole"}
    return {
        "goodput_mbps": counted.mbps,
        "over": "steady",
        "steady_bytes": counted.ended_bytes - counted.began_bytes,
        "steady_s": round(counted.ended_s - counted.began_s, 6),
        "whole_mbps": round(whole, 3),
    }
