"""Where the two ends of a measurement run: on this host over loopback, or in two sites of an emulated
network.
"""

from __future__ import annotations

import abc
import itertools
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from prfaas.config.topology import BurstyLoss, Impairments, LinkChange, LinkSpec, SiteSpec, Topology
from prfaas_testbed.bench.cell import Cell, Loss

if TYPE_CHECKING:
    from prfaas_testbed.network.network import Network

K_SITES = {"sender": "east", "receiver": "west"}
K_FIRST_PORT = 20_000
K_WAIT_S = 120.0  # for a network that another run of the testbed holds
File = int | IO[Any] | None


class Place(abc.ABC):
    """Two ends, `sender` and `receiver`, and the way between them."""

    workdir: Path
    """For logs, keys and sockets of what runs here; both ends see it under this path."""

    @abc.abstractmethod
    def popen(
        self,
        end: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: File = subprocess.DEVNULL,
        stdout: File = subprocess.DEVNULL,
        stderr: File = subprocess.DEVNULL,
        text: bool = False,
    ) -> subprocess.Popen[Any]:
        """Start a program at `end`, leader of its own process group; `env` adds to this process's."""

    @abc.abstractmethod
    def address(self, end: str) -> str:
        """The address at which the other end reaches `end`."""

    @abc.abstractmethod
    def device(self, end: str) -> str:
        """The network interface at `end` that leads to the other end."""

    @abc.abstractmethod
    def port(self) -> int:
        """A port that is free at both ends now."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a result says of the place, `emulation` at least."""

    def site(self, end: str) -> str:
        """Name of the site at `end`."""
        return K_SITES[end]


class Loopback(Place):
    """Both ends on this host."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir

    def popen(
        self,
        end: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: File = subprocess.DEVNULL,
        stdout: File = subprocess.DEVNULL,
        stderr: File = subprocess.DEVNULL,
        text: bool = False,
    ) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            list(argv),
            env={**os.environ, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            start_new_session=True,
        )

    def address(self, end: str) -> str:
        return "127.0.0.1"

    def device(self, end: str) -> str:
        return "lo"

    def port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        return port

    def describe(self) -> dict[str, Any]:
        return {"emulation": "none"}


class Emulated(Place):
    """Two sites and one link, which `shape` makes into any cell's."""

    def __init__(self, network: Network, workdir: Path) -> None:
        self.workdir = workdir
        self._network = network
        self._ports = itertools.count(K_FIRST_PORT)

    def shape(self, cell: Cell) -> None:
        """Give the link the cell's delay, rate and loss, both ways, and both sites its congestion control."""
        self.change(change_for(cell))
        for site in self._network.sites.values():
            # As `prfaas doctor` advises: a link that rested goes on at its rate. It is the same for every
            # engine.
            settings = (
                f"echo {cell.congestion_control} > tcp_congestion_control; echo 0 > tcp_slow_start_after_idle"
            )
            site.check(["sh", "-ec", f"cd /proc/sys/net/ipv4; {settings}"])

    def popen(
        self,
        end: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: File = subprocess.DEVNULL,
        stdout: File = subprocess.DEVNULL,
        stderr: File = subprocess.DEVNULL,
        text: bool = False,
    ) -> subprocess.Popen[Any]:
        host = self._network.sites[self.site(end)]
        merged = {**os.environ, **(env or {})}
        return host.popen(argv, env=merged, stdin=stdin, stdout=stdout, stderr=stderr, text=text)

    def address(self, end: str) -> str:
        return self._network.sites[self.site(end)].address

    def device(self, end: str) -> str:
        return self._network.sites[self.site(end)].device

    def set_down(self, down: bool) -> None:
        """Cut every link, or mend it."""
        self.change(LinkChange(down=down))

    def change(self, change: LinkChange) -> None:
        """Of every link."""
        for link in self._network.links:
            self._network.apply(link, change)

    def port(self) -> int:
        return next(self._ports)  # a site's namespace is new, and nobody else is in it

    def describe(self) -> dict[str, Any]:
        return {"emulation": self._network.emulation}


@contextmanager
def emulated(first: Cell, workdir: Path, progress: Callable[[str], None]) -> Iterator[Emulated]:
    """A network shaped as `first`; `shape` makes it the next. Waits a while for another run's. Raises
    MachineError.
    """
    from prfaas_testbed.network import open_network

    with open_network(topology_for(first), workdir, progress, wait_s=K_WAIT_S) as network:
        place = Emulated(network, workdir)
        place.shape(first)
        yield place


def topology_for(cell: Cell) -> Topology:
    """Two sites joined by the cell's link. Pure."""
    link = {"between": list(K_SITES.values()), **change_for(cell).model_dump(exclude_unset=True)}
    return Topology(
        name="bench",
        text="Two sites and the link of one cell.",
        sites={name: SiteSpec() for name in K_SITES.values()},
        links=(LinkSpec.model_validate(link),),
    )


def change_for(cell: Cell) -> LinkChange:
    """What makes any link the cell's. Pure."""
    fields: dict[str, Any] = {"delay_ms": (cell.rtt_ms or 0.0) / 2, "rate_mbps": cell.rate_mbps}
    if cell.loss.bursty:
        fields["bursty_loss"] = gilbert_elliott(cell.loss)
    else:
        fields["loss_percent"] = cell.loss.fraction * 100
    return LinkChange(**fields)


def gilbert_elliott(loss: Loss) -> BurstyLoss:
    """The chain that loses all packets in its bad state: stays there for `burst_packets` in the mean (1/r),
    and the long-run share p/(p+r) is `fraction`. Pure."""
    leave = 1 / loss.burst_packets
    enter = loss.fraction * leave / (1 - loss.fraction)
    return BurstyLoss(enter_percent=enter * 100, leave_percent=leave * 100)


def queue_bytes(cell: Cell) -> int:
    """The queue before the cell's link, as the topology's default has it. Pure."""
    return Impairments(delay_ms=(cell.rtt_ms or 0.0) / 2, rate_mbps=cell.rate_mbps).buffer_bytes
