from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prfaas.config.loading import check
from prfaas.config.topology import Topology
from prfaas_testbed.network.state import K_TMP_PREFIX, Lock, read_sysctl

K_SYSCTLS = ("net.core.rmem_default", "net.ipv4.tcp_allowed_congestion_control")


@pytest.fixture(scope="session")
def wait_s() -> float:
    """Another run may hold the machine; it is waited for, so that tests don't fail for company."""
    return 90.0


@pytest.fixture(scope="session")
def small() -> Topology:
    """Slow enough for a busy machine: asymmetric delay, loss by chance one way and in bursts the other."""
    return check(
        {
            "name": "small",
            "text": "for tests",
            "sites": {"east": {}, "west": {}},
            "links": [
                {"from": "east", "to": "west", "delay_ms": 15, "rate_mbps": 20, "loss_percent": 1},
                {
                    "from": "west",
                    "to": "east",
                    "delay_ms": 10,
                    "rate_mbps": 10,
                    "bursty_loss": {"enter_percent": 0.5, "leave_percent": 30},
                },
            ],
        },
        Topology,
        "small",
    )


@pytest.fixture
def left(wait_s: float) -> Callable[[], list[str]]:
    """What a run could leave: pinned namespaces, guests' folders, raised sysctls. Asked while nobody runs."""

    def look() -> list[str]:
        lock = Lock("looking", wait_s)
        try:
            found = [str(path) for path in Path("/run/netns").glob("prfaas-*")]
            found += [str(path) for path in Path("/tmp").glob(f"{K_TMP_PREFIX}*")]
            return found + [f"{name}={read_sysctl(name)}" for name in K_SYSCTLS]
        finally:
            lock.release()

    return look
