"""What a transfer at full rate adds to the delay of a busy Python loop in the same process.

On two cores the pumps' own work would take the loop's core away, and any program would: so the loop has a
core to itself, as a host with cores to spare gives it, and all else shares the other. What is left is what
the engine does to its host process: locks, its threads, copies of its memory. `bystander` is a loop in a
process that transfers nothing, on the same core beside the same transfer: what it is delayed by is the
machine. `beside` is the same without cores set apart, and `control` a loop beside iperf3, which never touches
the process at all.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prfaas_testbed.bench import checks
from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.engines.iperf3 import Iperf3
from prfaas_testbed.bench.engines.mooncake import Mooncake
from prfaas_testbed.bench.engines.pools import PoolPeer
from prfaas_testbed.bench.engines.prfaas import Prfaas
from prfaas_testbed.bench.harness import Progress, Row, median
from prfaas_testbed.bench.places import Loopback
from prfaas_testbed.bench.worker import Worker

K_CELL = Cell(total_bytes=1 << 40, name="host")  # more than the time allows
K_BESIDE_REPETITIONS = 2
"""Of what is only shown beside the engine's own two rows, which are judged."""
K_LOOP_MODULE = "prfaas_testbed.bench.engines.loop_worker"


def measure(
    workdir: Path, seconds: float, repetitions: int, progress: Progress, keep: Callable[[list[Row]], None]
) -> list[Row]:
    """A row for each way to move bytes and each end whose loop is watched; quiet and loaded take turns.
    `keep` gets them as they come.
    """
    rows: list[Row] = []
    place = Loopback(workdir)
    cores = sorted(os.sched_getaffinity(0))
    pin = cores[0] if len(cores) > 1 else None
    apart = ("taskset", "-c", ",".join(map(str, cores[1:]))) if pin is not None else ()
    few = min(repetitions, K_BESIDE_REPETITIONS)

    def watch(name: str, end: str, worker: Worker, engine: Prfaas | PoolPeer, core: int | None) -> None:
        rounds = repetitions if name == "prfaas" else few
        rows.append(_compare(name, end, worker, _engine_run(engine, seconds), seconds, rounds, core))
        keep(rows)
        progress(_text(rows[-1]))

    for name, engine, core in (
        ("prfaas", Prfaas(pump_prefix=apart), pin),
        ("prfaas-beside", Prfaas(), None),
        ("mooncake", Mooncake(), pin),
    ):
        if isinstance(engine, PoolPeer) and not engine.installed():
            continue
        with engine:
            engine.start(place, K_CELL)
            for end in engine.ends.values():
                if core is not None:
                    end.call("keep_off", core=core)
            for name_of_end in ("sender", "receiver"):
                watch(name, name_of_end, engine.ends[name_of_end], engine, core)
            if name == "prfaas":
                with _loop_worker(place, workdir) as bystander:
                    watch("bystander", "neither", bystander, engine, core)
    if shutil.which("iperf3"):
        rows.append(_control(place, workdir, seconds, few))
        keep(rows)
        progress(_text(rows[-1]))
    return rows


def judge(rows: Sequence[Row]) -> list[Row]:
    """What is added in all, and but for waits for a core; the first means something on an idle machine."""
    judged = []
    for row in rows:
        if row["engine"] == "prfaas":
            name = f"host/prfaas/{row['end']}/added_p99_ms"
            judged.append(checks.at_most(name, added_ms(row), checks.K_LOOP_ADDED_MS))
            if (own_ms := own_added_ms(row)) is not None:
                judged.append(checks.at_most(f"{name}_but_for_a_core", own_ms, checks.K_LOOP_ADDED_MS))
    return judged


def added_ms(row: Row) -> float:
    """What the transfer adds to the loop's 99th percentile: the median over rounds, each beside its own quiet
    one.
    """
    return _added(row, "p99_ms")


def own_added_ms(row: Row) -> float | None:
    """The same without what the loop waited for a core; None where the kernel didn't say."""
    known = all(one.get("own_p99_ms") is not None for one in (*row["quiet"], *row["loaded"]))
    return _added(row, "own_p99_ms") if known else None


def _added(row: Row, what: str) -> float:
    pairs = zip(row["quiet"], row["loaded"], strict=True)
    return median([loaded[what] - quiet[what] for quiet, loaded in pairs])


def _engine_run(engine: Prfaas | PoolPeer, seconds: float) -> Callable[[], float]:
    def run() -> float:
        moved = engine.move(total_bytes=K_CELL.total_bytes, limit_s=seconds)
        return float(moved["bytes"] * 8e-6 / (moved["ended_s"] - moved["began_s"]))

    return run


def _compare(
    name: str,
    end: str,
    worker: Worker,
    load: Callable[[], float],
    seconds: float,
    repetitions: int,
    core: int | None,
) -> Row:
    quiet, loaded, goodput = [], [], []
    for _ in range(repetitions):
        worker.call("loop_start", core=core)
        time.sleep(seconds)
        quiet.append(worker.call("loop_stop"))
        worker.call("loop_start", core=core)
        goodput.append(load())
        loaded.append(worker.call("loop_stop"))
    return {"engine": name, "end": end, "quiet": quiet, "loaded": loaded, "goodput_mbps": goodput}


def _control(place: Loopback, workdir: Path, seconds: float, repetitions: int) -> Row:
    """A loop in a process that transfers nothing, while iperf3 keeps the cores busy."""
    with _loop_worker(place, workdir) as worker, Iperf3(2) as engine:
        engine.start(place, K_CELL)

        def load() -> float:
            return engine.measure(seconds).goodput_mbps

        return _compare("control", "neither", worker, load, seconds, repetitions, None)


@contextmanager
def _loop_worker(place: Loopback, workdir: Path) -> Iterator[Worker]:
    def spawn(argv: Sequence[str], **options: Any) -> Any:
        return place.popen("sender", argv, **options)

    with Worker("host loop", spawn, K_LOOP_MODULE, workdir / "host-loop.log") as worker:
        yield worker


def _text(row: Row) -> str:
    goodput = median(row["goodput_mbps"])
    quiet, loaded = (median([one["p99_ms"] for one in row[when]]) for when in ("quiet", "loaded"))
    return (
        f"host loop in {row['engine']} ({row['end']}): p99 {quiet:.2f} ms quiet, {loaded:.2f} ms loaded, "
        f"{own_added_ms(row) or 0.0:+.2f} ms without waits for a core, at {goodput:.0f} Mbit/s"
    )
