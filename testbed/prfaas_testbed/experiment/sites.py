"""Small things done inside sites: isolation tried, frames counted by port, pumps asked, streams cut."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfaas.model.errors import PrfaasError

if TYPE_CHECKING:
    from prfaas_testbed.network import Network, Site

K_STATS = [sys.executable, "-m", "prfaas_testbed.experiment.inside"]
K_PROBE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("probe_sockets.py"))]
K_TCP_HEADERS_BYTES = 14 + 20 + 20 + 12  # Ethernet, IP, TCP with timestamps
K_ASK_S = 20.0
K_SENT = (
    "payload_bytes_sent",
    "framing_bytes_sent",
    "control_bytes_sent",
    "tcp_bytes_sent",
    "segments_out",
    "retransmitted_bytes",
    "payload_bytes_received",
    "streams_opened",
    "streams_lost",
)
K_RISING = ("payload_bytes_sent", "framing_bytes_sent", "streams_opened", "streams_lost")
K_ACCOUNTED = (
    "accounted_bytes",
    "payload_bytes",
    "framing_bytes",
    "control_bytes",
    "retransmitted_bytes",
    "stream_bytes",
    "tls_bytes",
    "header_bytes",
    "streams_opened",
    "streams_lost",
)
# What one end of a connection counts, and what the other calls the same bytes.
K_OTHER_END = {
    "payload_bytes_sent": "payload_bytes_received",
    "payload_bytes_received": "payload_bytes_sent",
    "framing_bytes_sent": "framing_bytes_received",
    "control_bytes_sent": "control_bytes_received",
    "tcp_bytes_sent": "tcp_bytes_received",
    "segments_out": "segments_in",
    "streams_opened": "streams_opened",
    "streams_lost": "streams_lost",
}


def pump_stats(sites: Sequence[Site], configs: Sequence[Path]) -> list[dict[str, Any]]:
    """Each site's pump's counters, asked of all at once. Raises PrfaasError with what a site said."""
    return _answers([(site, [*K_STATS, str(path)]) for site, path in zip(sites, configs, strict=True)])


def _answers(asked: Sequence[tuple[Site, list[str]]]) -> list[Any]:
    """The JSON that programs in sites print."""
    running = [
        (site, words, site.popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        for site, words in asked
    ]
    found = []
    try:
        for site, words, process in running:
            try:
                out, err = process.communicate(timeout=K_ASK_S)
            except subprocess.TimeoutExpired:
                raise PrfaasError(f"site {site.name}: no answer from {words[-2]} in {K_ASK_S:g} s") from None
            if process.returncode:
                raise PrfaasError(f"site {site.name}: {(err.strip().splitlines() or ['failed'])[-1]}")
            found.append(json.loads(out))
    finally:
        for _, _, process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


def try_isolation(net: Network) -> dict[str, Any]:
    """Whether a site can open another's sockets, or has a way out that isn't the WAN."""
    paths = {
        name: [f"{place}/prfaas-isolation-{name}.sock" for place in ("/tmp", "/run", "/dev/shm")]
        for name in net.sites
    }
    holders = [
        site.popen(
            [*K_PROBE, "listen", *paths[name]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name, site in net.sites.items()
    ]
    leaks: list[str] = []
    try:
        for holder in holders:
            assert holder.stdout is not None
            holder.stdout.readline()
        every = [path for own in paths.values() for path in own]
        reached = _answers([(site, [*K_PROBE, "reach", *every]) for site in net.sites.values()])
        for name, found in zip(net.sites, reached, strict=True):
            # Its own it must reach: else the trial would prove nothing.
            if not set(paths[name]) <= set(found):
                leaks.append(f"{name} can't reach its own sockets: the trial says nothing")
            leaks += [f"{name} opened {path}" for path in found if path not in paths[name]]
    finally:
        for holder in holders:
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.close()
            holder.wait(timeout=10)
            holder.stdout.close()
    for name, site in net.sites.items():
        devices = [row["ifname"] for row in json.loads(site.check(["ip", "-j", "link", "show", "up"]))]
        routes = json.loads(site.check(["ip", "-j", "route", "show"]))
        leaks += [f"{name} has another device {d}" for d in devices if d not in ("lo", site.device)]
        leaks += [f"{name} has a route by {r['dev']}" for r in routes if r["dev"] != site.device]
    return {"isolated": not leaks, "leaks": leaks, "sites": list(net.sites)}


def frames_of(net: Network, site: str) -> dict[str, int]:
    """What has left the site since `net.count_ports`: {"pump_bytes", "pump_packets", "other_bytes"},
    frames."""
    groups = net.port_bytes(site)
    return {
        "pump_bytes": groups["pump"].sent_frame_bytes,
        "pump_packets": groups["pump"].sent_packets,
        "other_bytes": groups["other"].sent_frame_bytes,
    }


def pump_sent(stats: dict[str, Any]) -> dict[str, int]:
    """What a pump's connections to other sites sent, by its own counters and TCP_INFO; both directions of
    dialling.

    A site's own servers may meet at its pump, which then dials itself: that crosses no WAN. The dialling end
    is a peer of the pump's own site and is left out; the accepting end is one of many in `inbound`, so what
    it did is taken off as the dialling end saw it.
    """
    total = dict.fromkeys(K_SENT, 0)
    own = stats.get("site")
    peers = [row for row in stats["peers"] if own is None or row.get("site") != own]
    for row in [*peers, stats["inbound"], stats.get("forwards", {})]:
        for name in total:
            total[name] += int(row.get(name, 0))
    for row in stats["peers"]:
        if own is not None and row.get("site") == own:
            for name, mirrored in K_OTHER_END.items():
                total[name] -= int(row.get(mirrored, 0))
    return total


def account(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """One site's outgoing bytes over a stretch of time: what the WAN carried, and what explains it.

    Both hold `pump` (pump_sent), `frames` (frames_of), `wan_bytes`, `wan_packets` and `wan_losses` of
    the outgoing link. Accounted: TCP's bytes of the pumps (payload, framing, control, TLS records and what
    was sent again, by TCP_INFO), their segments' headers, and every other frame that left the site.

    A pump that was started again counts from nought: what it had sent before isn't known, and only the WAN's
    bytes are told (`started_again`). Where a connection ended under it, it may have been given bytes that it
    never sent, so that what TLS added isn't known either.
    """
    pump = {name: after["pump"][name] - before["pump"][name] for name in after["pump"]}
    frames = {name: after["frames"][name] - before["frames"][name] for name in after["frames"]}
    delivered = after["wan_bytes"] - before["wan_bytes"]
    packets = after["wan_packets"] - before["wan_packets"]
    losses = after["wan_losses"] - before["wan_losses"]
    other = frames["other_bytes"]
    # A lost frame left the sender as well; it is taken to be of the mean size.
    lost_bytes = round(losses * delivered / packets) if packets else 0
    if any(pump[name] < 0 for name in K_RISING):
        unknown = dict.fromkeys(K_ACCOUNTED)
        return {
            "wan_bytes": delivered + lost_bytes,
            "wan_lost_bytes": lost_bytes,
            "outside_pumps_bytes": other,
            "started_again": True,
        } | unknown
    if pump["payload_bytes_sent"]:
        headers = pump["segments_out"] * K_TCP_HEADERS_BYTES
    else:
        # Acknowledgements carry SACK blocks, so their headers have no one size: they are counted at the site.
        headers = frames["pump_bytes"] - pump["tcp_bytes_sent"]
    explained = pump["payload_bytes_sent"] + pump["framing_bytes_sent"] + pump["control_bytes_sent"]
    again = pump["retransmitted_bytes"]
    return {
        "wan_bytes": delivered + lost_bytes,
        "wan_lost_bytes": lost_bytes,
        "outside_pumps_bytes": other,
        "accounted_bytes": pump["tcp_bytes_sent"] + headers + other,
        "payload_bytes": pump["payload_bytes_sent"],
        "framing_bytes": pump["framing_bytes_sent"],
        "control_bytes": pump["control_bytes_sent"] + other,
        "retransmitted_bytes": again,
        "stream_bytes": pump["tcp_bytes_sent"] - again,
        "tls_bytes": None if pump["streams_lost"] else pump["tcp_bytes_sent"] - again - explained,
        "header_bytes": headers,
        "streams_opened": pump["streams_opened"],
        "streams_lost": pump["streams_lost"],
    }


def cut_streams(
    net: Network, source: str, target: str, pump_port: int, streams: int, patience_s: float = 10.0
) -> dict[str, Any]:
    """Reset connections to a peer's pump while they carry bytes; which, and what they had unsent or
    unacknowledged.

    Waits up to `patience_s` for one that is busy; then, or where the kernel can't end sockets, any is taken.
    """
    site, address = net.sites[source], net.sites[target].address
    end_s = time.monotonic() + patience_s
    cut: list[dict[str, Any]] = []
    while len(cut) < streams and time.monotonic() < end_s:
        to_peer = ["dst", address, "dport", "=", f":{pump_port}"]
        shown = site.check(["ss", "-tnH", "state", "established", *to_peer])
        busy = []
        for line in shown.splitlines():
            fields = line.split()
            if len(fields) >= 4 and int(fields[1]) > 0:
                busy.append((int(fields[1]), fields[2].rpartition(":")[2]))
        for queued, port in sorted(busy, reverse=True)[: streams - len(cut)]:
            if port in site.run(["ss", "-KtnH", *to_peer, "sport", "=", f":{port}"]).stdout:
                cut.append({"port": int(port), "queued_bytes": queued})
        if len(cut) < streams:
            time.sleep(0.005)
    while len(cut) < streams and (victim := net.cut(source, pump_port)) is not None:
        cut.append({"port": victim.local_port, "queued_bytes": None})
    return {"streams": len(cut), "cut": cut}


def write_json(path: Path, data: Any) -> Path:
    """For files that processes inside sites read (YAML readers take JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def least_rtt_ms(stats: dict[str, Any]) -> float | None:
    """The least RTT that TCP_INFO knows on a pump's connections to other sites."""
    found = [
        float(stream.get("min_rtt_s") or 0.0)
        for peer in stats["peers"]
        if peer.get("site") != stats.get("site")
        for stream in peer.get("streams", ())
    ]
    known = [value for value in found if value > 0]
    return round(1000 * min(known), 3) if known else None
