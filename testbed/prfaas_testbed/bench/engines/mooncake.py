"""Mooncake's TCP transport between the two ends."""

from __future__ import annotations

from typing import Any

from prfaas_testbed.bench.engines.pools import PoolPeer
from prfaas_testbed.bench.places import Place


class Mooncake(PoolPeer):
    name = "mooncake"
    distribution = "mooncake-transfer-engine-non-cuda"
    module = "mooncake"
    worker = "prfaas_testbed.bench.engines.mooncake_worker"
    batch_segments = 900  # it refuses a batch of more than about 1,000 whole

    def environment(self, place: Place, end: str) -> dict[str, str]:
        return {"MC_FORCE_TCP": "1", "MC_LOG_LEVEL": "WARNING"}

    def connect(self, place: Place, pool_bytes: int) -> dict[str, Any]:
        said = {
            end: worker.call("start", address=place.address(end), pool_bytes=pool_bytes)
            for end, worker in self.ends.items()
        }
        return {"session": said["receiver"]["session"], "peer_base": said["receiver"]["base"]}
