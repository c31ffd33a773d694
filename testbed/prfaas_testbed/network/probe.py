"""One-way packet probes between two sites: numbered UDP datagrams, and what became of them.

Run as a script inside a site, with the standard library alone:
    probe.py receive ADDRESS PORT LIMIT_S      one JSON object on stdout at the end
    probe.py send ADDRESS PORT PACKETS PACKETS_PER_S PAYLOAD_BYTES
Both sites are on one machine, so one clock stamps a datagram as it leaves and, in the kernel, as it arrives.
"""

from __future__ import annotations

import itertools
import json
import socket
import struct
import sys
import time

K_MAGIC = b"prfaas-probe-1 "
K_HEAD = struct.Struct("!15sIQ")  # magic, number, CLOCK_REALTIME in ns
K_LAST = 0xFFFFFFFF
K_SO_TIMESTAMPNS = 35
K_STEP_S = 0.002


def send(address: str, port: int, packets: int, per_s: float, payload_bytes: int) -> None:
    filler = bytes(max(0, payload_bytes - K_HEAD.size))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.connect((address, port))
        began_s = time.monotonic()
        number = 0
        while number < packets:
            due = min(packets, int((time.monotonic() - began_s) * per_s) + 1)
            # What a stall of ours missed is not sent in one burst: that would try the link's queue.
            due = min(due, number + max(2, int(4 * per_s * K_STEP_S)))
            while number < due:
                out.send(K_HEAD.pack(K_MAGIC, number, time.time_ns()) + filler)
                number += 1
            time.sleep(K_STEP_S)
        for _ in range(200):  # some arrive on any link that isn't down
            try:
                out.send(K_HEAD.pack(K_MAGIC, K_LAST, packets))
            except ConnectionRefusedError:  # the receiver has heard it and gone
                return
            time.sleep(0.005)


def receive(address: str, port: int, limit_s: float) -> dict[str, object]:
    came: list[int] = []
    delays_us: list[int] = []
    sent = None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as into:
        into.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        into.setsockopt(socket.SOL_SOCKET, K_SO_TIMESTAMPNS, 1)
        into.bind((address, port))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        deadline = time.monotonic() + limit_s
        while sent is None and time.monotonic() < deadline:
            into.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data, notes, _, _ = into.recvmsg(2048, 64)
            except TimeoutError:
                break
            if len(data) < K_HEAD.size or not data.startswith(K_MAGIC):
                continue
            _, number, value = K_HEAD.unpack_from(data)
            if number == K_LAST:
                sent = value
                continue
            came.append(number)
            for _level, kind, stamp in notes:
                if kind == K_SO_TIMESTAMPNS:
                    seconds, rest_ns = struct.unpack_from("=qq", stamp)
                    delays_us.append((seconds * 1_000_000_000 + rest_ns - value) // 1000)
    return summary(came, delays_us, sent)


def summary(came: list[int], delays_us: list[int], sent: int | None) -> dict[str, object]:
    """Counts of what came: unique, twice, out of order; lengths of the gaps; one-way delay."""
    unique = sorted(set(came))
    total = sent if sent is not None else (unique[-1] + 1 if unique else 0)
    edges = [-1, *unique, total]
    gaps = [after - before - 1 for before, after in itertools.pairwise(edges) if after - before > 1]
    late = sum(1 for before, after in itertools.pairwise(came) if after < before)
    delays_us.sort()
    return {
        "complete": sent is not None,
        "sent": total,
        "received": len(unique),
        "lost": total - len(unique),
        "bursts": len(gaps),
        "duplicates": len(came) - len(unique),
        "out_of_order": late,
        "delay_ms": delays_us[len(delays_us) // 2] / 1000 if delays_us else None,
        "delay_p99_ms": delays_us[len(delays_us) * 99 // 100] / 1000 if delays_us else None,
    }


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6]))
    else:
        sys.stdout.write(json.dumps(receive(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))) + "\n")
