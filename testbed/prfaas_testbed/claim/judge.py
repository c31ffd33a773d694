"""What a piece is, what its goals are, and means with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
# Student's t, two-sided 95%, by degrees of freedom 1 to 10; beyond, the normal's.
K_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
K_T_MANY = 2.0


@dataclass(frozen=True)
class Goal:
    """One goal, stated, and whether it was reached."""

    text: str
    found: str
    reached: bool
    why: str = ""
    """Where it was missed: what stood in the way, as far as known."""


@dataclass(frozen=True)
class Piece:
    """One part of the claim: it measures, judges, draws and tells by its record alone."""

    name: str
    title: str
    measure: Callable[[int, Callable[[str], None]], dict[str, Any]]
    """(repetitions, where progress is said) to the record's own fields, `rows` among them."""
    goals: Callable[[dict[str, Any]], list[Goal]]
    draw: Callable[[dict[str, Any], Path], list[str]]
    """Writes figures into a folder; the PNGs' names."""
    tell: Callable[[dict[str, Any]], str]
    """Markdown: tables and what they mean."""
    gather: Callable[[Sequence[Path], Callable[[str], None]], dict[str, Any]] | None = None
    """Of a piece that runs on the testbed: from the folders of its runs to the record's own fields."""
    world: str = "simulator"
    """Where `measure` runs."""
    measure_some: Callable[[int, Callable[[str], None], Collection[str]], dict[str, Any]] | None = None
    """As `measure`, of these parts alone, where a piece's rows say of which part they are. Raises UsageError
    for a part that isn't one."""
    further: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    """Of a piece whose runs are repetitions: (a record, runs gathered since) to the two as one."""
    resimulated: Callable[[dict[str, Any], Callable[[str], None]], dict[str, Any]] | None = None
    """Of a piece that holds runs against the simulator: the record with what the simulator says now."""


@dataclass(frozen=True)
class Mean:
    """A mean over repetitions with half the width of its 95% interval (0 where there is one value)."""

    value: float
    half: float
    count: int

    def text(self, digits: int = 2, percent: bool = False) -> str:
        if math.isnan(self.value):
            return "–"
        scale = 100.0 if percent else 1.0
        shown = f"{self.value * scale:.{digits}f}"
        if self.count > 1:
            shown += f" ± {self.half * scale:.{digits}f}"
        return shown + (" %" if percent else "")


def mean(values: Iterable[float | None]) -> Mean:
    """Of what is known among the values."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return Mean(math.nan, 0.0, 0)
    if len(known) == 1:
        return Mean(known[0], 0.0, 1)
    freedom = len(known) - 1
    factor = K_T[freedom - 1] if freedom <= len(K_T) else K_T_MANY
    return Mean(
        float(np.mean(known)), factor * float(np.std(known, ddof=1)) / math.sqrt(len(known)), len(known)
    )


def column(rows: Rows, name: str, **wanted: object) -> list[Any]:
    """A figure of the rows that have these values, in order of repetition."""
    chosen = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return [row[name] for row in sorted(chosen, key=lambda row: row["repetition"])]


def ratios(above: Sequence[float], below: Sequence[float]) -> Mean:
    """Of pairs, repetition by repetition: both saw the same requests."""
    return mean(a / b if b else math.nan for a, b in zip(above, below, strict=True))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column is text, the others figures."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
