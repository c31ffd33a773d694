"""prfaas between the two ends: at each a pump, a process of its own, and a server that uses it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prfaas.config.pump import PumpConfig
from prfaas.pump_client.launch import connect
from prfaas_testbed.bench import steady
from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.certificates import tls_for
from prfaas_testbed.bench.engines.base import Engine, Sample
from prfaas_testbed.bench.engines.prfaas_worker import K_DEPTH
from prfaas_testbed.bench.layout import Layout
from prfaas_testbed.bench.places import Place
from prfaas_testbed.bench.worker import Worker, WorkerError, cpu_seconds, end_process

K_START_S = 20.0
K_BATCH_S = 0.5
"""Of the link a batch; K_DEPTH of them are under way at a time. With 0.125 s each has blocks on every stream
too, and all wait for the one that stands still: in bursts of loss 88 to 95 Mbit/s in turns with 93 to 95.
"""
K_BEGIN_S = 0.1  # enough for so many to be handed over
K_WARM_S = 2.0
K_WARM_RTTS = 75  # the engine looks at ten round trips before each change of its streams
K_LANDING_S = 30.0
K_LEAST_WARM_BYTES = 4_000_000
WORKER = "prfaas_testbed.bench.engines.prfaas_worker"


def start_pump(
    place: Place, end: str, site: str, prefix: tuple[str, ...] = (), **fields: Any
) -> tuple[subprocess.Popen[Any], Path]:
    """A pump of `site` at an end of the place, ready to serve, and its configuration file.

    Raises WorkerError.
    """
    config = PumpConfig(
        site=site,
        listen=f"{place.address(end)}:{place.port()}",
        control_socket=place.workdir / f"{end}.sock",
        allow_plaintext=fields.get("tls") is None,
        **fields,
    )
    file, log = place.workdir / f"pump-{end}.yaml", place.workdir / f"pump-{end}.log"
    file.write_text(config.model_dump_json(exclude_none=True))
    argv = [*prefix, sys.executable, "-m", "prfaas.pump", "--config", str(file)]
    with log.open("wb") as errors:
        pump = place.popen(end, argv, stderr=errors)
    give_up_s = time.monotonic() + K_START_S
    while time.monotonic() < give_up_s and pump.poll() is None:
        sock = connect(config.control_path)
        if sock is not None:
            sock.close()
            return pump, file
        time.sleep(0.02)
    end_process(pump)
    lines = log.read_text(errors="replace").splitlines()
    raise WorkerError(f"the pump of {end} didn't start: {lines[-1] if lines else 'it said nothing'}")


class Prfaas(Engine):
    name = "prfaas"

    def __init__(self, streams: int | None = None, *, pump_prefix: tuple[str, ...] = ()) -> None:
        """`pump_prefix`: words before a pump's command, such as taskset."""
        self.streams = streams
        self.ends: dict[str, Worker] = {}
        self._pumps: dict[str, subprocess.Popen[Any]] = {}
        self._prefix = pump_prefix
        self._rooms = itertools.count(1)
        self._fill = 0

    def spawn(self, place: Place, cell: Cell) -> None:
        for end in ("receiver", "sender"):
            log = place.workdir / f"prfaas-{end}.log"
            spawn = functools.partial(place.popen, end)
            self.ends[end] = Worker(f"prfaas ({end})", spawn, WORKER, log)

    def start(self, place: Place, cell: Cell) -> None:
        if not self.ends:
            self.spawn(place, cell)
        self._cell = cell
        self.layout = Layout.of(cell)
        one_call = cell.one_call or cell.rate_mbps is None
        self._batch = self.layout.segments if one_call else self.layout.segments_in(K_BATCH_S, cell.rate_mbps)
        said: dict[str, dict[str, Any]] = {}
        for end, worker in self.ends.items():  # which have come up while their pumps do
            config = self._start_pump(place, end)
            said[end] = worker.call("start", config=str(config), pool_bytes=self.layout.pool_bytes)
        self.peer_base = said["receiver"]["base"]
        self._address = said["receiver"]["address"]
        self.ends["sender"].call("prepare", address=self._address)
        self._warm()

    def _start_pump(self, place: Place, end: str) -> Path:
        """A pump that serves the node; returns its configuration file."""
        site = place.site(end)
        tls = tls_for(place.workdir / "keys", site) if self._cell.tls else None
        self._pumps[end], file = start_pump(place, end, site, self._prefix, tls=tls, **self._tuning())
        return file

    def _tuning(self) -> dict[str, Any]:
        """What the cell prescribes: a number of streams, and CUBIC where nothing else may be used."""
        tuning: dict[str, Any] = {}
        if self.streams is not None:
            tuning.update(min_streams=self.streams, max_streams=self.streams)
        if self._cell.emulated and self._cell.congestion_control != "bbr":
            tuning["congestion_control"] = self._cell.congestion_control
        return tuning

    def _warm(self) -> None:
        """Long enough for the engine to learn the path, as a link in use has; cold_mbps is the very first
        batch.
        """
        first = self.move(total_bytes=min(self._cell.total_bytes, K_LEAST_WARM_BYTES), limit_s=K_WARM_S)
        self.cold_mbps = first["bytes"] * 8e-6 / (first["ended_s"] - first["began_s"])
        if self._cell.emulated:
            warm_s = max(K_WARM_S, K_WARM_RTTS * self._cell.rtt_s)
            most_bytes = steady.bytes_for(self._cell, warm_s, 1 << 40)
            # What is under way when no more may begin lasts for as long as it takes the link.
            self.move(total_bytes=most_bytes, limit_s=max(K_BEGIN_S, warm_s - K_DEPTH * K_BATCH_S))

    def measure(self, limit_s: float) -> Sample:
        self._fill = self._fill % 255 + 1  # never what the receiver's pages hold from before
        self.ends["sender"].call("fill", value=self._fill)
        before, pumps_before = self._cpu_s(), self._pump_cpu_s()
        moved, counted = steady.move_and_count(
            self.move, self.ends, self._cell, self.layout, self._fill, limit_s
        )
        landed_s = self._landed_s(moved["bytes"])
        # The host's share of the receiving end is its `landed` check, which isn't the engine's.
        pumps = {end: after - pumps_before[end] for end, after in self._pump_cpu_s().items()}
        seconds = max(moved["ended_s"], landed_s) - moved["began_s"]
        stats = self.ends["sender"].call("stats")
        streams = [stream for peer in stats["peers"] for stream in peer["streams"]]
        columns = steady.columns(moved["bytes"], seconds, counted)
        return Sample(
            goodput_mbps=columns.pop("goodput_mbps"),
            bytes=moved["bytes"],
            seconds=seconds,
            cpu_s=sum(pumps.values()) + self._cpu_s()["sender"] - before["sender"],
            extra={
                **columns,
                "cpu_send_s": pumps["sender"],
                "cpu_receive_s": pumps["receiver"],
                "streams_used": len(streams),
                "streams_encrypted": sum(s["tls"] for s in streams),
                "congestion_control_used": ",".join(sorted({s["congestion_control"] for s in streams})),
                "retransmitted_bytes": sum(s["retransmitted_bytes"] for s in streams),
                "resent_blocks": moved["resent_blocks"],
                "streams_lost_so_far": sum(peer["streams_lost"] for peer in stats["peers"]),
                "corrupt_blocks_so_far": sum(peer["corrupt_blocks"] for peer in stats["peers"]),
                "calls_s": moved["calls_s"],
                "landed_late_s": round(landed_s - moved["ended_s"], 6),
            },
        )

    def move(
        self, *, total_bytes: int, limit_s: float, meanwhile: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """One `move` of the sender's process under a lease of its own."""
        room = next(self._rooms)
        grant = self.ends["receiver"].call("grant", room=room)
        try:
            moved: dict[str, Any] = self.ends["sender"].call_beside(
                "move",
                meanwhile,
                timeout_s=limit_s * 4 + 120,
                grant=grant,
                peer_base=self.peer_base,
                offsets=self.layout.offsets,
                segment_bytes=self.layout.segment_bytes,
                batch_segments=self._batch,
                total_bytes=total_bytes,
                limit_s=limit_s,
            )
        finally:
            with contextlib.suppress(WorkerError):
                self.ends["receiver"].call("revoke", room=room)
        return moved

    def move_slices(
        self, here: list[int], there: list[int], slice_bytes: int, total_bytes: int
    ) -> tuple[float, float]:
        """Pieces of one size from offsets of the sender's pool to offsets of the receiver's, again and again:
        processor seconds of both pumps, and seconds.
        """
        room = next(self._rooms)
        grant = self.ends["receiver"].call("grant", room=room)
        before = sum(self._pump_cpu_s().values())
        moved = self.ends["sender"].call(
            "move", grant=grant, peer_base=self.peer_base, offsets=here, peer_offsets=there,
            segment_bytes=slice_bytes, batch_segments=len(here), total_bytes=total_bytes, limit_s=K_LANDING_S,
        )  # fmt: skip
        used_s = sum(self._pump_cpu_s().values()) - before
        self.ends["receiver"].call("revoke", room=room)
        return used_s, moved["ended_s"] - moved["began_s"]

    def deliver(self, size_bytes: int) -> dict[str, float]:
        """Seconds from the hand-over of one transfer to its success at the receiver and, by word, at the
        sender.
        """
        room = next(self._rooms)
        grant = self.ends["receiver"].call("grant", room=room)
        sent = self.ends["sender"].call(
            "deliver", grant=grant, peer_base=self.peer_base, size_bytes=size_bytes
        )
        arrived_s = self.ends["receiver"].call("arrived", room=room, limit_s=K_LANDING_S)
        if arrived_s is None:
            raise WorkerError("prfaas: the sender has its success, and the receiver's lease isn't complete")
        return {
            "receiver_s": arrived_s - sent["began_s"],
            "sender_s": sent["ended_s"] - sent["began_s"],
        }

    def _landed_s(self, moved_bytes: int) -> float:
        offsets = self.layout.offsets[: moved_bytes // self.layout.segment_bytes]
        landed_s: float | None = self.ends["receiver"].call(
            "landed",
            offsets=offsets,
            segment_bytes=self.layout.segment_bytes,
            value=self._fill,
            limit_s=K_LANDING_S,
        )
        if landed_s is None:
            raise WorkerError("prfaas reported success, and bytes were missing")
        return landed_s

    def _cpu_s(self) -> dict[str, float]:
        return {end: cpu_seconds(worker.pid) for end, worker in self.ends.items()}

    def _pump_cpu_s(self) -> dict[str, float]:
        return {end: cpu_seconds(pump.pid) for end, pump in self._pumps.items()}

    def close(self) -> None:
        for worker in self.ends.values():
            worker.close()
        for pump in self._pumps.values():
            if pump.poll() is None:
                pump.terminate()
            end_process(pump)
        self.ends, self._pumps = {}, {}

    def describe(self) -> dict[str, Any]:
        return {"batch_segments": self._batch, "cold_mbps": round(self.cold_mbps, 3), **self._tuning()}
