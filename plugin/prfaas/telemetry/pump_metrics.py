"""A pump's figures for Prometheus, made from its counters when asked for. Names are an interface; units in
them are the base ones, whole (`seconds`), as its own checker wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

K_PEER_COUNTERS = {
    "payload_bytes_sent": "Payload of blocks sent, repeats included.",
    "framing_bytes_sent": "Headers and tables of blocks sent.",
    "control_bytes_sent": "Other frames sent.",
    "control_bytes_received": "Acknowledgements and other frames received.",
    "blocks_sent": "Blocks sent, repeats included.",
    "corrupt_blocks": "Blocks that arrived corrupt and were sent again.",
    "bytes_acked": "Bytes that the peer's kernel acknowledged.",
    "retransmitted_bytes": "Bytes that the kernel sent again (TCP_INFO).",
    "tcp_bytes_sent": "Payload of TCP, retransmissions included.",
    "segments_out": "TCP segments sent.",
    "streams_opened": "Connections that came up.",
    "streams_lost": "Connections lost.",
}
K_PEER_GAUGES = {
    "rtt_s": "Smallest smoothed round trip of the open streams.",
    "goodput_bps": "Acknowledged bits a second, as last measured under a backlog.",
    "loss": "Share of bytes sent again, as last measured under a backlog.",
    "backlog_bytes": "Bytes that wait to be sent.",
    "in_flight_bytes": "Bytes sent and not yet acknowledged by the receiver.",
    "transfers": "Transfers under way.",
    "streams_wanted": "Streams that the loss asks for.",
    "slack_s": "How long the kernel may send from what it holds; more than 0.06: the pump came late.",
}
K_STREAM_GAUGES = {
    "rtt_s": "Smoothed round trip of the stream.",
    "delivery_rate_bps": "The kernel's delivery rate, bits a second.",
    "cwnd_packets": "Congestion window of the stream.",
    "retransmitted_bytes": "Bytes sent again since the stream opened.",
}
K_INBOUND_COUNTERS = {
    "payload_bytes_received": "Payload of blocks that peers sent here, repeats included.",
    "framing_bytes_received": "Headers and tables of blocks that peers sent here.",
    "blocks_received": "Blocks that peers sent here, repeats included.",
    "corrupt_blocks": "Blocks that came here corrupt and were asked for again.",
}
K_ESTIMATE_GAUGES = {
    "rate_bps": "Bits a second that the link is believed to carry.",
    "low_bps": "The least that it may be, by the estimate's uncertainty.",
    "high_bps": "The most that it may be, by the estimate's uncertainty.",
    "rtt_s": "Its round trip; 0 until it was measured.",
    "loss": "Share of bytes sent again on it.",
    "backlog_bytes": "Bytes that wait for it, of all pumps that share it.",
    "up": "1 while it is believed up.",
}
K_LINK_GAUGES = {
    "share_bps": "This pump's share of the link, bits a second.",
    "reachable": "1 while the pump that keeps the link's ledger answers.",
    "promised_bytes": "Bytes promised and not yet through.",
    "admitted": "Transfers that hold a promise.",
    "queued": "Transfers that wait for room.",
    "late": "Transfers whose promise couldn't be kept.",
}


class PumpMetrics(Collector):
    """Turns `Pump.stats` into metrics."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._stats: Mapping[str, Any] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def page(self, stats: Mapping[str, Any]) -> bytes:
        """The page of /metrics."""
        self._stats = stats
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        if not stats:
            return
        yield from self._identity(stats)
        yield from self._peers(stats["peers"])
        yield from self._inbound(stats["inbound"])
        yield from self._forwards(stats["forwards"], stats["forwarded_in"])
        yield from self._links(stats["links"])
        ended = CounterMetricFamily(
            "prfaas_pump_transfers_ended", "Transfers ended, by outcome.", labels=["outcome"]
        )
        for name, n in stats["ended"].items():
            ended.add_metric([name], n)
        yield ended
        for name, text in (
            ("leases", "Leases on pages here that servers have granted."),
            ("incoming", "Transfers coming in from other sites."),
            ("clients", "Servers of this node that are attached."),
        ):
            yield GaugeMetricFamily(f"prfaas_pump_{name}", text, value=stats[name])
        cpu = CounterMetricFamily("prfaas_pump_cpu_seconds", "Processor time of the pump.", labels=["mode"])
        for mode in ("user", "system"):
            cpu.add_metric([mode], stats[f"cpu_{mode}_s"])
        yield cpu

    @staticmethod
    def _identity(stats: Mapping[str, Any]) -> Iterator[Metric]:
        about = GaugeMetricFamily(
            "prfaas_pump_info",
            "Which pump this is, and the newest protocol version that it speaks; always 1.",
            labels=["site", "address", "version", "protocol"],
        )
        newest = str(stats["protocol_versions"][1])
        about.add_metric([stats["site"], stats["address"], stats["version"], newest], 1)
        yield about
        ends = GaugeMetricFamily(
            "prfaas_pump_certificate_expiry_timestamp_seconds",
            "When a certificate in use ends, as Unix time: this site's own, and the authorities it trusts.",
            labels=["file", "site", "kind"],
        )
        for one in stats["certificates"]:
            ends.add_metric([one["file"], one["site"], one["kind"]], one["ends_unix_s"])
        yield ends

    @staticmethod
    def _peers(peers: list[Mapping[str, Any]]) -> Iterator[Metric]:
        labels = ["peer", "site"]
        for name, text in K_PEER_COUNTERS.items():
            counter = CounterMetricFamily(f"prfaas_pump_peer_{name}", text, labels=labels)
            for peer in peers:
                counter.add_metric([peer["address"], peer["site"]], peer[name])
            yield counter
        for name, text in K_PEER_GAUGES.items():
            gauge = GaugeMetricFamily(f"prfaas_pump_peer_{_with_unit(name)}", text, labels=labels)
            for peer in peers:
                gauge.add_metric([peer["address"], peer["site"]], peer[name])
            yield gauge
        for name, text in K_STREAM_GAUGES.items():
            gauge = GaugeMetricFamily(
                f"prfaas_pump_stream_{_with_unit(name)}", text, labels=["peer", "stream", "control"]
            )
            for peer in peers:
                for i, stream in enumerate(peer["streams"]):
                    gauge.add_metric([peer["address"], str(i), stream["congestion_control"]], stream[name])
            yield gauge

    @staticmethod
    def _inbound(inbound: Mapping[str, Any]) -> Iterator[Metric]:
        for name, text in K_INBOUND_COUNTERS.items():
            yield CounterMetricFamily(f"prfaas_pump_inbound_{name}", text, value=inbound[name])
        yield GaugeMetricFamily(
            "prfaas_pump_inbound_streams", "Streams that peers have open here.", value=inbound["streams"]
        )
        refusals = CounterMetricFamily(
            "prfaas_pump_refusals", "What peers were refused, by reason.", labels=["reason"]
        )
        for reason, n in inbound["refusals"].items():
            refusals.add_metric([reason], n)
        yield refusals

    @staticmethod
    def _forwards(forwards: Mapping[str, Any], incoming: int) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "prfaas_pump_forwarded_connections",
            "Connections of this node's programs to other sites, now.",
            value=forwards["connections"],
        )
        yield GaugeMetricFamily(
            "prfaas_pump_forwarded_in_connections",
            "Connections of other sites to what is exposed here, now.",
            value=incoming,
        )
        for name, text in (
            ("opened", "Connections of this node's programs to other sites, so far."),
            ("failed", "Those of them that ended by an error."),
        ):
            yield CounterMetricFamily(f"prfaas_pump_forwards_{name}", text, value=forwards[name])

    @staticmethod
    def _links(links: list[Mapping[str, Any]]) -> Iterator[Metric]:
        for name, text in K_LINK_GAUGES.items():
            gauge = GaugeMetricFamily(f"prfaas_link_{name}", text, labels=["link"])
            for link in links:
                gauge.add_metric([link["link"]], link[name])
            yield gauge
        for name, text in K_ESTIMATE_GAUGES.items():
            gauge = GaugeMetricFamily(f"prfaas_link_estimate_{_with_unit(name)}", text, labels=["link"])
            for link in links:
                if link["estimate"]:
                    gauge.add_metric([link["link"]], link["estimate"][name])
            yield gauge
        refusals = CounterMetricFamily(
            "prfaas_link_refusals", "Offers refused, by reason.", labels=["link", "reason"]
        )
        for link in links:
            for reason, n in link["refusals"].items():
                refusals.add_metric([link["link"], reason], n)
        yield refusals


def _with_unit(name: str) -> str:
    """A figure's name as Prometheus has it."""
    return name.removesuffix("_s") + "_seconds" if name.endswith("_s") else name
