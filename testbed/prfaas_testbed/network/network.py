"""A topology brought up on this machine: sites to run programs in, links to measure and to change."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prfaas.config.places import checkout
from prfaas.config.topology import Impairments, LinkChange, Topology
from prfaas.model.errors import MachineError, UsageError
from prfaas_testbed.network.base import Emulation, create
from prfaas_testbed.network.calibrate import Calibration, calibrate
from prfaas_testbed.network.health import Watch
from prfaas_testbed.network.hosts import K_PIN_PREFIX, Host, check_free, join, new_network
from prfaas_testbed.network.plan import Plan, SiteAddress, next_hops, path_links, plan_network
from prfaas_testbed.network.ports import (
    Connection,
    PortBytes,
    connections,
    count_ports,
    end_reset_lines,
    kill_connection,
    read_ports,
    reset_lines,
)
from prfaas_testbed.network.router import RouterAgent, RouterError, Sample
from prfaas_testbed.network.state import Record
from prfaas_testbed.network.sysctls import (
    K_FORWARD,
    allow_congestion_controls,
    quiet_sysctls,
    site_sysctls,
)
from prfaas_testbed.network.tc import differences, qdisc_commands
from prfaas_testbed.network.traffic import CrossTraffic, Kind

K_WAN = "wan"
K_SAMPLE_EVERY_S = 0.1
K_TRAFFIC_PORT = 5920
K_CAPTURE_BLOCK_S = 1.2  # the kernel hands packets over in blocks, up to a second late; an end drops the last
Progress = Callable[[str], None]


class Site(Host):
    """A data centre: a host with one address and no way out but its link to the WAN."""

    address: str
    device: str


@dataclass(frozen=True)
class Applied:
    """A change of a link as it truly happened."""

    link: str
    asked_s: float
    """time.monotonic() at the call."""
    at_s: float
    """time.monotonic() when the router's kernel had taken the change."""
    uncertainty_s: float
    """The change took effect within this time before at_s."""
    state: Impairments
    """The link after it."""


@dataclass
class Captured:
    """How a capture went."""

    ended_early: bool = False
    """Before it was told to: at its most packets, or for a fault."""
    missed: int | None = None
    """Packets that the kernel dropped because they weren't taken in time; None: it isn't said."""


