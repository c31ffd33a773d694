"""`python -m prfaas_testbed.experiment.hostile KIND …`, in a site: packets that no well-behaved sender makes.

Made with Scapy and put on the site's own cable, so the emulated WAN carries them like any other. To stand
in for a live connection's next segments, the site's own outgoing ones are watched: their addresses, sequence
numbers and time stamps are what a receiver expects. A busy connection moves on by a segment in a tenth of a
millisecond, so one packet is built with Scapy and its copies for other sequence numbers are patched.
Prints, as JSON, what was sent and when.
"""

from __future__ import annotations

import argparse
import importlib
import json
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from random import Random
from typing import Any

K_WATCH_S = 4.0  # how long to wait for live segments
K_SEGMENT_BYTES = 1448  # of a full segment with time stamps
K_AHEAD_SEGMENTS = 24  # what leaves before a forged segment can
K_REPLAY_AFTER_S = 0.5
K_GARBAGE_BYTES = 4096
K_IP_AT, K_TCP_AT = 14, 34  # in a frame without IP options
K_SEQ_AT, K_CHECKSUM_AT = K_TCP_AT + 4, K_TCP_AT + 16


class Wire:
    """A site's cable: its own segments to the target's pump, and a way to put frames beside them."""

    def __init__(self, device: str, target: str, port: int) -> None:
        from scapy.config import conf

        words = f"tcp and dst host {target} and dst port {port}"
        self._listening = conf.L2listen(iface=device, filter=words)
        self._sending: Any = conf.L2socket(iface=device)

    def live(self, within_s: float = K_WATCH_S) -> Iterator[Any]:
        """Segments with data, as Scapy's packets, as they leave."""
        from scapy.layers.inet import TCP
        from scapy.layers.l2 import Ether

        end_s = time.monotonic() + within_s
        while time.monotonic() < end_s:
            if not self._listening.select([self._listening], 0.1):
                continue
            _, data, _ = self._listening.recv_raw(2048)
            # A look at the bytes first: most of what leaves needn't be taken apart.
            if data and len(data) > 200 and TCP in (packet := Ether(data)):
                yield packet

    def send(self, frame: bytes) -> None:
        self._sending.outs.send(frame)

    def close(self) -> None:
        self._listening.close()
        self._sending.close()


def forged(seen: Any, payload: bytes, flags: str) -> bytes:
    """A frame of the same connection right after the one seen; Scapy works out lengths and checksums."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    tcp = seen[TCP]
    options = [option for option in tcp.options if option[0] in ("Timestamp", "NOP")]
    head = Ether(src=seen[Ether].src, dst=seen[Ether].dst) / IP(src=seen[IP].src, dst=seen[IP].dst)
    made = head / TCP(
        sport=tcp.sport, dport=tcp.dport, seq=(tcp.seq + len(tcp.payload)) % 2**32, ack=tcp.ack, flags=flags,
        window=tcp.window, options=options,
    )  # fmt: skip
    return bytes(made / Raw(payload) if payload else made)


def moved(frame: bytes, ahead: int) -> bytes:
    """The frame `ahead` bytes further on in its connection, with a right checksum."""
    from scapy.utils import checksum

    data = bytearray(frame)
    (seq,) = struct.unpack_from("!I", data, K_SEQ_AT)
    struct.pack_into("!I", data, K_SEQ_AT, (seq + ahead) % 2**32)
    struct.pack_into("!H", data, K_CHECKSUM_AT, 0)
    tcp = bytes(data[K_TCP_AT:])
    pseudo = bytes(data[K_IP_AT + 12 : K_IP_AT + 20]) + struct.pack("!BBH", 0, 6, len(tcp))
    struct.pack_into("!H", data, K_CHECKSUM_AT, checksum(pseudo + tcp))
    return bytes(data)


def corrupted(seen: Any, count: int, rng: Random) -> list[bytes]:
    """Wrong bytes with right checksums under numbers that the connection comes to a little later."""
    first = forged(seen, rng.randbytes(K_SEGMENT_BYTES), "PA")
    return [moved(first, (K_AHEAD_SEGMENTS + 2 * i) * K_SEGMENT_BYTES) for i in range(count)]


def resets(seen: Any, count: int) -> list[bytes]:
    """RST at every segment's start from here on: one is the number that the receiver waits for and ends the
    connection, the others draw challenges (RFC 5961)."""
    first = forged(seen, b"", "R")
    return [moved(first, i * K_SEGMENT_BYTES) for i in range(count)]


def odd_flags(source: Any, target: str, port: int, packets: int, rng: Random) -> list[bytes]:
    """Flags that open nothing, data without a connection, datagrams at a TCP port."""
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    made = []
    for i in range(packets):
        head = Ether(src=source.src, dst=source.dst) / IP(dst=target, src=source["IP"].src)
        sport = 20_000 + rng.randrange(10_000)
        flags = ("FPU", "", "SF", "PA", "A", "FA")[i % 6]
        layer: Any = UDP(sport=sport, dport=port)
        if i % 7 != 6:
            seq, ack = rng.getrandbits(32), rng.getrandbits(32)
            layer = TCP(sport=sport, dport=port, flags=flags, seq=seq, ack=ack)
        made.append(bytes(head / layer / Raw(rng.randbytes(rng.randrange(1, 600)))))
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


def attack(wire: Wire, kind: str, target: str, port: int, packets: int, rng: Random) -> dict[str, Any]:
    """Do it; what was done."""
    seen, sent, accepted = 0, 0, None
    if kind == "garbage":
        accepted = garbage(target, port, min(packets, 16), rng)
    kept: list[bytes] = []
    burst = min(packets, 40)
    for packet in wire.live():
        seen += 1
        if kind == "replay":
            kept.append(bytes(packet))
            if len(kept) < packets:
                continue
            time.sleep(K_REPLAY_AFTER_S)
            made = kept
        elif kind == "garbage":
            made = odd_flags(packet, target, port, packets, rng)
        elif kind == "corrupt_payload":
            made = corrupted(packet, burst, rng)
        else:
            made = resets(packet, burst)
        for frame in made:
            wire.send(frame)
        sent += len(made)
        if sent >= packets:
            break
    return {"packets": sent, "live_segments_seen": seen, "connections": accepted}


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
    # A second of imports, before the time comes.
    for module in ("scapy.config", "scapy.layers.inet", "scapy.layers.l2"):
        importlib.import_module(module)
    time.sleep(max(0.0, args.at - time.monotonic()))
    began_s = time.monotonic()
    with closing(Wire(args.device, args.target, args.port)) as wire:
        done = attack(wire, args.kind, args.target, args.port, args.packets, Random(args.seed))
    answer = {"began_s": began_s, "sent_s": time.monotonic(), **done}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
