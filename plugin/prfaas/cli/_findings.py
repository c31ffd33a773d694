"""Judgements of machine and link facts, with the exact command that mends each. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from prfaas.cli._facts import K_PROGRAMS, Facts, TcpLimits

K_LEAST_DISK_BYTES = 15_000_000_000  # measured: both environments and the tiny models take 11.6 GB
K_LEAST_OPEN_FILES = 4096  # 64 streams to each of many peers, and clients
K_LEAST_SHARED_BYTES = 512 << 20  # staging memory of one pump
K_BUFFER_PER_BDP = 2.0  # kernel buffers count packets' own overhead: about half of one is payload

State = Literal["ok", "warn", "lacking"]


@dataclass(frozen=True)
class Finding:
    """One line of `doctor` or `check`."""

    name: str
    state: State
    detail: str
    remedy: str = ""
    """A command, or what to do; empty when nothing is to be done."""

    def line(self, width: int) -> str:
        mend = f" | {self.remedy}" if self.remedy else ""
        return f"{self.state:<7} {self.name:<{width}}  {self.detail}{mend}"

    def row(self) -> dict[str, str]:
        return asdict(self)


def lines(findings: Iterable[Finding]) -> str:
    found = list(findings)
    width = max((len(finding.name) for finding in found), default=0)
    return "".join(finding.line(width) + "\n" for finding in found)


def judge(facts: Facts, *, rate_mbps: float, rtt_ms: float) -> list[Finding]:
    """All findings for a machine that shall carry `rate_mbps` over a link of `rtt_ms`."""
    found = [
        _python(facts),
        Finding("kernel", "ok", facts.kernel),
        _cores(facts),
        _memory(facts),
        _disk(facts),
        _shared_memory(facts),
        _open_files(facts),
        _crc32c(facts),
        *congestion(facts.tcp),
        idle(facts.tcp),
        *buffers(facts.tcp, rate_mbps=rate_mbps, rtt_ms=rtt_ms),
        _sglang(facts),
        _plugin(facts),
    ]
    if facts.testbed_installed:
        found += [_root(facts), _emulation(facts), _programs(facts)]
    return found


def buffers(tcp: TcpLimits, *, rate_mbps: float, rtt_ms: float, streams: int = 4) -> list[Finding]:
    """Whether the sockets' buffers hold the link's bandwidth-delay product over at most `streams`
    connections.
    """
    bdp_bytes = rate_mbps * 1e6 / 8 * rtt_ms / 1e3
    wanted = _round_up(K_BUFFER_PER_BDP * bdp_bytes / streams)
    found = []
    for name, limit, sysctl in (
        ("tcp_rmem", tcp.tcp_rmem_max_bytes, 'net.ipv4.tcp_rmem="4096 131072 {}"'),
        ("tcp_wmem", tcp.tcp_wmem_max_bytes, 'net.ipv4.tcp_wmem="4096 65536 {}"'),
    ):
        needed = math.ceil(K_BUFFER_PER_BDP * bdp_bytes / max(1, limit))
        detail = (
            f"{limit / 2**20:.1f} MiB a stream; {rate_mbps:g} Mbit/s at {rtt_ms:g} ms "
            f"({bdp_bytes / 2**20:.1f} MiB in flight) takes {needed} stream{'s' if needed > 1 else ''}"
        )
        enough = needed <= streams
        state: State = "ok" if enough else "warn"
        found.append(Finding(name, state, detail, "" if enough else f"sysctl -w {sysctl.format(wanted)}"))
    return found


def idle(tcp: TcpLimits) -> Finding:
    """Whether a link that rested restarts warm under CUBIC (BBR does by itself)."""
    if not tcp.slow_start_after_idle:
        return Finding("idle", "ok", "connections that rested go on at their rate")
    detail = (
        "connections that rested start slowly again: the first transfer after a pause takes several RTT more"
    )
    return Finding("idle", "warn", detail, "sysctl -w net.ipv4.tcp_slow_start_after_idle=0")


def congestion(tcp: TcpLimits) -> list[Finding]:
    """BBR and CUBIC: loaded, and allowed to processes without CAP_NET_ADMIN."""
    found = []
    for name, needed in (("bbr", "a lossy link then takes many streams"), ("cubic", "")):
        loaded, allowed = name in tcp.congestion_available, name in tcp.congestion_allowed
        both = " ".join(dict.fromkeys([*tcp.congestion_allowed, name]))
        allow = f'sysctl -w net.ipv4.tcp_allowed_congestion_control="{both}"'
        if loaded and allowed:
            default = ", the default" if tcp.congestion_default == name else ""
            found.append(Finding(name, "ok", f"available and allowed{default}"))
        elif loaded:
            found.append(Finding(name, "warn", "available, but allowed to root only", allow))
        else:
            detail = f"not available{'; ' + needed if needed else ''}"
            found.append(Finding(name, "warn", detail, f"modprobe tcp_{name} && {allow}"))
    return found


def _round_up(value: float) -> int:
    """To a power of two, at least 4 MiB."""
    return max(4 << 20, 1 << math.ceil(math.log2(max(1.0, value))))


def _python(facts: Facts) -> Finding:
    text = ".".join(map(str, facts.python))
    if facts.python >= (3, 11):
        return Finding("python", "ok", text)
    return Finding("python", "lacking", f"{text}; 3.11 is the least", "install Python 3.11 or later")


def _cores(facts: Facts) -> Finding:
    if facts.cores >= 2:
        return Finding("cores", "ok", f"{facts.cores}")
    return Finding(
        "cores",
        "warn",
        f"{facts.cores}; a pump beside a busy server wants one of its own",
        "give it 2 or more",
    )


def _memory(facts: Facts) -> Finding:
    size = facts.memory_bytes / 2**30
    state: State = "ok" if size >= 8 else "warn"
    return Finding("memory", state, f"{size:.1f} GiB", "" if state == "ok" else "CPU servers want 8 GiB")


def _disk(facts: Facts) -> Finding:
    detail = f"{facts.disk_free_bytes / 1e9:.0f} GB free at {facts.disk_path}"
    if facts.disk_free_bytes >= K_LEAST_DISK_BYTES:
        return Finding("disk", "ok", detail)
    return Finding("disk", "warn", detail, f"free {K_LEAST_DISK_BYTES / 1e9:.0f} GB before setting SGLang up")


def _shared_memory(facts: Facts) -> Finding:
    detail = f"{facts.shared_memory_free_bytes / 2**20:.0f} MiB free in /dev/shm"
    if facts.shared_memory_free_bytes >= K_LEAST_SHARED_BYTES:
        return Finding("shm", "ok", detail)
    return Finding(
        "shm", "warn", f"{detail}; a pump's staging lies there", "mount -o remount,size=4G /dev/shm"
    )


def _open_files(facts: Facts) -> Finding:
    unlimited = facts.open_files < 0
    if unlimited or facts.open_files >= K_LEAST_OPEN_FILES:
        return Finding("open files", "ok", "no limit" if unlimited else str(facts.open_files))
    return Finding(
        "open files", "warn", f"{facts.open_files} a process", f"ulimit -n {K_LEAST_OPEN_FILES * 16}"
    )


def _crc32c(facts: Facts) -> Finding:
    if facts.crc32c_in_hardware:
        return Finding("crc32c", "ok", "in hardware")
    return Finding(
        "crc32c", "warn", "in software: checksums will cost more than sockets", "a CPU with SSE 4.2"
    )


def _sglang(facts: Facts) -> Finding:
    found, wanted = facts.sglang.version, facts.sglang.wanted
    if found is None:
        pin = f"sglang=={wanted}" if wanted else "sglang"
        return Finding(
            "sglang",
            "warn",
            f"not seen by {facts.sglang.interpreter}",
            f"--sglang-python PATH, or pip install {pin} for the backend",
        )
    if wanted and found != wanted:
        return Finding(
            "sglang",
            "warn",
            f"{found}; its touch points were written against {wanted}",
            f"pip install sglang=={wanted}",
        )
    return Finding("sglang", "ok", found)


def _plugin(facts: Facts) -> Finding:
    if facts.sglang.plugin_registered:
        return Finding("plugin", "ok", f"registered with {facts.sglang.interpreter}")
    state: State = "lacking" if facts.sglang.version else "warn"
    return Finding(
        "plugin",
        state,
        f"{facts.sglang.interpreter} has no sglang.srt.plugins entry prfaas",
        "pip install prfaas",
    )


def _root(facts: Facts) -> Finding:
    if facts.root:
        return Finding("root", "ok", "network namespaces can be made")
    return Finding("root", "lacking", "emulated networks need it; hello and unit tests don't", "run as root")


def _emulation(facts: Facts) -> Finding:
    if facts.native_netem:
        return Finding("netem", "ok", "native: the kernel has sch_netem")
    missing = [
        name
        for name, there in (("linux.uml", facts.uml_program), ("its modules", facts.uml_modules))
        if not there
    ]
    untried = "" if facts.native_netem is False else " (sch_netem untried: only root can)"
    if not missing:
        return Finding("netem", "ok", f"appliance: sch_netem in a User-Mode Linux guest{untried}")
    detail = f"no sch_netem in this kernel, and User-Mode Linux lacks {' and '.join(missing)}{untried}"
    remedy = "apt-get install --no-install-recommends user-mode-linux"
    return Finding("netem", "lacking" if facts.native_netem is False else "warn", detail, remedy)


def _programs(facts: Facts) -> Finding:
    missing = sorted(name for name, there in facts.programs.items() if not there)
    if not missing:
        return Finding("programs", "ok", ", ".join(sorted(facts.programs)))
    packages = " ".join(sorted({K_PROGRAMS[name] for name in missing}))
    return Finding(
        "programs",
        "lacking",
        f"missing: {', '.join(missing)}",
        f"apt-get install --no-install-recommends {packages}",
    )
