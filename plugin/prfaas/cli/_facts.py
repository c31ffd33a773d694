"""What this machine is and lets us do, read without changing it (one scratch namespace apart)."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil

from prfaas.model.programs import K_NETWORK_PROGRAMS

K_PROGRAMS = {**K_NETWORK_PROGRAMS, "modprobe": "kmod"}
K_PROBE_S = 30.0  # asking another interpreter for its packages, on a slow disk

_ASK_SGLANG = """
import importlib.metadata as m, json
def v(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
points = [e.name for e in m.entry_points(group="sglang.srt.plugins")]
print(json.dumps({"sglang": v("sglang"), "prfaas": v("prfaas"), "points": points}))
"""


@dataclass(frozen=True)
class TcpLimits:
    """The kernel's bounds on a socket's buffers and choice of congestion control."""

    rmem_max_bytes: int
    """net.core.rmem_max: the most SO_RCVBUF gives."""
    wmem_max_bytes: int
    tcp_rmem_max_bytes: int
    """Third figure of net.ipv4.tcp_rmem: how far autotuning goes."""
    tcp_wmem_max_bytes: int
    congestion_available: tuple[str, ...]
    congestion_allowed: tuple[str, ...]
    congestion_default: str
    slow_start_after_idle: bool
    """net.ipv4.tcp_slow_start_after_idle: a connection that rested begins anew."""


@dataclass(frozen=True)
class SglangFacts:
    """SGLang as one interpreter sees it."""

    interpreter: str
    version: str | None
    plugin_registered: bool
    wanted: str | None
    """The version that this prfaas was written against; None when its metadata doesn't say."""


@dataclass(frozen=True)
class Facts:
    """Everything `doctor` judges."""

    python: tuple[int, int, int]
    kernel: str
    root: bool
    cores: int
    memory_bytes: int
    disk_free_bytes: int
    disk_path: str
    shared_memory_free_bytes: int
    open_files: int
    crc32c_in_hardware: bool
    testbed_installed: bool
    native_netem: bool | None
    """None: only root can try."""
    uml_program: bool
    uml_modules: bool
    programs: dict[str, bool]
    """Which of the testbed's programs are on the PATH."""
    tcp: TcpLimits
    sglang: SglangFacts


def gather(sglang_python: Path | None, disk_path: Path) -> Facts:
    """Read all of it; takes a second or two."""
    import resource

    import crc32c

    return Facts(
        python=sys.version_info[:3],
        kernel=platform.release(),
        root=os.geteuid() == 0,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        disk_free_bytes=shutil.disk_usage(disk_path).free,
        disk_path=str(disk_path),
        shared_memory_free_bytes=_free_bytes("/dev/shm"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        crc32c_in_hardware=bool(crc32c.hardware_based),
        testbed_installed=_importable("prfaas_testbed"),
        native_netem=_try_netem(),
        uml_program=shutil.which("linux.uml") is not None,
        uml_modules=any(Path("/usr/lib/uml/modules").glob("*/kernel/net/sched/sch_netem.ko*")),
        programs={name: shutil.which(name) is not None for name in K_PROGRAMS},
        tcp=read_tcp_limits(),
        sglang=_ask_sglang(sglang_python),
    )


def read_tcp_limits() -> TcpLimits:
    """As /proc/sys has them; 0 and empty where it doesn't."""
    return TcpLimits(
        rmem_max_bytes=_last_number("net/core/rmem_max"),
        wmem_max_bytes=_last_number("net/core/wmem_max"),
        tcp_rmem_max_bytes=_last_number("net/ipv4/tcp_rmem"),
        tcp_wmem_max_bytes=_last_number("net/ipv4/tcp_wmem"),
        congestion_available=tuple(_sysctl("net/ipv4/tcp_available_congestion_control").split()),
        congestion_allowed=tuple(_sysctl("net/ipv4/tcp_allowed_congestion_control").split()),
        congestion_default=_sysctl("net/ipv4/tcp_congestion_control").strip(),
        slow_start_after_idle=_sysctl("net/ipv4/tcp_slow_start_after_idle").strip() == "1",
    )


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text()
    except OSError:
        return ""


def _last_number(name: str) -> int:
    numbers = _sysctl(name).split()
    return int(numbers[-1]) if numbers else 0


def _free_bytes(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _importable(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _try_netem() -> bool | None:
    """Whether the kernel has sch_netem: add one in a network namespace that ends with the command.

    None where that can't be tried: no right to make a namespace, or no tc.
    """
    if not shutil.which("unshare") or not shutil.which("tc") or not _succeeds("unshare", "-n", "true"):
        return None
    return _succeeds("unshare", "-n", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0


def _ask_sglang(interpreter: Path | None) -> SglangFacts:
    """Ask `interpreter` (default: ours) for SGLang's version and whether it would load the plugin."""
    program = str(interpreter) if interpreter else sys.executable
    try:
        done = subprocess.run(
            [program, "-c", _ASK_SGLANG], capture_output=True, text=True, timeout=K_PROBE_S, check=True
        )
        said = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        said = {"sglang": None, "points": []}
    return SglangFacts(program, said["sglang"], "prfaas" in said["points"], _wanted_sglang())


def _wanted_sglang() -> str | None:
    try:
        version("prfaas")
        lines = requires("prfaas") or []
    except PackageNotFoundError:
        return None
    for line in lines:
        found = re.match(r"sglang==([\w.]+)", line)
        if found:
            return found[1]
    return None
