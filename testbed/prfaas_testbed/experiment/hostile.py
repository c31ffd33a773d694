"""`python -m prfaas_testbed.experiment.hostile KIND …`, in a site: packets that no well-behaved sender makes.

Made with Scapy and put on the site's own cable, so the emulated WAN carries them like any other. To stand
in for a live connection's next segments, the site's own outgoing ones are watched: their addresses, sequence
numbers and time stamps are what a receiver expects. Prints, as JSON, what was sent and when.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from contextlib import suppress
from random import Random
from typing import Any

K_WATCH_S = 4.0  # how long to wait for live segments
K_SEGMENT_BYTES = 1200
K_REPLAY_AFTER_S = 0.5
K_GARBAGE_BYTES = 4096


def templates(device: str, target: str, port: int, wanted: int) -> list[Any]:
    """Segments with data that leave for the target's pump, as they are seen on the cable."""
    from scapy.layers.inet import TCP
    from scapy.sendrecv import sniff

    def live(packet: Any) -> bool:
        return TCP in packet and len(packet[TCP].payload) > 0

    words = f"tcp and dst host {target} and (dst port {port} or src port {port})"
    return list(sniff(iface=device, filter=words, lfilter=live, count=wanted, timeout=K_WATCH_S, store=True))


def next_segment(seen: Any, ahead: int, payload: bytes, flags: str = "PA") -> Any:
    """A segment of the same connection, `ahead` bytes after the end of the one seen; Scapy works out lengths
    and checksums anew."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    tcp = seen[TCP]
    end = (tcp.seq + len(tcp.payload) + ahead) % 2**32
    options = [option for option in tcp.options if option[0] in ("Timestamp", "NOP")]
    head = Ether(src=seen[Ether].src, dst=seen[Ether].dst) / IP(src=seen[IP].src, dst=seen[IP].dst)
    packet = head / TCP(
        sport=tcp.sport,
        dport=tcp.dport,
        seq=end,
        ack=tcp.ack,
        flags=flags,
        window=tcp.window,
        options=options,
    )
    return packet / Raw(payload) if payload else packet


def corrupt_payload(seen: list[Any], packets: int, rng: Random) -> list[Any]:
    """Wrong bytes with right checksums, in the place of what each connection sends next."""
    last = {(p["TCP"].sport, p["TCP"].dport): p for p in seen}
    made: list[Any] = []
    for i in range(packets):
        for packet in last.values():
            if len(made) < packets:
                made.append(next_segment(packet, i * K_SEGMENT_BYTES, rng.randbytes(K_SEGMENT_BYTES)))
    return made


def resets(seen: list[Any], packets: int) -> list[Any]:
    """RST at the next sequence number, and behind it where it should only draw a challenge (RFC 5961)."""
    last = {(p["TCP"].sport, p["TCP"].dport): p for p in seen}
    made: list[Any] = []
    for i in range(packets):
        for packet in last.values():
            if len(made) < packets:
                made.append(next_segment(packet, i * 1448, b"", flags="RA" if i % 2 else "R"))
    return made


def odd_flags(source: Any, target: str, port: int, packets: int, rng: Random) -> list[Any]:
    """Flags that open nothing, data without a connection, datagrams at a TCP port."""
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    made: list[Any] = []
    for i in range(packets):
        head = Ether(src=source.src, dst=source.dst) / IP(dst=target)
        sport = 20_000 + rng.randrange(10_000)
        flags = ("FPU", "", "SF", "PA", "A", "FA")[i % 6]
        layer = (
            UDP(sport=sport, dport=port)
            if i % 7 == 6
            else TCP(sport=sport, dport=port, flags=flags, seq=rng.getrandbits(32), ack=rng.getrandbits(32))
        )
        made.append(head / layer / Raw(rng.randbytes(rng.randrange(1, 600))))
    return made


def garbage(target: str, port: int, connections: int, rng: Random) -> int:
    """Whole connections that speak nothing of ours; how many were accepted."""
    accepted = 0
    for i in range(connections):
        with suppress(OSError), socket.create_connection((target, port), timeout=2.0) as sock:
            accepted += 1
            sock.settimeout(0.3)
            said = (
                rng.randbytes(K_GARBAGE_BYTES),
                b"PRFA" + rng.randbytes(64),
                b"GET / HTTP/1.1\r\n\r\n",
                b"",
            )
            sock.sendall(said[i % 4])
            sock.recv(1)
    return accepted


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="hostile", allow_abbrev=False)
    parser.add_argument("kind", choices=("corrupt_payload", "reset", "replay", "garbage"))
    parser.add_argument("--device", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--packets", type=int, required=True)
    parser.add_argument("--at", type=float, required=True, help="CLOCK_MONOTONIC")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    from scapy.config import conf
    from scapy.sendrecv import sendp

    conf.verb = 0
    rng = Random(args.seed)
    time.sleep(max(0.0, args.at - time.monotonic()))
    began_s = time.monotonic()
    seen = templates(args.device, args.target, args.port, args.packets if args.kind == "replay" else 4)
    accepted = None
    if args.kind == "garbage":
        accepted = garbage(args.target, args.port, min(args.packets, 16), rng)
        made = odd_flags(seen[0], args.target, args.port, args.packets, rng) if seen else []
    elif args.kind == "corrupt_payload":
        made = corrupt_payload(seen, args.packets, rng)
    elif args.kind == "reset":
        made = resets(seen, args.packets)
    else:
        made = seen
        time.sleep(K_REPLAY_AFTER_S)
    sent_s = time.monotonic()
    if made:
        sendp(made, iface=args.device)
    answer = {
        "began_s": began_s, "sent_s": sent_s, "packets": len(made), "live_segments_seen": len(seen),
        "connections": accepted,
    }  # fmt: skip
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
