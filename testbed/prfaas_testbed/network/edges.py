"""What a frame costs where the machine and the appliance meet, made less from the machine's side.

Of the 30 µs and more that a frame took, little was netem's: each woke the guest by a signal of its own, most
of them twice. Two things are done about that:

Filters. The guest's driver opens two packet sockets a device. The one that it reads also sees what it sends
itself, and the one that it sends by gets a copy of all that arrives, which nobody reads.

Coalescing. As a network card does, each end of a cable hands the first frame over at once and those that
follow within K_COALESCE_S together (NAPI, with its interrupts deferred). Frames are never merged.

A frame of UDP at full rate takes a quarter less of the guest with both, and timers' lag at p99 falls from 3
to 24 ms to under 1 on a machine that others keep busy: what made them late was the guest's own load.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from prfaas_testbed.network.hosts import Host

K_COALESCE_S = 0.00015  # the longest that a frame waits for others, each way
K_QUEUE_PACKETS = 10_000  # before a cable's ring of 256: kernels since 6.16 let a full ring push back
K_PIDFD_GETFD = 438
K_SO_ATTACH_FILTER = 26
K_INSTRUCTION = struct.Struct("=HBBI")  # sock_filter
K_NOTHING = ((0x06, 0, 0, 0),)  # ret #0
K_ARRIVING = (
    (0x30, 0, 0, 0xFFFFF004),  # ldb [packet type]
    (0x15, 0, 1, socket.PACKET_OUTGOING),  # jeq
    (0x06, 0, 0, 0),  # ret #0
    (0x06, 0, 0, 0x40000),  # ret #262144: the whole frame
)

# A frame longer than the largest that may be merged is handed on as it is; without that, gro stays off.
_COALESCE = f"""
set -e
trap 'ethtool -K "$1" gro off' EXIT
tc qdisc replace dev "$1" root pfifo limit {K_QUEUE_PACKETS}
ip link set dev "$1" gro_max_size 1
ip -d -j link show dev "$1" | grep -q '"gro_max_size":1[,}}]'
mkdir -p /run/edges
mount -n -t sysfs sysfs /run/edges
cd "/run/edges/class/net/$1"
echo {round(K_COALESCE_S * 1e9)} > gro_flush_timeout
echo 1 > napi_defer_hard_irqs
cd /
umount -n /run/edges
ethtool -K "$1" gro on
trap - EXIT
"""

_libc = ctypes.CDLL(None, use_errno=True)


def coalesce(host: Host, device: str) -> bool:
    """Let `device` hand frames over in groups; False where this kernel or its tools can't, and it is left as
    it was.
    """
    return host.run(["sh", "-c", _COALESCE, "sh", device]).returncode == 0


def filter_sockets(guest: int, wan: Host) -> int:
    """Spare the guest what its packet sockets needn't see. How many were given a filter. Raises OSError where
    this kernel doesn't lend another process's sockets (pidfd_getfd, since 5.6).
    """
    kinds = packet_sockets(Path(f"/proc/{wan.pid}/net/packet").read_text())
    count = 0
    for number in os.listdir(f"/proc/{guest}/fd"):
        found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{guest}/fd/{number}"))
        reads = kinds.get(int(found.group(1))) if found else None
        if reads is not None:
            with socket.socket(fileno=_borrow(guest, int(number))) as borrowed:
                _attach(borrowed, K_ARRIVING if reads else K_NOTHING)
            count += 1
    return count


def packet_sockets(table: str) -> dict[int, bool]:
    """Out of /proc/net/packet: a socket's inode, and whether it is one for every protocol, which is read.
    Pure.
    """
    rows = [line.split() for line in table.splitlines()[1:]]
    return {int(row[8]): row[3] == "0003" for row in rows if len(row) > 8}


def dropped(ends: Iterable[tuple[Host, str]]) -> int:
    """Frames that found a cable's ring full."""
    return sum(
        sent_and_dropped(Path(f"/proc/{host.pid}/net/dev").read_text(), device) for host, device in ends
    )


def sent_and_dropped(table: str, device: str) -> int:
    """Out of /proc/net/dev: what `device` was given to send and dropped. Pure."""
    for line in table.splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == device:
            return int(rest.split()[11])
    return 0


def _borrow(pid: int, number: int) -> int:
    if platform.machine() not in ("x86_64", "aarch64"):
        raise OSError(f"no pidfd_getfd known for {platform.machine()}")
    process = os.pidfd_open(pid)
    try:
        here: int = _libc.syscall(K_PIDFD_GETFD, process, number, 0)
    finally:
        os.close(process)
    if here < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return here


def _attach(sock: socket.socket, program: tuple[tuple[int, int, int, int], ...]) -> None:
    code = ctypes.create_string_buffer(b"".join(K_INSTRUCTION.pack(*step) for step in program))
    sock.setsockopt(
        socket.SOL_SOCKET, K_SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code))
    )
