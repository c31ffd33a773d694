"""A processor's time, reserved: sched_setattr(2), which Python's os doesn't offer.

SCHED_FIFO isn't enough for an emulator that is busy most of the time: so that others don't starve, kernels
since 6.12 give them 50 ms of each second at one stretch (the fair server), older ones as much by
kernel.sched_rt_runtime_us. Under SCHED_DEADLINE a task owns a share of every short period, and what it leaves
is left in short pieces too. Measured beside two busy loops on two cores, the longest stall of a busy process:
54 ms by SCHED_FIFO, 1 to 2 ms by SCHED_DEADLINE.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

K_SCHED_DEADLINE = 6
K_RESET_ON_FORK = 1  # a deadline can't be inherited: without this flag, fork fails
K_RECLAIM = 2  # may use what no other deadline needs
K_ATTR = struct.Struct("=IIQiIQQQ")  # sched_attr, its first version
K_CALLS = {"x86_64": 314, "aarch64": 274}

_libc = ctypes.CDLL(None, use_errno=True)


def reserve(pid: int, runtime_s: float, period_s: float) -> None:
    """Give a thread `runtime_s` of a processor in every `period_s`; what it forks is an ordinary process.
    Raises OSError if this kernel or this machine's other reservations don't allow it.
    """
    number = K_CALLS.get(platform.machine())
    if number is None:
        raise OSError(f"no sched_setattr known for {platform.machine()}")
    runtime_ns, period_ns = round(runtime_s * 1e9), round(period_s * 1e9)
    flags = K_RESET_ON_FORK | K_RECLAIM
    attr = K_ATTR.pack(K_ATTR.size, K_SCHED_DEADLINE, flags, 0, 0, runtime_ns, period_ns, period_ns)
    if _libc.syscall(number, pid, attr, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
