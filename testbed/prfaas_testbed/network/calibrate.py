"""Is the network what the topology asks for? Each path is measured, each way, and held against what is
wanted.

A row is one way between two sites: on a direct link, that link; through hubs, the links of its path
together. RTT is ping's median less the router's own (pings to the gateways on the same devices), rate is
iperf3's, loss comes from numbered datagrams one way. A row that misses is measured once more and both are
kept. The tools run ahead of everything but the emulator: what is measured is the link, not how busy the
processors are.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfaas.config.topology import K_FRAME_OVERHEAD_BYTES, Impairments
from prfaas.model.errors import PrfaasError
from prfaas_testbed.network.statistics import (
    K_Z,
    Chain,
    binomial_interval,
    burst_interval,
    chain_interval,
    packets_needed,
    survival,
)
from prfaas_testbed.network.traffic import K_TCP_HEADERS_BYTES, K_UDP_HEADERS_BYTES, iperf_server

if TYPE_CHECKING:
    from prfaas_testbed.network.network import Network, Site

K_RTT_SHARE, K_RTT_MS = 0.02, 0.5
K_RATE_SHARE = 0.05
K_PINGS, K_PING_EVERY_S = 60, 0.02
K_PROBE_PAYLOAD_BYTES = 200
K_PROBE_PER_S = 5000.0
K_PROBE_S = 6.0  # the most one probe takes; with it, "20/p packets or as many as time allows"
K_RATE_S = 3
K_TCP_LOSS = 0.02
K_UDP_MBPS = 120.0
K_PORT = 5901
K_FIRST = ["nice", "-n", "-20"]  # a real-time priority would share the emulator's real-time budget


@dataclass(frozen=True)
class Calibration:
    """One way between two sites. Losses are shares, 0..1; intervals are closed."""

    link: str
    direction: str
    path: list[str]
    wanted_rtt_ms: float
    measured_rtt_ms: float | None = None
    router_rtt_ms: float | None = None
    """The emulation's own, taken off measured_rtt_ms."""
    measured_delay_ms: float | None = None
    """One way, the router's own included."""
    wanted_rate_mbps: float | None = None
    """Of payload, after what headers and loss take."""
    measured_rate_mbps: float | None = None
    rate_by: str | None = None
    wanted_loss: float = 0.0
    measured_loss: float | None = None
    loss_interval: tuple[float, float] | None = None
    packets: int = 0
    wanted_burst: float | None = None
    measured_burst: float | None = None
    burst_interval: tuple[float, float] | None = None
    misses: list[str] = field(default_factory=list)
    attempt: int = 1

    @property
    def inside(self) -> bool:
        return not self.misses

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "inside": self.inside}


def calibrate(net: Network) -> list[Calibration]:
    """All rows, misses and their repetitions included; the last row of a direction is the one that counts."""
    rows: list[Calibration] = []
    for a, b in covering_pairs(net):
        first = measure(net, a, b, (a, b))
        rows += first
        missed = tuple(row.direction.partition("->")[0] for row in first if not row.inside)
        if missed:
            rows += [replace(row, attempt=2) for row in measure(net, a, b, missed)]
    return rows


def verdict(rows: list[Calibration]) -> list[str]:
    """What is outside even the second time: a line a direction, none when the network is as asked for."""
    last = {row.direction: row for row in rows}
    return [f"{row.direction}: {'; '.join(row.misses)}" for row in last.values() if not row.inside]


def covering_pairs(net: Network) -> list[tuple[str, str]]:
    """Pairs of sites whose paths, both ways, cover every link; direct links first."""
    names = list(net.sites)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs.sort(key=lambda pair: len(net.path(*pair)))
    chosen, covered = [], set[str]()
    for a, b in pairs:
        links = {*net.path(a, b), *net.path(b, a)}
        if links - covered:
            chosen.append((a, b))
            covered |= links
    return chosen


def measure(net: Network, a: str, b: str, sources: tuple[str, ...]) -> list[Calibration]:
    """The ways out of `sources` between two sites: RTT and loss both ways at once, rate one after the
    other.
    """
    rows = []
    rtts = measure_rtts(net, a, b)
    probes = measure_loss(net, a, b)
    for source, target in ((a, b), (b, a)):
        if source not in sources:
            continue
        path = net.path(source, target)
        states = [net.links[link] for link in path]
        back = [net.links[link] for link in net.path(target, source)]
        row = Calibration(
            link=f"{a}-{b}",
            direction=f"{source}->{target}",
            path=path,
            wanted_rtt_ms=sum(state.delay_ms for state in [*states, *back]),
        )
        row = judge_rtt(row, rtts[source], rtts, [*states, *back])
        row = judge_loss(row, probes[source], states)
        row = judge_rate(net, row, source, target, states)
        rows.append(row)
    return rows


# Delay


