"""What captured packets say, on packets made by Scapy."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prfaas_testbed.experiment.captures import read_packets
from prfaas_testbed.experiment.packets import Edge, Flow, Segment, read_edge, segments, told, unwrap

EAST, WEST, PORT = "10.0.1.2", "10.0.2.2", 7600


def frame(
    at_s: float, seq: int = 0, size: int = 0, ack: int = 0, flags: str = "A", back: bool = False
) -> Any:
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    source, target = (WEST, EAST) if back else (EAST, WEST)
    ports = {"sport": PORT, "dport": 40000} if back else {"sport": 40000, "dport": PORT}
    packet = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src=source, dst=target)
    packet = packet / TCP(seq=seq, ack=ack, flags=flags, options=[("Timestamp", (1, 2))], **ports)
    packet = packet / Raw(b"x" * size) if size else packet
    packet.time = at_s
    return packet


def edge_of(packets: list[Any], folder: Path) -> Edge:
    """By way of a pcap file that keeps headers only."""
    from scapy.utils import PcapWriter

    file = folder / f"{time.monotonic_ns()}.pcap"
    with PcapWriter(str(file), snaplen=96) as writer:
        for packet in packets:
            writer.write(packet)
    return read_edge(read_packets(file), PORT)


def test_rtt_bytes_retransmissions_losses_and_order_come_from_packets(tmp_path: Path) -> None:
    near = [
        frame(10.0, 1000, flags="S"), frame(10.04, 500, ack=1001, flags="SA", back=True),
        frame(10.05, 1001, 1000), frame(10.06, 2001, 1000),
        frame(10.09, ack=2001, back=True),  # 40 ms after its segment
        frame(10.12, 2001, 1000),  # again
        frame(10.16, ack=3001, back=True),  # says nothing about the RTT
        frame(10.20, 3001, 500), frame(10.245, ack=3501, back=True),
        frame(10.30, 3501, flags="R"), frame(10.31, 3501, flags="R"),
    ]  # fmt: skip
    far = [frame(10.07, 1001, 1000), frame(10.14, 2001, 1000), frame(10.22, 3001, 500)]
    found = told(socket.inet_aton(EAST), edge_of(near, tmp_path), edge_of(far, tmp_path), 10.0)
    assert found["payload_bytes"] == 2500
    assert (found["retransmitted_segments"], found["retransmitted_bytes"]) == (1, 1000)
    assert found["lost_segments"] == 1
    assert found["rtt_samples"] == 2
    assert (found["rtt_min_ms"], found["rtt_p99_ms"]) == (40.0, 44.95)
    assert found["order"] == [[0.0, "SYN", 40000], [0.3, "RST", 40000]]
    assert found["goodput_mbps"] == round(2500 * 8 / 0.15 / 1e6, 3)
    assert found["silence_s"] == 0.08
    assert (found["first_s"], found["last_s"]) == (0.07, 0.22)


def test_nothing_is_made_of_an_empty_capture(tmp_path: Path) -> None:
    found = told(socket.inet_aton(EAST), edge_of([], tmp_path), Edge(), 0.0)
    assert found["payload_bytes"] == 0
    assert found["goodput_mbps"] is None


def test_a_capture_that_begins_in_the_middle_counts_from_there(tmp_path: Path) -> None:
    edge = edge_of([frame(1.0, 777_000, 100), frame(1.1, 777_100, 100)], tmp_path)
    (flow,) = edge.of(socket.inet_aton(EAST))
    assert (flow.payload_bytes, flow.retransmitted) == (200, 0)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.binary(max_size=120)), max_size=20))
def test_no_packet_breaks_the_reader(packets: list[tuple[float, bytes]]) -> None:
    framed = [(at_s, b"\0" * 12 + b"\x08\x00" + data) for at_s, data in packets]
    for segment in segments([*packets, *framed], PORT):
        assert segment.payload_bytes >= 0


@given(st.integers(0, 2**40), st.integers(-(2**31), 2**31 - 1))
def test_sequence_numbers_are_followed_around_their_end(near: int, step: int) -> None:
    assert unwrap((near + step) % 2**32, near) == near + step


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 1448), min_size=1, max_size=60), st.data())
def test_each_byte_counts_once_however_often_it_is_sent(
    first: int, sizes: list[int], data: st.DataObject
) -> None:
    flow, sent, offset = Flow(), [], 0
    for size in sizes:
        sent.append((offset, size))
        offset += size
    again = data.draw(st.lists(st.sampled_from(sent), max_size=20))
    for at, size in [*sent, *again]:
        flow.sent(Segment(0.0, b"aaaa", 1, b"bbbb", PORT, (first + at) % 2**32, 0, 16, size))
    assert flow.payload_bytes == sum(sizes)
    assert flow.retransmitted_bytes == sum(size for _, size in again)
