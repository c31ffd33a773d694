"""What slices cost: with unequal tensor parallelism a rank sends, of each token, layer, K and V, some heads
alone, and they go between others' at the far end. Beside the same bytes in one piece, as equal ranks send
them.
"""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path

from prfaas_testbed.bench import checks
from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.engines.prfaas import Prfaas
from prfaas_testbed.bench.harness import Progress, Row, median
from prfaas_testbed.bench.places import Loopback

K_SLICE_BYTES = (64, 128, 256)
K_RANKS = 2
"""A token's slices, of which one is sent."""
K_TRANSFER_BYTES = 32 << 20
K_PAYLOAD_BYTES = 4 * K_TRANSFER_BYTES
"""Enough of them that the processor's ticks are small beside what is measured."""
K_WHOLE_BYTES = 1 << 20
"""A layer's keys of some thousand tokens, as equal ranks send them."""
K_WAYS = ("scattered", "gathered")
"""From one rank's memory to between other ranks' bytes; the reverse."""
K_MOST_TO_WHOLE = 2.0


def offsets(way: str, slice_bytes: int) -> tuple[list[int], list[int]]:
    """Of one transfer's pieces, at the sender and at the receiver; another way than K_WAYS: whole."""
    n = K_TRANSFER_BYTES // slice_bytes
    close = [slice_bytes * i for i in range(n)]
    apart = [K_RANKS * at for at in close]
    return {"scattered": (close, apart), "gathered": (apart, close)}.get(way, (close, close))


def measure(
    workdir: Path, repetitions: int, progress: Progress, payload_bytes: int = K_PAYLOAD_BYTES
) -> list[Row]:
    """Rows of a size and a way: `cpu_s_per_gb` of both pumps, `seconds_per_gb`; in turns."""
    pool_bytes = K_RANKS * K_TRANSFER_BYTES
    cell = Cell(segment_bytes=pool_bytes, total_bytes=pool_bytes, contiguous=True, name="slices")
    kinds = [(K_WHOLE_BYTES, "whole"), *itertools.product(K_SLICE_BYTES, K_WAYS)]
    rows: list[Row] = [
        {"slice_bytes": size, "way": way, "cpu_s_per_gb": [], "seconds_per_gb": []} for size, way in kinds
    ]
    with closing(Prfaas()) as engine:
        engine.start(Loopback(workdir), cell)
        for number in range(repetitions + 1):
            for row in rows:
                cpu_s, seconds = engine.move_slices(
                    *offsets(row["way"], row["slice_bytes"]), row["slice_bytes"], payload_bytes
                )
                if number:  # the first fills caches
                    row["cpu_s_per_gb"].append(cpu_s / payload_bytes * 1e9)
                    row["seconds_per_gb"].append(seconds / payload_bytes * 1e9)
    for (size, way), ratio in _ratios(rows).items():
        progress(f"slices of {size} bytes, {way}: {ratio:.2f} times the CPU of the same bytes whole")
    return rows


def judge(rows: list[Row]) -> list[Row]:
    return [
        checks.at_most(f"slices/{size}/{way}/cpu_to_whole", ratio, K_MOST_TO_WHOLE)
        for (size, way), ratio in _ratios(rows).items()
    ]


def _ratios(rows: list[Row]) -> dict[tuple[int, str], float]:
    cost = {(row["slice_bytes"], row["way"]): median(row["cpu_s_per_gb"]) for row in rows}
    whole = cost.pop((K_WHOLE_BYTES, "whole"))
    return {kind: value / whole for kind, value in cost.items()}
