"""Captures at the WAN's edges while a load runs, and what their packets say, as events of the record."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from prfaas.config.experiment import Capture
from prfaas.config.run import EventRow
from prfaas.model.errors import MachineError, PrfaasError
from prfaas_testbed.experiment.packets import Edge, read_edge, told

if TYPE_CHECKING:
    from prfaas_testbed.network import Captured, Network

K_SNAP_BYTES = 96  # Ethernet, IP, and TCP with all its options
K_MOST_PACKETS = 400_000
K_EARLY_S = 0.7  # tcpdump takes a moment to be ready


def read_packets(file: Path) -> Iterator[tuple[float, bytes]]:
    """(time of day, frame) of a pcap file, by Scapy's reader; dissecting each would take minutes."""
    from scapy.utils import RawPcapReader

    with RawPcapReader(str(file)) as reader:
        unit = 1e-9 if reader.nano else 1e-6
        for frame, meta in reader:
            yield meta.sec + meta.usec * unit, frame


class Last:
    """Packets as they come, and when the last of them was seen."""

    def __init__(self, packets: Iterator[tuple[float, bytes]]) -> None:
        self._packets = packets
        self.at_s: float | None = None

    def __iter__(self) -> Iterator[tuple[float, bytes]]:
        for at_s, frame in self._packets:
            self.at_s = at_s
            yield at_s, frame


class Captures:
    """`start` with the load's zero; `finish` ends what still runs, reads it and gives the rows."""

    def __init__(self, captures: Sequence[Capture], net: Network, folder: Path, port: int) -> None:
        self._captures, self._net, self._folder, self._port = captures, net, folder, port
        self._stopped = threading.Event()
        self._rows: list[EventRow] = []
        self._done: list[tuple[Capture, dict[str, Path], dict[str, Captured], float]] = []
        self._threads: list[threading.Thread] = []
        self._zero_s = 0.0

    def start(self, zero_s: float) -> None:
        self._zero_s = zero_s
        for i, capture in enumerate(self._captures):
            files = {
                site: self._folder / f"capture-{i}-{site}.pcap" for site in (capture.source, capture.target)
            }
            thread = threading.Thread(target=self._one, args=(capture, files), name="capture")
            self._threads.append(thread)
            thread.start()

    def _one(self, capture: Capture, files: dict[str, Path]) -> None:
        begin_s = self._zero_s + capture.at_s - K_EARLY_S
        if self._stopped.wait(max(0.0, begin_s - time.monotonic())):
            return
        try:
            found: dict[str, Captured] = {}
            with ExitStack() as both:
                for site, file in files.items():
                    found[site] = both.enter_context(
                        self._net.capture(site, file, K_SNAP_BYTES, K_MOST_PACKETS)
                    )
                self._row("capture", source=capture.source, target=capture.target)
                self._stopped.wait(max(0.0, self._zero_s + capture.at_s + capture.for_s - time.monotonic()))
            self._done.append((capture, files, found, time.monotonic() - self._zero_s))
        except (PrfaasError, OSError) as error:
            self._row("capture", source=capture.source, target=capture.target, failed=str(error))

    def abandon(self) -> None:
        """The run is over: nobody reads them."""
        self._end()
        for capture, files, _, _ in self._done:
            self._remove(capture, files)

    def _end(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _remove(capture: Capture, files: dict[str, Path]) -> None:
        if not capture.keep:
            for file in files.values():
                file.unlink(missing_ok=True)

    def finish(self) -> list[EventRow]:
        self._end()
        for capture, files, found, until_s in self._done:
            try:
                self._read(capture, files, found, until_s)
            finally:
                self._remove(capture, files)
        return self._rows

    def _read(
        self, capture: Capture, files: dict[str, Path], found: dict[str, Captured], until_s: float
    ) -> None:
        # The files hold the time of day, the record the load's own.
        zero_s = self._zero_s + time.time() - time.monotonic()
        edges: dict[str, Edge] = {}
        for site, file in files.items():
            last = Last(read_packets(file))
            edges[site] = read_edge(last, self._port)
            if found[site].ended_early:
                until_s = min(until_s, last.at_s - zero_s if last.at_s is not None else capture.at_s)
        fate: dict[str, object] = {"until_s": round(until_s, 3)}
        early = [site for site in files if found[site].ended_early]
        if early:
            fate["truncated"] = early
        missed = sum(one.missed or 0 for one in found.values())
        if missed:
            fate["missed_packets"] = missed
        both = ((capture.source, capture.target), (capture.target, capture.source))
        for near, far in both:
            address = socket.inet_aton(self._net.sites[near].address)
            said = told(address, edges[near], edges[far], zero_s)
            self._row("packets", site=near, peer=far, **fate, **said)

    def _row(self, event: str, **fields: object) -> None:
        at_s = round(time.monotonic() - self._zero_s, 4)
        self._rows.append(EventRow.model_validate({"at_s": at_s, "event": event, **fields}))


def check_reader() -> None:
    """Raises MachineError where Scapy isn't there to read with."""
    try:
        import scapy.utils  # noqa: F401
    except ImportError:
        raise MachineError("captures are read by scapy: install the extra prfaas[testbed]") from None
