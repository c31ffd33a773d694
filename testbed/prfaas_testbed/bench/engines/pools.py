"""Peers that write from one registered pool into another, a batch of segments a call: what they have in
common.
"""

from __future__ import annotations

import abc
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

from prfaas.model.errors import MachineError
from prfaas_testbed.bench import steady
from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.engines.base import Engine, Sample
from prfaas_testbed.bench.layout import Layout
from prfaas_testbed.bench.places import Place
from prfaas_testbed.bench.worker import Worker, WorkerError

K_BATCH_S = 0.5  # of the link a batch
K_BATCH_MOST_S = 1.5
"""At the rate that the engine was first seen to carry: where it leaves the link idle, one sized by the
link takes ten seconds, and each repetition ends by waiting for one.
"""
K_WARM_BYTES = 4_000_000
K_WARM_S = 5.0
K_LANDING_S = 30.0


class PoolPeer(Engine):
    """Two processes, one at each end, that hold a pool; the sender writes batches one after the other."""

    streams = None
    distribution: str
    module: str
    worker: str
    batch_segments: int
    """The most that one call takes."""

    def __init__(self) -> None:
        self.ends: dict[str, Worker] = {}
        self._fill = 0

    @classmethod
    def installed(cls) -> bool:
        return importlib.util.find_spec(cls.module) is not None

    @abc.abstractmethod
    def connect(self, place: Place, pool_bytes: int) -> dict[str, Any]:
        """Start both ends' engines; returns what `move` needs to find the receiver's pool."""

    def environment(self, place: Place, end: str) -> dict[str, str]:
        return {}

    def spawn(self, place: Place, cell: Cell) -> None:
        if not self.installed():
            raise MachineError(f"{self.distribution} is missing; pip install 'prfaas[baselines]'")
        for end in ("receiver", "sender"):
            log = place.workdir / f"{self.name}-{end}.log"
            spawn = functools.partial(place.popen, end)
            self.ends[end] = Worker(
                f"{self.name} ({end})", spawn, self.worker, log, **self.environment(place, end)
            )

    def start(self, place: Place, cell: Cell) -> None:
        if not self.ends:
            self.spawn(place, cell)
        self.layout = Layout.of(cell)
        self._batch = min(self.batch_segments, self.layout.segments_in(K_BATCH_S, cell.rate_mbps))
        self._cell = cell
        self._target = self.connect(place, self.layout.pool_bytes)
        first = self.move(total_bytes=min(cell.total_bytes, K_WARM_BYTES), limit_s=K_WARM_S)
        self.cold_mbps = first["bytes"] * 8e-6 / (first["ended_s"] - first["began_s"])
        self._batch = min(self._batch, self.layout.segments_in(K_BATCH_MOST_S, self.cold_mbps))

    def measure(self, limit_s: float) -> Sample:
        self._fill = self._fill % 255 + 1  # never what the receiver's pages hold from before
        self.ends["sender"].call("fill", value=self._fill)
        other = self.ends["receiver"].call("cpu_s")
        moved, counted = steady.move_and_count(
            self.move, self.ends, self._cell, self.layout, self._fill, limit_s
        )
        landed_s = self._landed_s(moved["bytes"])
        other = self.ends["receiver"].call("cpu_s") - other
        seconds = max(moved["ended_s"], landed_s) - moved["began_s"]
        columns = steady.columns(moved["bytes"], seconds, counted)
        return Sample(
            goodput_mbps=columns.pop("goodput_mbps"),
            bytes=moved["bytes"],
            seconds=seconds,
            cpu_s=moved["cpu_s"] + other,
            extra={
                **columns,
                "cpu_send_s": moved["cpu_s"],
                "cpu_receive_s": other,
                "calls_s": moved["calls_s"],
                # Above 0: success was reported before the bytes were there.
                "landed_late_s": round(landed_s - moved["ended_s"], 6),
            },
        )

    def move(
        self, *, total_bytes: int, limit_s: float, meanwhile: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """One `move` of the sender's process: bytes, began_s, ended_s, cpu_s and the seconds of each call."""
        moved: dict[str, Any] = self.ends["sender"].call_beside(
            "move",
            meanwhile,
            timeout_s=limit_s * 4 + 120,  # the last batch may begin just before the limit, on a lossy link
            offsets=self.layout.offsets,
            segment_bytes=self.layout.segment_bytes,
            batch_segments=self._batch,
            total_bytes=total_bytes,
            limit_s=limit_s,
            **self._target,
        )
        return moved

    def _landed_s(self, moved_bytes: int) -> float:
        """When the last byte was in the receiver's pages, on the clock that both ends share. Raises
        WorkerError.
        """
        offsets = self.layout.offsets[: moved_bytes // self.layout.segment_bytes]
        landed_s: float | None = self.ends["receiver"].call(
            "landed",
            offsets=offsets,
            segment_bytes=self.layout.segment_bytes,
            value=self._fill,
            limit_s=K_LANDING_S,
        )
        if landed_s is None:
            raise WorkerError(f"{self.name} reported success, and {K_LANDING_S:g} s later bytes were missing")
        return landed_s

    def close(self) -> None:
        for end in self.ends.values():
            end.close()
        self.ends = {}

    def describe(self) -> dict[str, Any]:
        return {
            "version": importlib.metadata.version(self.distribution),
            "batch_segments": self._batch,
            "cold_mbps": round(self.cold_mbps, 3),
        }
