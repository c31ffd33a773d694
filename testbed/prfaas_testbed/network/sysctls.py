"""What the kernel is told for an emulated network: in a site's namespace, in a router's, and in the machine's
own, which only the record may change, so that it is put back.
"""

from __future__ import annotations

import socket

from prfaas_testbed.network.state import Record, read_sysctl

# The most TCP may hold a connection: well above any bandwidth-delay product here.
K_SITE_BUFFER_BYTES = 32 * 2**20
K_CONGESTION = "net.ipv4.tcp_allowed_congestion_control"
# For sh in a router's namespace; it goes on as ip -batch, which reads its lines from standard input.
K_FORWARD = (
    "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/conf/all/send_redirects; "
    "echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 0 > /proc/sys/net/ipv4/icmp_ratelimit; "
    "[ ! -d /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; exec ip -batch -"
)


def quiet_sysctls(more: str) -> str:
    return f"[ ! -d /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; {more}"


def site_sysctls() -> str:
    """Of the site's own namespace: room for long fat links, no memory of earlier connections, and, as `prfaas
    doctor` asks, no slow start on a connection that has rested."""
    return quiet_sysctls(
        f"echo 4096 131072 {K_SITE_BUFFER_BYTES} > /proc/sys/net/ipv4/tcp_rmem; "
        f"echo 4096 65536 {K_SITE_BUFFER_BYTES} > /proc/sys/net/ipv4/tcp_wmem; "
        "echo 1 > /proc/sys/net/ipv4/tcp_no_metrics_save; "
        "echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle; "
        "echo cubic > /proc/sys/net/ipv4/tcp_congestion_control || true; "
        "echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range"
    )


def offers(name: str) -> bool:
    """Whether this kernel has the congestion control; its module is loaded by the question, if it is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as asking:
        try:
            asking.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError:
            return False
    return True


def allow_congestion_controls(record: Record) -> list[str]:
    """Let sites use CUBIC and BBR, where the kernel has them. Returns what is allowed then."""
    allowed = read_sysctl(K_CONGESTION).split()
    more = [name for name in ("cubic", "bbr") if name not in allowed and offers(name)]
    if more:
        record.raise_sysctl(K_CONGESTION, " ".join([*allowed, *more]))
    return [*allowed, *more]
