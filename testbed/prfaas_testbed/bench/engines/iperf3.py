"""iperf3 between the two ends: what TCP itself gives on this link, at a number of streams.

It runs by time, and its first seconds are left out, so that slow start isn't held against it; other engines
are measured over the same span (steady.py). A figure counts what reached the receiver.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from typing import Any

from prfaas.model.errors import MachineError
from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.engines.base import Engine, Sample
from prfaas_testbed.bench.places import Place
from prfaas_testbed.bench.worker import WorkerError, end_process

K_REPORT_S = 10.0  # the receiver's, after the sender has ended


class Iperf3(Engine):
    name = "iperf3"

    def __init__(self, streams: int) -> None:
        self.streams = streams
        self._server: subprocess.Popen[Any] | None = None

    def start(self, place: Place, cell: Cell) -> None:
        program = shutil.which("iperf3")
        if program is None:
            raise MachineError("iperf3 is missing; apt-get install iperf3")
        self._program, self._place, self._cell = program, place, cell

    def measure(self, limit_s: float) -> Sample:
        streams = self.streams or 1
        warm_s, seconds = self._cell.warm_s, self._cell.steady_s(limit_s)
        port, address = self._place.port(), self._place.address("receiver")
        # The receiver's own report is read: with many streams over a long way, the client of iperf 3.12 often
        # ends with "unable to receive results" although all went well.
        with tempfile.TemporaryFile() as report:
            serve = [self._program, "-s", "-1", "-J", "-B", address, "-p", str(port)]
            self._server = self._place.popen("receiver", serve, stdout=report)
            argv = [self._program, "-c", address, "-p", str(port), "-P", str(streams), "-J", "-i", "1"]
            argv += ["-t", f"{seconds:.0f}", "-O", f"{warm_s:.0f}"]
            if self._cell.emulated:
                argv += ["-C", self._cell.congestion_control]
            try:
                sent = self._send(argv, seconds + warm_s + 20)
                self._server.wait(K_REPORT_S)
            except subprocess.TimeoutExpired:
                raise WorkerError(f"iperf3's receiver with {streams} streams didn't end") from None
            finally:
                self.close()
            report.seek(0)
            try:
                received = json.load(report)
            except ValueError:
                raise WorkerError(
                    f"iperf3 with {streams} streams: no report; the sender says {sent}"
                ) from None
        return _sample(received, sent)

    def _send(self, argv: list[str], timeout_s: float) -> dict[str, Any]:
        """The client's report; the server needs a moment to listen, so it is tried again when refused."""
        deadline = time.monotonic() + 5
        while True:
            client = self._place.popen("sender", argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                out, err = client.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                client.kill()
                client.communicate()
                raise WorkerError(
                    f"iperf3 with {self.streams} streams wasn't done in {timeout_s:g} s"
                ) from None
            try:
                result: dict[str, Any] = json.loads(out)
            except ValueError:
                said = err.decode(errors="replace").strip()
                raise WorkerError(f"iperf3 ended as {client.returncode} and said: {said}") from None
            if "unable to connect" not in result.get("error", "") or time.monotonic() > deadline:
                return result
            time.sleep(0.1)

    def close(self) -> None:
        if self._server is not None:
            if self._server.poll() is None:
                self._server.terminate()
            end_process(self._server)
            self._server = None

    def describe(self) -> dict[str, Any]:
        said = subprocess.run(
            [self._program, "--version"], capture_output=True, text=True, check=False
        ).stdout
        return {"version": " ".join(said.split()[:2])}


def _sample(received: dict[str, Any], sent: dict[str, Any]) -> Sample:
    """From the receiver's report; retransmits and the congestion control are the sender's to know."""
    total = received["end"].get("sum_received")
    if not total or not total["bytes"]:
        raise WorkerError(f"iperf3: {received.get('error') or sent.get('error') or 'nothing arrived'}")
    cpu = received["end"].get("cpu_utilization_percent", {})
    shares = [
        cpu.get("host_total", 0.0),
        sent["end"].get("cpu_utilization_percent", {}).get("host_total", 0.0),
    ]
    kept = [interval["sum"] for interval in sent.get("intervals", []) if not interval["sum"].get("omitted")]
    return Sample(
        goodput_mbps=total["bits_per_second"] / 1e6,
        bytes=total["bytes"],
        seconds=total["seconds"],
        # Without the sender's share there is no total.
        cpu_s=sum(shares) / 100 * total["seconds"] if all(shares) else None,
        retransmits=sum(interval.get("retransmits", 0) for interval in kept),
        extra={
            "over": "steady",
            "whole_mbps": _whole_mbps(received),
            "congestion_control_used": received["end"].get("receiver_tcp_congestion"),
        },
    )


def _whole_mbps(received: dict[str, Any]) -> float | None:
    """With the seconds that are left out, from connections that are cold."""
    intervals = [interval["sum"] for interval in received.get("intervals", [])]
    seconds = sum(interval["seconds"] for interval in intervals)
    return round(sum(interval["bytes"] for interval in intervals) * 8e-6 / seconds, 3) if seconds else None
