"""Runs engines side by side over one cell: every repetition of one engine between repetitions of the others.

The machine's mood drifts, so repetitions are interleaved, engines take turns in a changing order, and what is
compared are figures of the same round. Nothing is averaged away: a row keeps every raw value.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psutil

from prfaas.model.errors import MachineError, UsageError
from prfaas_testbed.bench.cell import K_STREAMS_IPERF3, Cell
from prfaas_testbed.bench.engines.base import Engine
from prfaas_testbed.bench.engines.iperf3 import Iperf3
from prfaas_testbed.bench.engines.mooncake import Mooncake
from prfaas_testbed.bench.engines.nixl import Nixl
from prfaas_testbed.bench.engines.pools import PoolPeer
from prfaas_testbed.bench.engines.prfaas import Prfaas
from prfaas_testbed.bench.places import Place
from prfaas_testbed.bench.worker import WorkerError

PEERS = ("iperf3", "mooncake", "nixl")
K_DEFAULT_PEERS = ("iperf3", "mooncake")
_POOLS: dict[str, type[PoolPeer]] = {"mooncake": Mooncake, "nixl": Nixl}
K_LEAST_RTTS = 30
"""A repetition's least: what a loss does to a stream, and how it recovers, takes many."""
K_SCAN_S, K_SCAN_RTTS = 2.0, 20
"""Of iperf3's first round where only the best goes on: enough to tell which that is."""
Progress = Callable[[str], None]
Row = dict[str, Any]


def engines_for(
    cell: Cell, peers: Sequence[str], streams_iperf3: Sequence[int] | None = None
) -> list[Engine]:
    """prfaas and the peers asked for, iperf3 once for each number of streams. Raises UsageError for an
    unknown peer.
    """
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise UsageError(f"peers: found {', '.join(unknown)}; known: {', '.join(PEERS)}")
    engines: list[Engine] = [Prfaas(cell.streams)]
    engines += [_POOLS[peer]() for peer in peers if peer in _POOLS]
    if "iperf3" in peers:
        counts = (cell.streams,) if cell.streams else tuple(streams_iperf3 or K_STREAMS_IPERF3)
        engines += [Iperf3(count) for count in counts]
    return engines


