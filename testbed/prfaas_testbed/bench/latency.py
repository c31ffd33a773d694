"""Time from the last byte ready to success at the receiver, on a link that has rested or hasn't."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from prfaas_testbed.bench import checks
from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.engines.prfaas import Prfaas
from prfaas_testbed.bench.harness import Progress, Row, median
from prfaas_testbed.bench.places import Place

K_REST_S = 2.0


def ideal_s(size_bytes: int, cell: Cell) -> float:
    """One round trip and the bytes' own time on the link. Pure."""
    return cell.rtt_s + size_bytes * 8 / ((cell.ceiling_mbps or float("inf")) * 1e6)


def measure(
    place: Place, cell: Cell, sizes_bytes: Sequence[int], repetitions: int, progress: Progress,
    keep: Callable[[list[Row]], None],
) -> list[Row]:  # fmt: skip
    """A row for each size, warm (at once after another) and rested. `keep` gets them as they come."""
    rows: list[Row] = []
    pool = max(sizes_bytes)
    with Prfaas() as engine:
        engine.start(place, cell.with_(total_bytes=max(pool, cell.total_bytes), contiguous=True))
        for rest_s in (0.0, K_REST_S):
            for size_bytes in sizes_bytes:
                found: list[dict[str, Any]] = []
                for _ in range(repetitions):
                    engine.deliver(size_bytes)
                    time.sleep(rest_s)
                    found.append(engine.deliver(size_bytes))
                rows.append(
                    {
                        "size_bytes": size_bytes,
                        "rest_s": rest_s,
                        "rtt_ms": cell.rtt_ms,
                        "rate_mbps": cell.rate_mbps,
                        "ideal_s": ideal_s(size_bytes, cell),
                        "receiver_s": [one["receiver_s"] for one in found],
                        "sender_s": [one["sender_s"] for one in found],
                    }
                )
                keep(rows)
                progress(f"latency of {size_bytes / 1e6:g} MB after {rest_s:g} s: {rows[-1]['sender_s']}")
    return rows


def judge(rows: Sequence[Row]) -> list[Row]:
    return [
        checks.at_most(
            f"latency/{row['size_bytes'] // 1_000_000}MB-{'rested' if row['rest_s'] else 'warm'}/to_ideal",
            median(row["sender_s"]) / row["ideal_s"],
            checks.K_COMPLETION,
        )
        for row in rows
    ]
