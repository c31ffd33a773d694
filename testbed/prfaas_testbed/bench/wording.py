"""Figures and tables as a page has them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prfaas_testbed.bench.harness import Row, median


def is_wan(row: Row) -> bool:
    return row["rtt_ms"] is not None


def cpu_value(samples: Iterable[Row], cell: str, engine: str, streams: int | None = None) -> float | None:
    found = [
        one["cpu_s_per_gb"]
        for one in samples
        if one["cell"] == cell
        and one["engine"] == engine
        and one.get("cpu_s_per_gb") is not None
        and (streams is None or one["streams"] == streams)
    ]
    return median(found) if found else None


def cpu(samples: Iterable[Row], cell: str, engine: str, streams: int | None = None) -> str:
    return number(cpu_value(samples, cell, engine, streams), 2)


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "-"


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
