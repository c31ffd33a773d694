"""Two decode servers behind one pump: what one of them loses when the other is stopped (SIGSTOP) while bytes
come for both.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prfaas_testbed.bench import checks
from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.engines.prfaas import WORKER, Prfaas
from prfaas_testbed.bench.harness import Progress, Row, median
from prfaas_testbed.bench.places import Loopback
from prfaas_testbed.bench.worker import Worker

K_CELL = Cell(total_bytes=64 << 20, name="neighbour")
K_LEAST_KEPT = 0.95


class Neighbours:
    """An engine with a second server at its receiving end and one at its sending end that sends to it."""

    def __init__(self, engine: Prfaas, place: Loopback, workdir: Path) -> None:
        self._engine = engine

        def spawn(argv: Sequence[str], **options: Any) -> Any:
            return place.popen("receiver", argv, **options)

        self.server = Worker("neighbour", spawn, WORKER, workdir / "neighbour.log")
        self.sender = Worker("its sender", spawn, WORKER, workdir / "neighbour-sender.log")
        pool_bytes = engine.layout.pool_bytes
        for worker, end in ((self.server, "receiver"), (self.sender, "sender")):
            config = str(workdir / f"pump-{end}.yaml")
            said = worker.call("start", config=config, pool_bytes=pool_bytes)
            if worker is self.server:
                self._base = said["base"]
        self._grant = self.server.call("grant", room=1)

    def both(self, seconds: float, *, stopped: bool) -> tuple[float, float]:
        """Goodput (Mbit/s) of the engine's own receiver and of the neighbour's, sent to side by side."""
        if stopped:
            os.kill(self.server.pid, signal.SIGSTOP)
        try:
            layout = self._engine.layout
            self.sender.send(
                "move", grant=self._grant, peer_base=self._base, offsets=layout.offsets,
                segment_bytes=layout.segment_bytes, batch_segments=layout.segments, total_bytes=1 << 40,
                limit_s=seconds,
            )  # fmt: skip
            own = self._engine.move(total_bytes=1 << 40, limit_s=seconds)
            other = self.sender.receive(timeout_s=seconds * 4 + 60)
        finally:
            os.kill(self.server.pid, signal.SIGCONT)
        return _mbps(own), _mbps(other)

    def close(self) -> None:
        self.sender.close()
        self.server.close()


def measure(workdir: Path, seconds: float, repetitions: int, progress: Progress) -> Row:
    """Both running and one stopped take turns."""
    place = Loopback(workdir)
    found: Row = {"running_mbps": [], "stopped_mbps": [], "to_stopped_mbps": []}
    with Prfaas() as engine:
        engine.start(place, K_CELL)
        pair = Neighbours(engine, place, workdir)
        try:
            for _ in range(repetitions):
                found["running_mbps"].append(pair.both(seconds, stopped=False)[0])
                own, other = pair.both(seconds, stopped=True)
                found["stopped_mbps"].append(own)
                found["to_stopped_mbps"].append(other)
        finally:
            pair.close()
    found["kept"] = kept(found)
    progress(f"beside a stopped server a running one keeps {found['kept']:.3f} of its goodput")
    return found


def kept(found: Row) -> float:
    """The middle of the rounds' ratios. Pure."""
    pairs = zip(found["stopped_mbps"], found["running_mbps"], strict=True)
    return median([stopped / running for stopped, running in pairs])


def judge(found: Row) -> list[Row]:
    return [checks.at_least("neighbour/kept_beside_a_stopped_server", found["kept"], K_LEAST_KEPT)]


def _mbps(moved: Row) -> float:
    return float(moved["bytes"] * 8e-6 / (moved["ended_s"] - moved["began_s"]))
