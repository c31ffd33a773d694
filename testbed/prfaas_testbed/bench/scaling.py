"""How goodput grows with pumps: one pair of them on one core, then two pairs on a core each, side by side."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.engines.prfaas import Prfaas
from prfaas_testbed.bench.harness import Progress, Row, median
from prfaas_testbed.bench.places import Loopback

K_CELL = Cell(total_bytes=256 << 20, name="scaling")


def measure(workdir: Path, seconds: float, repetitions: int, progress: Progress) -> Row:
    """Goodput (Mbit/s) of one pair and of two together, in turns. On one core alone: empty."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    found: Row = {"one_pair_mbps": [], "two_pairs_mbps": [], "gain": None}
    if len(cores) < 2:
        return found
    with ExitStack() as stack, ThreadPoolExecutor(len(cores)) as threads:
        pairs = []
        for core in cores:
            folder = workdir / f"core-{core}"
            folder.mkdir()
            pairs.append(stack.enter_context(Prfaas(pump_prefix=("taskset", "-c", str(core)))))
            pairs[-1].start(Loopback(folder), K_CELL)
        for _ in range(repetitions):
            found["one_pair_mbps"].append(_goodput(pairs[0], seconds))
            found["two_pairs_mbps"].append(sum(threads.map(lambda pair: _goodput(pair, seconds), pairs)))
    found["gain"] = median([two / one for one, two in zip(*list(found.values())[:2], strict=True)])
    progress(f"two pairs of pumps on a core each carry {found['gain']:.2f} times what one does")
    return found


def _goodput(pair: Prfaas, seconds: float) -> float:
    moved = pair.move(total_bytes=1 << 40, limit_s=seconds)
    return float(moved["bytes"] * 8e-6 / (moved["ended_s"] - moved["began_s"]))
