"""Programs that others bring."""

K_NETWORK_PROGRAMS = {
    "mnexec": "mininet",
    "ip": "iproute2",
    "tc": "iproute2",
    "ss": "iproute2",
    "ethtool": "ethtool",
    "nft": "nftables",
    "iperf3": "iperf3",
    "ping": "iputils-ping",
    "tcpdump": "tcpdump",
    "unshare": "util-linux",
    "findmnt": "util-linux",
    "mount": "mount",
}
"""What an emulated network runs, and the Debian package that has it."""