def measure_rtts(net: Network, a: str, b: str) -> dict[str, list[float]]:
    """Pings in ms: from each site to the other under its name, to its own gateway under `gateway NAME`."""
    started = {}
    for source, target in ((a, b), (b, a)):
        site = net.sites[source]
        started[source] = ping(site, net.sites[target].address)
        started[f"gateway {source}"] = ping(site, net.plan.sites[source].gateway)
    found = {}
    for name, process in started.items():
        out, _ = process.communicate(timeout=60)
        found[name] = [float(ms) for ms in re.findall(r"time=([\d.]+) ms", out)]
    return found


def ping(site: Site, address: str) -> subprocess.Popen[Any]:
    return site.popen(
        [*K_FIRST, "ping", "-n", "-c", str(K_PINGS), "-i", str(K_PING_EVERY_S), "-W", "3", address],
        stdout=subprocess.PIPE,
        text=True,
    )


def judge_rtt(
    row: Calibration, times_ms: list[float], all_ms: dict[str, list[float]], states: list[Impairments]
) -> Calibration:
    gateways = [
        statistics.median(times) for name, times in all_ms.items() if name.startswith("gateway") and times
    ]
    if not times_ms or len(gateways) < 2:
        return replace(row, misses=[*row.misses, "no answer to pings"])
    own_ms = sum(gateways)
    measured_ms = statistics.median(times_ms) - own_ms
    # The median of a jittered delay strays by itself (1.25: that of a normal law, against its mean).
    jitter_ms = math.sqrt(sum(state.jitter_ms**2 for state in states))
    stray_ms = K_Z * 1.25 * jitter_ms / math.sqrt(len(times_ms))
    allowed_ms = max(K_RTT_SHARE * row.wanted_rtt_ms, K_RTT_MS) + stray_ms
    misses = list(row.misses)
    if abs(measured_ms - row.wanted_rtt_ms) > allowed_ms:
        misses.append(f"RTT {measured_ms:.2f} ms, wanted {row.wanted_rtt_ms:g} ± {allowed_ms:.2f} ms")
    return replace(row, measured_rtt_ms=round(measured_ms, 3), router_rtt_ms=round(own_ms, 3), misses=misses)


# Loss


def measure_loss(net: Network, a: str, b: str) -> dict[str, dict[str, Any]]:
    """Numbered datagrams both ways at once; the receivers' summaries by sending site."""
    script = str(Path(__file__).with_name("probe.py"))
    receivers: dict[str, subprocess.Popen[Any]] = {}
    senders: list[tuple[str, list[str]]] = []
    for number, (source, target) in enumerate(((a, b), (b, a))):
        states = [net.links[link] for link in net.path(source, target)]
        per_s, packets = probe_size(states)
        port = str(K_PORT + number)
        address = net.sites[target].address
        limit_s = packets / per_s * 2 + 10
        receivers[source] = net.sites[target].popen(
            [*K_FIRST, sys.executable, "-I", "-S", script, "receive", address, port, str(limit_s)],
            stdout=subprocess.PIPE,
            text=True,
        )
        size = str(K_PROBE_PAYLOAD_BYTES)
        senders.append(
            (
                source,
                [
                    *K_FIRST,
                    sys.executable,
                    "-I",
                    "-S",
                    script,
                    "send",
                    address,
                    port,
                    str(packets),
                    str(per_s),
                    size,
                ],
            )
        )
    for process in receivers.values():
        assert process.stdout is not None
        process.stdout.readline()
    running = [net.sites[source].popen(words) for source, words in senders]
    for process in running:
        process.wait(timeout=60)
    found = {}
    for source, process in receivers.items():
        out, _ = process.communicate(timeout=60)
        found[source] = json.loads(out)
    return found


def probe_size(states: list[Impairments]) -> tuple[float, int]:
    """(packets a second, packets): a small share of the rate, 20/p packets (of bursty loss, as many bursts)
    where the time allows.
    """
    frame_bits = 8 * probe_frame_bytes()
    rates = [state.rate_mbps * 1e6 for state in states if state.rate_mbps is not None]
    per_s = min([K_PROBE_PER_S, *(0.3 * rate / frame_bits for rate in rates)])
    loss = 1 - survival(states, probe_frame_bytes())
    bursts = [Chain.of(state.bursty_loss).mean_burst for state in states if state.bursty_loss is not None]
    return per_s, packets_needed(loss, int(per_s * K_PROBE_S), max(bursts, default=1.0))


def probe_frame_bytes() -> int:
    return K_PROBE_PAYLOAD_BYTES + K_UDP_HEADERS_BYTES + K_FRAME_OVERHEAD_BYTES


