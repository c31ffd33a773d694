"""What a run was made with and on: goes into run.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from prfaas.config.places import checkout

K_CHECKOUT = checkout()
K_TOPOLOGIES = K_CHECKOUT / "topologies"
K_RESULTS = K_CHECKOUT / "results"
K_PACKAGES = ("prfaas", "aiohttp", "crc32c", "mininet", "numpy", "pyzmq", "uvloop")
K_SGLANG_PACKAGES = ("sglang", "torch", "transformers")


def commit() -> str:
    """The checkout's commit, with -dirty where tracked files differ; `unknown` outside git."""
    head = _output("git", "-C", str(K_CHECKOUT), "rev-parse", "HEAD")
    if not head:
        return "unknown"
    dirty = _output("git", "-C", str(K_CHECKOUT), "status", "--porcelain", "--untracked-files=no")
    return head + ("-dirty" if dirty else "")


def versions(sglang_environment: Path | None = None) -> dict[str, str]:
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for name in K_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if sglang_environment is not None:
        for info in sglang_environment.glob("lib/python3*/site-packages/*.dist-info"):
            name, _, number = info.name.removesuffix(".dist-info").partition("-")
            if name in K_SGLANG_PACKAGES:
                found[name] = number
    return found


def machine() -> dict[str, Any]:
    """No host names or addresses: what matters for figures only."""
    model = ""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": _release(),
        "load_1min_before": round(os.getloadavg()[0], 2),
        "executable": Path(sys.executable).name,
    }


def _release() -> str:
    for line in _read("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.system()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