def measure_cell(
    place: Place,
    cell: Cell,
    engines: Sequence[Engine],
    *,
    repetitions: int,
    limit_s: float,
    progress: Progress,
    narrow: bool = False,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """A row for each engine; one that fails keeps what it measured and says why under `errors`. `keep` gets
    the rows after each round.

    `narrow`: after the first round only prfaas, Mooncake and the best of the iperf3 rows go on, to spare
    time. A repetition has `limit_s`, on a long way more. Raises MachineError when an engine lacks something
    here.
    """
    limit_s = max(limit_s, K_LEAST_RTTS * cell.rtt_s)
    rows = [_empty_row(cell, engine) for engine in engines]
    try:
        for engine in engines:
            engine.spawn(place, cell)  # all at once: each takes seconds to import what it needs
        for engine, row in zip(engines, rows, strict=True):
            _start(engine, place, cell, row, progress)
        for repetition in range(repetitions):
            for index in _turns(len(engines), repetition):
                if narrow and repetition and not _goes_on(rows, index):
                    continue
                scan = narrow and not repetition and engines[index].name == "iperf3"
                most_s = min(limit_s, max(K_SCAN_S, K_SCAN_RTTS * cell.rtt_s)) if scan else limit_s
                _measure(engines[index], rows[index], repetition, most_s, progress)
            if keep is not None:
                keep(rows)
    finally:
        for engine in engines:
            engine.close()
    return rows


def summary(rows: Iterable[Row]) -> list[Row]:
    """For each cell: prfaas beside the best iperf3 and beside Mooncake, by medians, and every ratio of a
    round.
    """
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    return [_compare(name, found) for name, found in cells.items()]


def _compare(name: str, rows: list[Row]) -> Row:
    ours = next((row for row in rows if row["engine"] == "prfaas"), None)
    iperf3 = [row for row in rows if row["engine"] == "iperf3" and row["goodput_mbps"]]
    pools = [row for row in rows if row["engine"] == "mooncake" and row["goodput_mbps"]]
    mooncake = max(pools, key=lambda row: median(row["goodput_mbps"]), default=None)
    best = max(iperf3, key=lambda row: median(row["goodput_mbps"]), default=None)
    result: Row = {
        "cell": name,
        "prfaas_mbps": _middle(ours) if ours and ours["goodput_mbps"] else None,
        "best_iperf3_mbps": _middle(best) if best else None,
        "best_iperf3_streams": best["streams"] if best else None,
        "mooncake_mbps": _middle(mooncake) if mooncake else None,
    }
    for peer in ("best_iperf3", "mooncake"):
        ours_mbps, theirs_mbps = result["prfaas_mbps"], result[f"{peer}_mbps"]
        result[f"to_{peer}"] = round(ours_mbps / theirs_mbps, 4) if ours_mbps and theirs_mbps else None
    return result


def _middle(row: Row) -> float:
    """Its median, and no more than the link carries. Bytes that waited for a lost one before the time that
    counts began are delivered in it: at a long round trip and with loss that can make more.
    """
    return min(median(row["goodput_mbps"]), row["ceiling_mbps"] or float("inf"))


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _empty_row(cell: Cell, engine: Engine) -> Row:
    return {
        "engine": engine.name,
        "streams": engine.streams,
        **cell.parameters(),
        "goodput_mbps": [],
        "samples": [],
        "errors": [],
    }


def _goes_on(rows: Sequence[Row], index: int) -> bool:
    """Whether a row is of those that get every repetition: the others lose by their first figure."""
    if rows[index]["engine"] != "iperf3":
        return bool(rows[index]["engine"] != "nixl")
    first = [
        row["goodput_mbps"][0] if row["engine"] == "iperf3" and row["goodput_mbps"] else 0.0 for row in rows
    ]
    return first[index] > 0 and first[index] == max(first)


def _turns(count: int, repetition: int) -> list[int]:
    """Each engine once, in an order that shifts with the repetition."""
    return [(index + repetition) % count for index in range(count)]


def _start(engine: Engine, place: Place, cell: Cell, row: Row, progress: Progress) -> None:
    try:
        engine.start(place, cell)
    except WorkerError as error:
        row["errors"].append(str(error))
        progress(f"{label(row)}: {error}")
        engine.close()
        return
    row["settings"] = engine.describe()


def _measure(engine: Engine, row: Row, repetition: int, limit_s: float, progress: Progress) -> None:
    if "settings" not in row:
        return  # it never started
    load, busy, began = os.getloadavg()[0], _busy_s(), time.monotonic()
    try:
        sample = engine.measure(limit_s)
    except WorkerError as error:
        row["errors"].append(str(error))
        progress(f"{label(row)}: {error}")
        return
    elapsed_s = max(1e-9, time.monotonic() - began)
    columns = sample.columns()
    columns["repetition"] = repetition
    columns["load_1min"] = round(load, 2)
    columns["machine_busy_cores"] = round((_busy_s() - busy) / elapsed_s, 3)
    if columns.get("cpu_s") is not None and sample.bytes:
        columns["cpu_s_per_gb"] = columns["cpu_s"] / (sample.bytes / 1e9)
    row["samples"].append(columns)
    row["goodput_mbps"].append(round(columns.pop("goodput_mbps"), 3))
    progress(f"{label(row)}: {row['goodput_mbps'][-1]:.1f} Mbit/s")


def label(row: Row) -> str:
    streams = f" x{row['streams']}" if row["streams"] else ""
    return f"{row['cell']} {row['engine']}{streams}"


def _busy_s() -> float:
    """Seconds that the machine's cores were busy since boot, ours and others'."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def require_tools(peers: Sequence[str]) -> None:
    """Raises MachineError before anything is started when a peer asked for isn't installed."""
    if "iperf3" in peers and shutil.which("iperf3") is None:
        raise MachineError("iperf3 is missing; apt-get install iperf3")
    for peer in peers:
        if peer in _POOLS and not _POOLS[peer].installed():
            raise MachineError(
                f"{_POOLS[peer].distribution} is missing; pip install {_POOLS[peer].distribution}"
            )


def installed_peers() -> list[str]:
    """Every peer that this machine has."""
    found = ["iperf3"] if shutil.which("iperf3") else []
    return found + [name for name, kind in _POOLS.items() if kind.installed()]