class Network:
    """Made by open_network. `emulation` is `native` or `appliance`, `sites` the hosts by name, `links` the
    state of each directed link as emulated (scaled).
    """

    def __init__(self, topology: Topology, workdir: Path, progress: Progress, record: Record) -> None:
        self.topology, self.workdir = topology, workdir
        self.links = topology.emulated()
        self.plan: Plan = plan_network(topology, self.links)
        self.hops = next_hops(topology, self.links)
        self.sites: dict[str, Site] = {}
        self.emulation = ""
        self.congestion_controls: list[str] = []
        """What a program inside a site may choose."""
        self.up_s = 0.0
        """How long bringing it up took."""
        self.down_s = 0.0
        """How long taking it down took, with all that ran in its sites."""
        self._progress, self._record = progress, record
        self._mininet = new_network()
        self._emulator: Emulation | None = None
        self._agent: RouterAgent | None = None
        self._wan: Host | None = None
        self._change_lock = threading.Lock()
        self._traffic: list[CrossTraffic] = []

    # Up and down

    def bring_up(self, emulation: str | None, folder: Path) -> None:
        began_s = time.monotonic()
        self._emulator = create(emulation)
        self._emulator.check_reach(self.links)
        self.emulation = self._emulator.name
        devices = {site: f"wan-{site}" for site in self.topology.sites}
        check_free(
            [K_PIN_PREFIX + name for name in (K_WAN, *self.topology.sites)],
            [*devices.values(), *(f"{site}-wan" for site in devices)],
        )
        self._progress(
            f"{self.emulation} emulation of {self.topology.name}: {', '.join(self.topology.sites)}"
        )
        keep = [checkout(), self.workdir, folder]
        self.congestion_controls = allow_congestion_controls(self._record)
        self._wan = Host(self._mininet, K_WAN, keep, self._record)
        self._wan.check(["sh", "-c", quiet_sysctls("")])
        for name, address in self.plan.sites.items():
            site = self.sites[name] = Site(self._mininet, name, keep, self._record)
            site.address, site.device = address.address, f"{name}-wan"
            join(site, site.device, self._wan, devices[name], self._record)
            site.check(["sh", "-c", site_sysctls()])
            site.check(["ip", "-batch", "-"], site_lines(site.device, address, self.plan.site_mtu_bytes))
            mtu = self.plan.site_mtu_bytes
            self._wan.check(["ip", "link", "set", devices[name], "arp", "off", "mtu", str(mtu), "up"])
        self._agent = self._emulator.start(self.plan, self._wan, devices, self._record, folder)
        for node in self.plan.nodes:
            self._agent.run(node, ["sh", "-c", K_FORWARD], self.plan.node_lines[node])
            if node in self.sites:
                # Merged packets would be lost, delayed and counted as one.
                self._agent.run(node, ["ethtool", "-K", "site", "gro", "off"])
            if self.plan.tc_lines[node]:
                make_links(self._agent, node, self.plan.tc_lines[node])
        self._emulator.started(self._record)
        self._emulator.cables(
            [
                (host, device)
                for site in self.sites.values()
                for host, device in ((site, site.device), (self._wan, devices[site.name]))
            ]
        )
        self.check_links()
        places = {link: [place.node, place.device] for link, place in self.plan.links.items()}
        edges = {site: [site, "site"] for site in self.sites}
        self._agent.order({"do": "observe", "links": places, "edges": edges, "every_s": K_SAMPLE_EVERY_S})
        self._emulator.settled()
        self.up_s = time.monotonic() - began_s
        self._progress(f"up in {self.up_s:.1f} s")
        for what, why in self.does_without.items():
            self._progress(f"the {self.emulation} does without {what}: {why}")

    def close(self) -> None:
        for traffic in self._traffic:
            if traffic.stopped_s is None:
                traffic.stop()
        if self._emulator is not None:
            self._emulator.stop()
        self._mininet.stop()

    # Measuring

    @property
    def agent(self) -> RouterAgent:
        if self._agent is None:
            raise UsageError("the network is not up")
        return self._agent

    @property
    def does_without(self) -> dict[str, str]:
        """What the emulation couldn't have of this machine, and why."""
        return self._emulator.does_without if self._emulator is not None else {}

    @property
    def factor(self) -> float:
        """What the topology's rates and queues are divided by."""
        return self.topology.scale.factor if self.topology.scale else 1.0

    def path(self, source: str, target: str) -> list[str]:
        """The directed links from site to site, in order."""
        return path_links(self.hops, source, target)

    def check_links(self) -> None:
        """Read every link's queueing disciplines back. Raises RouterError naming what isn't as wanted."""
        for node in self.plan.nodes:
            rows = json.loads(self.agent.run(node, ["tc", "-s", "-j", "qdisc", "show"]) or "[]")
            for link, place in self.plan.links.items():
                if place.node == node:
                    shown = [row for row in rows if row.get("dev") == place.device]
                    wrong = differences(self.links[link], shown)
                    if wrong:
                        raise RouterError(f"link {link} is not as asked for: {'; '.join(wrong)}")

    def sample(self) -> Sample:
        """The newest counters, at most 0.1 s old. Costs nothing: the router sends them by itself."""
        samples = self.agent.samples
        deadline = time.monotonic() + 5
        while not samples and time.monotonic() < deadline:
            time.sleep(0.01)
        if not samples:
            raise RouterError("the router sends no counters")
        return samples[-1]

    def samples(self, since_s: float = 0.0, until_s: float = float("inf")) -> list[Sample]:
        """All counters between two times of time.monotonic(), ten a second."""
        return [sample for sample in tuple(self.agent.samples) if since_s <= sample.at_s <= until_s]

    def calibrate(self) -> list[Calibration]:
        """Measure every link and say whether it is as wanted; see calibrate.py. Two sites take under 30 s."""
        return calibrate(self)

    def watch(self) -> Watch:
        """Begin to watch the emulator itself; `.verdict()` says whether it spoilt what happened since, and
        why.
        """
        assert self._emulator is not None
        return Watch(self._emulator, self.agent)

    def count_ports(self, groups: Mapping[str, Iterable[int]], sites: Iterable[str] | None = None) -> None:
        """Begin to count WAN bytes by groups of TCP ports, at all sites or the named ones; see port_bytes."""
        for name in sites or self.sites:
            count_ports(self.sites[name], self.sites[name].device, groups)

    def port_bytes(self, site: str) -> dict[str, PortBytes]:
        """Group to bytes and packets sent and received at the site since count_ports; the rest is `other`."""
        return read_ports(self.sites[site])

    @contextmanager
    def capture(
        self, site: str, file: Path, snap_bytes: int = 96, most_packets: int = 2_000_000
    ) -> Iterator[Captured]:
        """Headers of all that passes the WAN's edge at the site, into `file` (pcap), while the context
        lasts. What is yielded is filled in at its end.
        """
        assert self._wan is not None
        process = self._wan.popen(
            [
                "tcpdump", "-i", f"wan-{site}", "-n", "-p", "-U", "-Z", "root", "-B", "16384",
                "-s", str(snap_bytes), "-c", str(most_packets), "-w", file.resolve(),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            if "listening" not in said:
                raise MachineError(f"tcpdump at {site}: {said.strip() or 'did not start'}")
            captured = Captured()
            yield captured
            time.sleep(K_CAPTURE_BLOCK_S)
            captured.ended_early = process.poll() is not None
        finally:
            process.send_signal(signal.SIGINT)
            try:
                _, said = process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                said = ""
        captured.missed = missed_packets(said)

    # Changing

    def prepare_changes(self, links: Iterable[str]) -> None:
        """Be ready for changes of these links: they then start no process, which would hold up the packets
        of all links for some 50 ms.
        """
        if nodes := sorted({self.plan.links[link].node for link in links}):
            self.agent.prepare(nodes)
            assert self._emulator is not None
            self._emulator.settled()

    def apply(self, link: str, change: LinkChange, *, read_back: bool = True) -> Applied:
        """Change a directed link (`a->b`) now; packets under way keep what they met. Rates are the
        topology's, before scale. Without `read_back` that it took the change is only seen by `check_links`.
        Raises UsageError for an unknown link or an impossible change, MachineError for a rate out of reach,
        RouterError if it failed.
        """
        asked_s = time.monotonic()
        if link not in self.links:
            raise UsageError(f"no link {link!r}; there are: {', '.join(self.links)}")
        with self._change_lock:
            state = self.links[link].changed(change.divided(self.factor))
            assert self._emulator is not None
            self._emulator.check_reach({link: state})
            place = self.plan.links[link]
            lines = [" ".join(words) for words in qdisc_commands(place.device, state, "change")]
            began_s, ended_s = self.agent.change(place.node, lines)
            self.links[link] = state
            if read_back:
                self._read_back(link)
        return Applied(link, asked_s, ended_s, ended_s - began_s + self.agent.clock_error_s, state)

    def _read_back(self, link: str) -> None:
        place = self.plan.links[link]
        shown = self.agent.run(place.node, ["tc", "-s", "-j", "qdisc", "show", "dev", place.device])
        wrong = differences(self.links[link], json.loads(shown))
        if wrong:
            raise RouterError(f"link {link} did not take the change: {'; '.join(wrong)}")

    def connections(self, site: str, port: int | None = None) -> list[Connection]:
        """Established TCP connections of the site; with `port`, those that have it at either end."""
        return connections(self.sites[site], port)

    def cut(self, site: str, port: int, hold_s: float = 1.0) -> Connection | None:
        """Reset one established TCP connection with `port` at either end; None if there is none.

        By the kernel where it can end a socket from outside, otherwise by answering the connection's segments
        with resets for up to `hold_s`.
        """
        here = self.sites[site]
        for victim in connections(here, port):
            if kill_connection(here, victim):
                return victim
            here.check(["nft", "-f", "-"], reset_lines(victim))
            deadline = time.monotonic() + hold_s
            try:
                while victim in connections(here, port) and time.monotonic() < deadline:
                    time.sleep(0.02)
            finally:
                here.check(["nft", "-f", "-"], end_reset_lines())
            return victim
        return None

    def cross_traffic(
        self, source: str, target: str, kind: Kind, rate_mbps: float | None = None, streams: int = 1
    ) -> CrossTraffic:
        """iperf3 from site to site, until its `stop()`. Several at once are fine. The rate is one of Ethernet
        frames and the topology's, before scale.
        """
        traffic = self.prepare_traffic(source, target, kind, rate_mbps, streams)
        traffic.begin()
        return traffic

    def prepare_traffic(
        self, source: str, target: str, kind: Kind, rate_mbps: float | None = None, streams: int = 1
    ) -> CrossTraffic:
        """The same, from its `begin()` on: what takes time to start is there already. Raises MachineError
        where the kernel lacks its congestion control: nothing else may stand for that.
        """
        if kind != "udp" and kind not in self.congestion_controls:
            raise MachineError(
                f"cross-traffic by {kind}: this kernel offers {', '.join(self.congestion_controls)} alone; "
                f"load its module (modprobe tcp_{kind}), or name another kind"
            )
        port = K_TRAFFIC_PORT + len(self._traffic)
        mtu_bytes = min(self.links[link].mtu_bytes for link in self.path(source, target))
        if rate_mbps is not None:
            rate_mbps /= self.factor
        traffic = CrossTraffic(
            self.sites[source], self.sites[target], kind, rate_mbps, streams, port, mtu_bytes
        )
        self._traffic.append(traffic)
        return traffic


def make_links(agent: RouterAgent, node: str, lines: Sequence[str]) -> None:
    """Raises MachineError where the kernel lacks what one of them is made of, and not RouterError: nothing
    was measured that could have fallen short.
    """
    try:
        agent.run(node, ["tc", "-batch", "-"], lines)
    except RouterError as error:
        raise MachineError(f"this machine's tc or kernel can't make the links of {node}: {error}") from None


def missed_packets(said: str) -> int | None:
    """Out of tcpdump's last words. Pure."""
    found = re.search(r"^(\d+) packets? dropped by kernel", said, re.MULTILINE)
    return int(found.group(1)) if found else None


def site_lines(device: str, site: SiteAddress, mtu_bytes: int) -> list[str]:
    """ip -batch in a site: one address, one way out, and the gateway's hardware address written down."""
    return [
        "link set lo up",
        f"link set dev {device} address {site.mac} mtu {mtu_bytes} txqueuelen 10000",
        f"addr add {site.address}/24 dev {device}",
        f"link set dev {device} up",
        f"neigh replace {site.gateway} lladdr {site.gateway_mac} dev {device} nud permanent",
        f"route add default via {site.gateway}",
    ]
