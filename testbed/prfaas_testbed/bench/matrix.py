"""The whole WAN matrix, each cell once, in pieces if need be: the record is written after every cell, and who
goes on measures what it lacks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from prfaas_testbed.bench import checks
from prfaas_testbed.bench.cell import K_BBR_CYCLE_S, Cell
from prfaas_testbed.bench.harness import Progress, Row, engines_for, measure_cell
from prfaas_testbed.bench.places import emulated
from prfaas_testbed.bench.record import Record

K_PEERS = ("iperf3", "mooncake")
K_STREAMS = (1, 16, 32)
"""Of iperf3 in cells that are measured once: the ends and the middle of what wins anywhere in the named
cells.
"""


def left(rows: Sequence[Row], cells: Sequence[Cell]) -> list[Cell]:
    """Those of which not every engine has a figure yet. Pure."""
    wanted = len(K_STREAMS) + len(K_PEERS)
    measured: dict[str, int] = {}
    for row in rows:
        measured[row["cell"]] = measured.get(row["cell"], 0) + bool(row["goodput_mbps"] or row["errors"])
    return [cell for cell in cells if measured.get(cell.label(), 0) < wanted]


def measure(
    record: Record, cells: Sequence[Cell], workdir: Path, *, limit_s: float, for_s: float | None,
    progress: Progress,
) -> list[Cell]:  # fmt: skip
    """Measures what the record lacks of the cells; no other is begun after `for_s`. What it lacks still.
    Raises MachineError.
    """
    todo = left(record.rows, cells)
    if not todo:
        return []
    with emulated(todo[0], workdir, progress) as place:
        record.add_place(place.describe())
        end_s = math.inf if for_s is None else time.monotonic() + for_s
        for number, cell in enumerate(todo):
            if time.monotonic() >= end_s:
                return todo[number:]
            place.shape(cell)
            least_s = K_BBR_CYCLE_S if cell.congestion_control == "bbr" else 0.0
            rows = measure_cell(
                place, cell, engines_for(cell, K_PEERS, K_STREAMS), repetitions=1,
                limit_s=max(limit_s, least_s), progress=progress,
            )  # fmt: skip
            record.replace(rows)
            record.judged(checks.judge_wan(rows))
            record.write()
    return []
