"""What captured headers say about our connections: bytes, retransmissions, RTT, losses on the way, order.

Pure: packets come in as (time, Ethernet frame) in the order of their capture. The edge at the sender sees
each segment as it left, so whatever starts below the highest byte yet sent was sent again; the edge at the
receiver sees what the network delivered.

RTT is taken from a segment to the first acknowledgement that covers it, by Karn's rule: not from segments
that were sent twice, nor while one sent twice is not acknowledged (the acknowledgement of a filled hole
covers much that had waited).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

K_ETHERNET_BYTES = 14
K_TCP = 6
K_FIN, K_SYN, K_RST, K_ACK = 1, 2, 4, 16
K_MOST_MARKS = 80
K_WRAP = 1 << 32

_IP = struct.Struct("!BBHHHBBH4s4s")
_TCP = struct.Struct("!HHIIBBHHH")


@dataclass(frozen=True, slots=True)
class Segment:
    """One TCP segment over IPv4; addresses as their four bytes."""

    at_s: float
    source: bytes
    source_port: int
    target: bytes
    target_port: int
    seq: int
    ack: int
    flags: int
    payload_bytes: int

    @property
    def flow(self) -> tuple[bytes, int, bytes, int]:
        return self.source, self.source_port, self.target, self.target_port

    @property
    def back(self) -> tuple[bytes, int, bytes, int]:
        return self.target, self.target_port, self.source, self.source_port


def segments(packets: Iterable[tuple[float, bytes]], port: int) -> Iterator[Segment]:
    """The TCP segments with `port` at either end; everything else, and what is cut too short, is passed
    over."""
    for at_s, frame in packets:
        if len(frame) < K_ETHERNET_BYTES + _IP.size or frame[12:14] != b"\x08\x00":
            continue
        version, _, total, _, fragment, _, protocol, _, source, target = _IP.unpack_from(
            frame, K_ETHERNET_BYTES
        )
        header = 4 * (version & 15)
        start = K_ETHERNET_BYTES + header
        if protocol != K_TCP or fragment & 0x1FFF or header < _IP.size or len(frame) < start + _TCP.size:
            continue
        source_port, target_port, seq, ack, offset, flags, _, _, _ = _TCP.unpack_from(frame, start)
        if port in (source_port, target_port):
            payload = max(0, total - header - 4 * (offset >> 4))
            yield Segment(at_s, source, source_port, target, target_port, seq, ack, flags, payload)


def unwrap(value: int, near: int) -> int:
    """The 32-bit sequence number as the nearest whole number to `near`."""
    return near + (value - near + K_WRAP // 2) % K_WRAP - K_WRAP // 2


@dataclass
class Flow:
    """One direction of one connection at one edge."""

    first: int | None = None
    highest: int = 0
    acknowledged: int = 0
    repaired: int = 0
    """End of what was sent twice."""
    payload_bytes: int = 0
    retransmitted_bytes: int = 0
    retransmitted: int = 0
    data_segments: int = 0
    waiting: deque[tuple[int, float]] = field(default_factory=deque)
    rtts_s: list[float] = field(default_factory=list)

    def sent(self, segment: Segment) -> None:
        if segment.flags & K_SYN:
            self.first = self.highest = self.acknowledged = self.repaired = segment.seq + 1
            self.waiting.clear()
            return
        if not segment.payload_bytes:
            return
        if self.first is None:
            self.first = self.highest = self.acknowledged = self.repaired = segment.seq
        start = unwrap(segment.seq, self.highest)
        end = start + segment.payload_bytes
        self.data_segments += 1
        again = max(0, min(end, self.highest) - start)
        if again and start >= self.first:
            self.retransmitted += 1
            self.retransmitted_bytes += again
            self.repaired = max(self.repaired, min(end, self.highest))
        if end > self.highest:
            self.payload_bytes += end - max(start, self.highest)
            self.highest = end
            if not again:
                self.waiting.append((end, segment.at_s))

    def heard(self, segment: Segment) -> None:
        """An acknowledgement came by."""
        if self.first is None or not segment.flags & K_ACK:
            return
        ack = unwrap(segment.ack, self.highest)
        if ack <= self.acknowledged or ack > self.highest:
            return
        clean = self.repaired <= self.acknowledged
        last: float | None = None
        while self.waiting and self.waiting[0][0] <= ack:
            last = self.waiting.popleft()[1]
        self.acknowledged = ack
        if clean and last is not None:
            self.rtts_s.append(segment.at_s - last)


@dataclass
class Edge:
    """All our flows as one edge saw them."""

    flows: dict[tuple[bytes, int, bytes, int], Flow] = field(default_factory=dict)
    marks: list[tuple[float, str, int]] = field(default_factory=list)
    """(time, SYN | FIN | RST, the client's port), in order; of several alike for a port only the first."""
    last: dict[int, str] = field(default_factory=dict)
    """Port to its last mark."""
    data: dict[bytes, list[float]] = field(default_factory=dict)
    """Sender's address to the times of its segments with data."""

    def take(self, segment: Segment) -> None:
        self.flows.setdefault(segment.flow, Flow()).sent(segment)
        back = self.flows.get(segment.back)
        if back is not None:
            back.heard(segment)
        if segment.payload_bytes:
            self.data.setdefault(segment.source, []).append(segment.at_s)
        for flag, name in ((K_SYN, "SYN"), (K_FIN, "FIN"), (K_RST, "RST")):
            if segment.flags & flag and not (flag == K_SYN and segment.flags & K_ACK):
                port = max(segment.source_port, segment.target_port)
                # A peer answers every segment that was under way with a reset of its own.
                if self.last.get(port) != name:
                    self.marks.append((segment.at_s, name, port))
                self.last[port] = name

    def of(self, address: bytes) -> list[Flow]:
        return [flow for key, flow in self.flows.items() if key[0] == address]


def read_edge(packets: Iterable[tuple[float, bytes]], port: int) -> Edge:
    edge = Edge()
    for segment in segments(packets, port):
        edge.take(segment)
    return edge


def told(source: bytes, near: Edge, far: Edge, zero_s: float) -> dict[str, Any]:
    """What both edges say of the segments that `source` sent: `near` its own edge, `far` its peer's.

    Times are seconds since `zero_s`; goodput counts each byte once, over the time from the first to the last
    segment that arrived.
    """
    sent, arrived = near.of(source), far.of(source)
    rtts = np.array([rtt for flow in sent for rtt in flow.rtts_s])
    times = np.array(far.data.get(source, []))
    payload = sum(flow.payload_bytes for flow in arrived)
    segments_sent = sum(flow.data_segments for flow in sent)
    segments_arrived = sum(flow.data_segments for flow in arrived)
    span_s = float(times[-1] - times[0]) if len(times) > 1 else 0.0
    found: dict[str, Any] = {
        "connections": sum(flow.first is not None for flow in sent),
        "segments": segments_sent,
        "payload_bytes": sum(flow.payload_bytes for flow in sent),
        "retransmitted_segments": sum(flow.retransmitted for flow in sent),
        "retransmitted_bytes": sum(flow.retransmitted_bytes for flow in sent),
        "lost_segments": max(0, segments_sent - segments_arrived),
        "goodput_mbps": round(payload * 8 / span_s / 1e6, 3) if span_s > 0 else None,
        "first_s": round(float(times[0]) - zero_s, 4) if len(times) else None,
        "last_s": round(float(times[-1]) - zero_s, 4) if len(times) else None,
        "silence_s": round(float(np.diff(times).max()), 4) if len(times) > 1 else None,
        "rtt_samples": len(rtts),
        "order": [[round(at_s - zero_s, 4), name, port] for at_s, name, port in near.marks[:K_MOST_MARKS]],
    }
    if len(rtts):
        for name, q in (("min", 0.0), ("p50", 0.5), ("p99", 0.99)):
            found[f"rtt_{name}_ms"] = round(1000 * float(np.quantile(rtts, q)), 3)
    return found