def judge_loss(row: Calibration, probe: dict[str, Any], states: list[Impairments]) -> Calibration:
    wanted = 1 - survival(states, probe_frame_bytes())
    if not probe["complete"] or not probe["sent"]:
        return replace(row, wanted_loss=wanted, misses=[*row.misses, "loss: the probe's end never came"])
    misses = list(row.misses)
    packets, lost = probe["sent"], probe["lost"] / probe["sent"]
    row = replace(
        row, wanted_loss=wanted, measured_loss=lost, packets=packets, measured_delay_ms=probe["delay_ms"]
    )
    chains = [Chain.of(state.bursty_loss) for state in states if state.bursty_loss is not None]
    if chains:
        low, high = chain_path_interval(packets, states, chains)
    else:
        low, high = binomial_interval(packets, wanted)
    if not low <= lost <= high:
        misses.append(f"loss {lost:.4%} of {packets}, wanted {wanted:.4%} within {low:.4%} to {high:.4%}")
    row = replace(row, loss_interval=(low, high))
    if len(chains) == 1 and len(states) == 1 and probe["bursts"] >= 5:
        length = probe["lost"] / probe["bursts"]
        bounds = burst_interval(probe["bursts"], chains[0])
        row = replace(row, wanted_burst=chains[0].mean_burst, measured_burst=length, burst_interval=bounds)
        if not bounds[0] <= length <= bounds[1]:
            misses.append(
                f"bursts of {length:.2f} packets, wanted {chains[0].mean_burst:.2f} "
                f"within {bounds[0]:.2f} to {bounds[1]:.2f}"
            )
    return replace(row, misses=misses)


def chain_path_interval(packets: int, states: list[Impairments], chains: list[Chain]) -> tuple[float, float]:
    """Of a path with bursty links: the chains' variances and the rest's, added."""
    wanted = 1 - survival(states, probe_frame_bytes())
    if len(states) == 1:
        return chain_interval(packets, chains[0])
    others = max(0.0, wanted - sum(chain.mean for chain in chains))
    variance = sum(chain.mean_deviation(packets) ** 2 for chain in chains) + others * (1 - others) / packets
    half = K_Z * math.sqrt(variance)
    return max(0.0, wanted - half), wanted + half + max(chain.mean_burst for chain in chains) / packets


# Rate


def judge_rate(
    net: Network, row: Calibration, source: str, target: str, states: list[Impairments]
) -> Calibration:
    rates = [state.rate_mbps for state in states if state.rate_mbps is not None]
    if not rates:
        return row
    rate_mbps = min(rates)
    mtu_bytes = min(state.mtu_bytes for state in states)
    frame_bytes = mtu_bytes + K_FRAME_OVERHEAD_BYTES
    passed = survival(states, frame_bytes)
    stack = rate_stack(rate_mbps, 1 - passed, net.congestion_controls)
    headers_bytes = K_UDP_HEADERS_BYTES if stack == "udp" else K_TCP_HEADERS_BYTES
    wanted = rate_mbps * (mtu_bytes - headers_bytes) / frame_bytes * passed
    row = replace(row, wanted_rate_mbps=round(wanted, 3), rate_by=stack)
    try:
        measured = iperf(net, source, target, stack, rate_mbps, row.wanted_rtt_ms, mtu_bytes)
    except PrfaasError as error:
        return replace(row, misses=[*row.misses, str(error)])
    misses = list(row.misses)
    if abs(measured - wanted) > K_RATE_SHARE * wanted:
        misses.append(f"rate {measured:.1f} Mbit/s, wanted {wanted:.1f} ± {K_RATE_SHARE:.0%}")
    return replace(row, measured_rate_mbps=round(measured, 3), misses=misses)


def rate_stack(rate_mbps: float, loss: float, offered: list[str]) -> str:
    """UDP a little above the rate is the exact measure, but a packet at a time it is the dearest for the
    processors; a fast line is filled by BBR, whose loss tolerance ends at some percent.
    """
    return "bbr" if rate_mbps > K_UDP_MBPS and loss <= K_TCP_LOSS and "bbr" in offered else "udp"


def iperf(
    net: Network, source: str, target: str, stack: str, rate_mbps: float, rtt_ms: float, mtu_bytes: int
) -> float:
    """Mbit/s of payload that arrived, the start left out. Raises PrfaasError if iperf3 could not tell."""
    skip_s = (
        1 if stack == "udp" else 1 + math.ceil(15 * rtt_ms / 1000)
    )  # BBR fills a line in some round trips
    words = ["-t", str(K_RATE_S + skip_s)]
    if stack == "udp":
        words += ["-u", "-b", f"{rate_mbps * 1.08:.3f}M", "-l", str(mtu_bytes - K_UDP_HEADERS_BYTES)]
    else:
        words += ["-C", stack]
    address, port = net.sites[target].address, K_PORT + 10
    with iperf_server(net.sites[target], port, K_FIRST) as server:
        client = net.sites[source].popen(
            [*K_FIRST, "iperf3", "-c", address, "-p", str(port), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, err = client.communicate(timeout=K_RATE_S + skip_s + 20)
        except subprocess.TimeoutExpired:
            client.kill()
            client.communicate()
            raise PrfaasError(f"rate {source}->{target}: iperf3 did not end") from None
        if client.returncode:
            raise PrfaasError(f"rate {source}->{target}: iperf3 failed: {err.strip() or 'no reason given'}")
        report = server.report()
    sums = [row["sum"] for row in report.get("intervals", [])][skip_s:]
    whole = [row for row in sums if row["seconds"] > 0.5]
    if not whole:
        raise PrfaasError(f"rate {source}->{target}: iperf3's report says nothing")
    seconds = float(sum(row["seconds"] for row in whole))
    return sum(int(row["bytes"]) for row in whole) * 8 / 1e6 / seconds
