"""A topology as addresses, routes and commands for the router. Pure: nothing is run here.

Every site and hub gets a router of its own, a network namespace inside the emulation; a pair of links is a
veth cable between two of them, and each end's queueing disciplines are one directed link. No address is
resolved over a link: neighbours are written down, so that neither loss nor delay ever hits an ARP packet.
"""

from __future__ import annotations

import heapq
import ipaddress
from dataclasses import dataclass

from prfaas.config.topology import Impairments, Topology
from prfaas_testbed.network.tc import qdisc_commands

K_SITE_DEVICE = "site"  # in a site's router: towards the site's host
K_EDGE_QUEUE_PACKETS = 20_000  # of a router's device towards its host; what overflows there was not planned
K_LONGEST_FRAME_MTU = 9000


@dataclass(frozen=True)
class SiteAddress:
    address: str
    gateway: str
    mac: str
    gateway_mac: str


@dataclass(frozen=True)
class LinkPlace:
    """Where a directed link lives: the device `device` in the namespace of router `node`."""

    node: str
    device: str


@dataclass(frozen=True)
class Plan:
    nodes: tuple[str, ...]
    site_mtu_bytes: int
    """Of the sites' own devices: the largest of any link, so that path MTU discovery has work to do."""
    sites: dict[str, SiteAddress]
    links: dict[str, LinkPlace]
    router_lines: tuple[str, ...]
    """ip -batch in the router's own namespace: routers and the cables between them."""
    node_lines: dict[str, tuple[str, ...]]
    """ip -batch in each router, once the device to its site is in it."""
    tc_lines: dict[str, tuple[str, ...]]
    """tc -batch in each router."""


def plan_network(topology: Topology, states: dict[str, Impairments]) -> Plan:
    network = ipaddress.ip_network(topology.subnet)
    site_mtu_bytes = max(state.mtu_bytes for state in states.values())
    nodes = (*topology.sites, *topology.hubs)
    sites = {name: _site_address(network, number) for number, name in enumerate(topology.sites, 1)}
    links: dict[str, LinkPlace] = {}
    router_lines = [f"netns add {node}" for node in nodes]
    node_lines: dict[str, list[str]] = {node: ["link set lo up"] for node in nodes}
    tc_lines: dict[str, list[str]] = {node: [] for node in nodes}
    hop_address: dict[tuple[str, str], str] = {}
    for name, site in sites.items():
        node_lines[name] += [
            f"link set dev {K_SITE_DEVICE} address {site.gateway_mac} mtu {site_mtu_bytes} "
            f"txqueuelen {K_EDGE_QUEUE_PACKETS}",
            f"addr add {site.gateway}/24 dev {K_SITE_DEVICE}",
            f"link set dev {K_SITE_DEVICE} up",
            f"neigh replace {site.address} lladdr {site.mac} dev {K_SITE_DEVICE} nud permanent",
        ]
    for number, (a, b) in enumerate(_cables(states)):
        router_lines.append(f"link add to-{b} netns {a} type veth peer name to-{a} netns {b}")
        base = int(network.network_address) + 128 * 256 + 2 * number
        addresses = {a: str(ipaddress.ip_address(base)), b: str(ipaddress.ip_address(base + 1))}
        macs = {node: f"02:71:00:{number:02x}:00:{end:02x}" for end, node in enumerate((a, b))}
        for here, there in ((a, b), (b, a)):
            device = f"to-{there}"
            links[f"{here}->{there}"] = LinkPlace(here, device)
            hop_address[here, there] = addresses[there]
            node_lines[here] += [
                f"link set dev {device} address {macs[here]} mtu {K_LONGEST_FRAME_MTU}",
                f"addr add {addresses[here]}/31 dev {device}",
                f"link set dev {device} up",
                f"neigh replace {addresses[there]} lladdr {macs[there]} dev {device} nud permanent",
            ]
            tc_lines[here] += [
                " ".join(words) for words in qdisc_commands(device, states[f"{here}->{there}"])
            ]
    hops = next_hops(topology, states)
    for (here, target), there in sorted(hops.items()):
        subnet = ipaddress.ip_network(f"{sites[target].address}/24", strict=False)
        # The limit is the route's: a device's own would also bind what comes in, from the other direction.
        mtu_bytes = states[f"{here}->{there}"].mtu_bytes
        node_lines[here].append(
            f"route add {subnet} via {hop_address[here, there]} dev to-{there} mtu {mtu_bytes}"
        )
    return Plan(
        nodes=nodes,
        site_mtu_bytes=site_mtu_bytes,
        sites=sites,
        links=links,
        router_lines=tuple(router_lines),
        node_lines={node: tuple(lines) for node, lines in node_lines.items()},
        tc_lines={node: tuple(lines) for node, lines in tc_lines.items()},
    )


def next_hops(topology: Topology, states: dict[str, Impairments]) -> dict[tuple[str, str], str]:
    """(node, target site) to the node that comes next: least delay, then fewest links; only hubs pass
    traffic on.
    """
    into: dict[str, list[tuple[float, str]]] = {}
    for name, state in states.items():
        here, _, there = name.partition("->")
        into.setdefault(there, []).append((state.delay_ms, here))
    hops: dict[tuple[str, str], str] = {}
    for target in topology.sites:
        heap: list[tuple[float, int, str, str]] = [(0.0, 0, target, "")]
        done: set[str] = set()
        while heap:
            delay_ms, count, here, following = heapq.heappop(heap)
            if here in done:
                continue
            done.add(here)
            if following:
                hops[here, target] = following
            if here in topology.sites and here != target:
                continue
            for more_ms, before in into.get(here, []):
                heapq.heappush(heap, (delay_ms + more_ms, count + 1, before, here))
    return hops


def path_links(hops: dict[tuple[str, str], str], source: str, target: str) -> list[str]:
    """The directed links that packets from site to site really take."""
    path, here = [], source
    while here != target:
        there = hops[here, target]
        path.append(f"{here}->{there}")
        here = there
    return path


def _cables(states: dict[str, Impairments]) -> list[tuple[str, str]]:
    seen: dict[frozenset[str], tuple[str, str]] = {}
    for name in states:
        a, _, b = name.partition("->")
        seen.setdefault(frozenset((a, b)), (a, b))
    return list(seen.values())


def _site_address(network: ipaddress.IPv4Network | ipaddress.IPv6Network, number: int) -> SiteAddress:
    base = int(network.network_address) + 256 * number
    return SiteAddress(
        address=str(ipaddress.ip_address(base + 2)),
        gateway=str(ipaddress.ip_address(base + 1)),
        mac=f"02:70:00:00:{number:02x}:02",
        gateway_mac=f"02:70:00:00:{number:02x}:01",
    )
