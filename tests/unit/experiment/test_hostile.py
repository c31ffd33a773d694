"""Packets that no well-behaved sender makes are whole packets: only what is meant to be wrong is wrong."""

from __future__ import annotations

from random import Random
from typing import Any

from prfaas_testbed.experiment.hostile import (
    K_AHEAD_SEGMENTS,
    K_SEGMENT_BYTES,
    corrupted,
    odd_flags,
    resets,
)

EAST, WEST, PORT = "10.0.1.2", "10.0.2.2", 7600


def live(seq: int = 2**32 - 500, size: int = 1000, port: int = 40000) -> Any:
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    head = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src=EAST, dst=WEST)
    options = [("NOP", None), ("NOP", None), ("Timestamp", (77, 88))]
    tcp = TCP(sport=port, dport=PORT, seq=seq, ack=9, flags="PA", window=500, options=options)
    return Ether(bytes(head / tcp / Raw(b"x" * size)))


def parsed(packet: bytes) -> Any:
    """As it is on the wire."""
    from scapy.layers.l2 import Ether

    return Ether(packet)


def checksum_is_right(packet: bytes) -> bool:
    from scapy.layers.inet import IP, TCP

    wire = parsed(packet)
    sent = wire[TCP].chksum
    again = wire.copy()
    del again[TCP].chksum
    del again[IP].chksum
    return bool(parsed(bytes(again))[TCP].chksum == sent)


def test_a_corrupted_payload_has_a_right_checksum_and_the_place_of_what_comes_a_little_later() -> None:
    made = corrupted(live(), 3, Random(1))
    first = 500 + K_AHEAD_SEGMENTS * K_SEGMENT_BYTES
    numbers = [parsed(packet)["TCP"].seq for packet in made]
    assert numbers == [first + 2 * i * K_SEGMENT_BYTES for i in range(3)], "around the end of the numbers"
    assert all(checksum_is_right(packet) for packet in made)
    assert all(("Timestamp", (77, 88)) in parsed(packet)["TCP"].options for packet in made)
    assert len(parsed(made[0])["TCP"].payload) == K_SEGMENT_BYTES


def test_resets_aim_at_every_segment_from_the_next_on_and_carry_nothing() -> None:
    made = resets(live(), 3)
    assert [parsed(packet)["TCP"].seq for packet in made] == [500, 1948, 3396]
    assert all(str(parsed(packet)["TCP"].flags) == "R" for packet in made)
    assert all(not parsed(packet)["TCP"].payload for packet in made)
    assert all(checksum_is_right(packet) for packet in made)


def test_odd_flags_never_open_a_connection() -> None:
    made = [parsed(packet) for packet in odd_flags(live(), WEST, PORT, 40, Random(1))]
    tcp = [packet for packet in made if "TCP" in packet]
    assert len(made) == 40
    assert 0 < len(tcp) < 40
    assert all(str(packet["TCP"].flags) != "S" for packet in tcp)
