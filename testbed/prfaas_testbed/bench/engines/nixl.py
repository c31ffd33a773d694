"""NIXL over UCX's TCP transport between the two ends."""

from __future__ import annotations

from typing import Any

from prfaas_testbed.bench.engines.pools import PoolPeer
from prfaas_testbed.bench.places import Place


class Nixl(PoolPeer):
    name = "nixl"
    distribution = "nixl-cu12"
    module = "nixl_cu12"
    worker = "prfaas_testbed.bench.engines.nixl_worker"
    batch_segments = 100_000

    def environment(self, place: Place, end: str) -> dict[str, str]:
        # TCP only: between hosts there is no shared memory, and over loopback it would be used. Left to
        # itself UCX takes a site's lo for a way to the other site.
        return {"UCX_TLS": "tcp", "UCX_NET_DEVICES": place.device(end), "NIXL_LOG_LEVEL": "WARNING"}

    def connect(self, place: Place, pool_bytes: int) -> dict[str, Any]:
        said = {
            end: worker.call("start", name=end, pool_bytes=pool_bytes) for end, worker in self.ends.items()
        }
        self.ends["sender"].call("connect", metadata=said["receiver"]["metadata"])
        return {"peer_base": said["receiver"]["base"]}
