"""Whose bytes were they? nftables counters inside a site, by sets of TCP ports; and resets for one
connection.

Counted are IP packets that cross the site's WAN device, retransmissions included; a frame on the WAN has 14
bytes more. A packet belongs to the first group with either of its ports, otherwise to `other`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prfaas.config.topology import K_FRAME_OVERHEAD_BYTES
from prfaas.model.errors import UsageError

if TYPE_CHECKING:
    from prfaas_testbed.network.hosts import Host

K_TABLE = "prfaas_ports"
K_CUT_TABLE = "prfaas_cut"
K_OTHER = "other"


@dataclass(frozen=True)
class PortBytes:
    """IP bytes and packets of one group at one site."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int

    @property
    def sent_frame_bytes(self) -> int:
        """As the WAN's queueing disciplines count."""
        return self.sent_bytes + K_FRAME_OVERHEAD_BYTES * self.sent_packets

    @property
    def received_frame_bytes(self) -> int:
        return self.received_bytes + K_FRAME_OVERHEAD_BYTES * self.received_packets


@dataclass(frozen=True)
class Connection:
    """An established TCP connection, seen from one of its sites."""

    local_port: int
    peer: str
    peer_port: int


def count_ports(site: Host, device: str, groups: Mapping[str, Iterable[int]]) -> None:
    """Begin to count at the site, from nought. Raises UsageError for a port in two groups, MachineError
    from nft.
    """
    site.check(["nft", "-f", "-"], counter_lines(device, groups))


def counter_lines(device: str, groups: Mapping[str, Iterable[int]]) -> list[str]:
    """nft's commands. Pure."""
    seen: dict[int, str] = {}
    lines = [f"table ip {K_TABLE}", f"delete table ip {K_TABLE}", f"add table ip {K_TABLE}"]
    rules = []
    for name, ports in groups.items():
        wanted = sorted(set(ports))
        if not name.isidentifier() or name == K_OTHER:
            raise UsageError(f"port group {name!r}: a plain name, other than {K_OTHER!r}")
        for port in wanted:
            if port in seen:
                raise UsageError(f"port {port} is in two groups, {seen[port]} and {name}")
            seen[port] = name
        if wanted:
            rules.append((name, "{ " + ", ".join(map(str, wanted)) + " }"))
    for chain, hook, way in (("sent", "output", "oifname"), ("received", "input", "iifname")):
        for name in [*groups, K_OTHER]:
            lines.append(f"add counter ip {K_TABLE} {chain}_{name}")
        lines.append(f"add chain ip {K_TABLE} {chain} {{ type filter hook {hook} priority 0; }}")
        head = f"add rule ip {K_TABLE} {chain} {way} {device}"
        for name, ports_set in rules:
            for end in ("sport", "dport"):
                lines.append(f"{head} tcp {end} {ports_set} counter name {chain}_{name} accept")
        lines.append(f"{head} counter name {chain}_{K_OTHER}")
    return lines


def read_ports(site: Host) -> dict[str, PortBytes]:
    """Group to its counts. Raises MachineError if counting was not begun."""
    return counters_of(site.check(["nft", "-j", "list", "counters", "table", "ip", K_TABLE]))


def counters_of(text: str) -> dict[str, PortBytes]:
    """nft's JSON as counts. Pure."""
    raw: dict[str, tuple[int, int]] = {}
    for item in json.loads(text)["nftables"]:
        if "counter" in item:
            raw[item["counter"]["name"]] = item["counter"]["bytes"], item["counter"]["packets"]
    names = [name.removeprefix("sent_") for name in raw if name.startswith("sent_")]
    return {name: PortBytes(*raw[f"sent_{name}"], *raw[f"received_{name}"]) for name in names}


def connections(site: Host, port: int | None = None) -> list[Connection]:
    """Established connections of the site, those alone that have `port` at either end if it is named."""
    which = [] if port is None else [f"( sport = :{port} or dport = :{port} )"]
    return connections_of(site.check(["ss", "-H", "-t", "-n", "state", "established", *which]))


def connections_of(shown: str) -> list[Connection]:
    """Lines of ss as connections. Pure."""
    found = []
    for line in shown.splitlines():
        fields = line.split()
        if len(fields) >= 4:
            local, peer = fields[-2], fields[-1]
            address, _, peer_port = peer.rpartition(":")
            address = address.strip("[]").removeprefix("::ffff:")
            found.append(Connection(int(local.rpartition(":")[2]), address, int(peer_port)))
    return found


def kill_connection(site: Host, connection: Connection) -> bool:
    """Reset one connection at this end, by the kernel. False where it can't (no INET_DIAG_DESTROY)."""
    c = connection
    done = site.run(
        [
            "ss",
            "-H",
            "-K",
            "-t",
            "dst",
            c.peer,
            "sport",
            "=",
            f":{c.local_port}",
            "dport",
            "=",
            f":{c.peer_port}",
        ]
    )
    return done.returncode == 0 and bool(done.stdout.strip())


def reset_lines(connection: Connection) -> list[str]:
    """nft's commands that answer the connection's next segments, either way, with a reset. Pure."""
    c = connection
    lines = [f"table ip {K_CUT_TABLE}", f"delete table ip {K_CUT_TABLE}", f"add table ip {K_CUT_TABLE}"]
    out = f"ip daddr {c.peer} tcp sport {c.local_port} tcp dport {c.peer_port}"
    back = f"ip saddr {c.peer} tcp sport {c.peer_port} tcp dport {c.local_port}"
    for hook, match in (("output", out), ("input", back)):
        lines.append(f"add chain ip {K_CUT_TABLE} {hook} {{ type filter hook {hook} priority -5; }}")
        lines.append(f"add rule ip {K_CUT_TABLE} {hook} {match} reject with tcp reset")
    return lines


def end_reset_lines() -> list[str]:
    return [f"delete table ip {K_CUT_TABLE}"]
