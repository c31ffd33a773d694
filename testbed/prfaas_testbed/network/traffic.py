"""iperf3 between sites: to measure a path, and as cross-traffic beside the system under test."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from prfaas.config.topology import K_FRAME_OVERHEAD_BYTES
from prfaas.model.errors import MachineError, PrfaasError

if TYPE_CHECKING:
    from prfaas_testbed.network.network import Site

K_START_S = 10.0
K_FOREVER_S = 86_400
K_TCP_HEADERS_BYTES = 52  # IP, TCP with timestamps
K_UDP_HEADERS_BYTES = 28

Kind = Literal["cubic", "bbr", "udp"]


class IperfServer:
    """One test's server; its report is the receiver's word."""

    def __init__(self, site: Site, port: int, prefix: Sequence[str] = ()) -> None:
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        try:
            self.process = site.popen(
                [*prefix, "iperf3", "-s", "-1", "-J", "-p", str(port), "-B", site.address],
                stdout=self._out,
                stderr=subprocess.STDOUT,
            )
        except BaseException:
            self._out.close()
            raise
        deadline = time.monotonic() + K_START_S
        while not listens(site, port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise MachineError(f"iperf3 does not listen on port {port} of site {site.name}: is it taken?")
            time.sleep(0.02)

    def report(self, timeout_s: float = 10.0) -> dict[str, Any]:
        try:
            self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise PrfaasError("iperf3's server did not end with its client") from None
        self._out.seek(0)
        try:
            found = json.loads(self._out.read())
        except ValueError:
            raise PrfaasError("iperf3's server left no report") from None
        return dict(found)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._out.close()


@contextmanager
def iperf_server(site: Site, port: int, prefix: Sequence[str] = ()) -> Iterator[IperfServer]:
    server = IperfServer(site, port, prefix)
    try:
        yield server
    finally:
        server.close()


def listens(site: Site, port: int) -> bool:
    """Whether something accepts TCP connections on the port inside the site."""
    wanted = f"{port:04X}"
    for line in site.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"]).stdout.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[1].endswith(f":{wanted}") and fields[3] == "0A":
            return True
    return False


def sending_words(kind: Kind, rate_mbps: float | None, streams: int, mtu_bytes: int) -> list[str]:
    """What iperf3 is told to send in full frames, whose rate counts headers: its own counts payload. Pure."""
    payload_bytes = mtu_bytes - (K_UDP_HEADERS_BYTES if kind == "udp" else K_TCP_HEADERS_BYTES)
    words = ["-u", "-l", str(payload_bytes)] if kind == "udp" else ["-C", kind]
    if rate_mbps is not None:
        payload_mbps = rate_mbps * payload_bytes / (mtu_bytes + K_FRAME_OVERHEAD_BYTES)
        words += ["-b", f"{payload_mbps / streams:.6f}M"]
    return words


def received(report: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes that a server's report says arrived, and in how many seconds. A server whose client was stopped
    tells its last interval twice. Pure."""
    sums = {row["sum"]["start"]: row["sum"] for row in report.get("intervals", [])}
    return sum(row["bytes"] for row in sums.values()), sum(row["seconds"] for row in sums.values())


class CrossTraffic:
    """Other people's traffic from one site to another: ready when it is made, then from `begin` to `stop`."""

    def __init__(
        self,
        source: Site,
        target: Site,
        kind: Kind,
        rate_mbps: float | None = None,
        streams: int = 1,
        port: int = 5920,
        mtu_bytes: int = 1500,
    ) -> None:
        """`rate_mbps` of Ethernet frames, as a link's; `mtu_bytes`: the path's."""
        if kind == "udp" and rate_mbps is None:
            raise PrfaasError("UDP cross-traffic needs a rate_mbps: nothing else bounds it")
        words = ["iperf3", "-c", target.address, "-p", str(port), "-t", str(K_FOREVER_S), "-P", str(streams)]
        self.kind, self.source, self.target = kind, source.name, target.name
        self._from, self._words = source, words + sending_words(kind, rate_mbps, streams, mtu_bytes)
        self._server = IperfServer(target, port)
        self._client: subprocess.Popen[str] | None = None
        self.begun_s: float | None = None
        self.ended_early = False
        """It ended by itself before it was stopped."""
        self.stopped_s: float | None = None

    def begin(self) -> None:
        self.begun_s = time.monotonic()
        self._client = self._from.popen(
            self._words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def stop(self) -> dict[str, Any]:
        """End it and say what arrived: `seconds`, `mbps`, and `error` if that isn't known or it ended by
        itself before."""
        error = None
        if self._client is None:
            self.stopped_s = time.monotonic()
            self._server.close()
            return {"seconds": 0.0, "mbps": 0.0, "error": "it hadn't begun"}
        if self._client.poll() is not None:
            self.ended_early, error = True, "it ended by itself"
        else:
            self._client.send_signal(signal.SIGINT)  # iperf3 then tells its server, which writes its report
        try:
            _, said = self._client.communicate(timeout=5)
            error = error and f"{error}: {said.strip()}"
        except subprocess.TimeoutExpired:
            self._client.kill()
            self._client.communicate()
        self.stopped_s = time.monotonic()
        received_bytes, seconds = 0.0, 0.0
        try:
            received_bytes, seconds = received(self._server.report(timeout_s=3))
        except PrfaasError as problem:
            error = error or str(problem)
        finally:
            self._server.close()
        mbps = received_bytes * 8 / 1e6 / seconds if seconds else 0.0
        return {"seconds": round(seconds, 3), "mbps": round(mbps, 3), "error": error}
