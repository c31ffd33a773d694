"""One end of a NIXL transfer over UCX's TCP, on ordinary memory and without SGLang."""

from __future__ import annotations

import base64
import time
from typing import Any

from nixl_cu12._api import nixl_agent, nixl_agent_config

from prfaas_testbed.bench.engines.pool_worker import K_POLL_S, Pool, common_handlers, move_batches
from prfaas_testbed.bench.worker import Handler


class End:
    """An agent and one registered pool."""

    pool: Pool
    peer: str

    def start(self, name: str, pool_bytes: int) -> dict[str, Any]:
        self.agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        self.pool = Pool(pool_bytes)
        self.agent.register_memory([(self.pool.base, pool_bytes, 0, "")], "DRAM")
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "base": self.pool.base}

    def connect(self, metadata: str) -> None:
        name = self.agent.add_remote_agent(base64.b64decode(metadata))
        self.peer = name.decode() if isinstance(name, bytes) else name

    def move(self, peer_base: int, segment_bytes: int, **load: Any) -> dict[str, Any]:
        def write(offsets: list[int]) -> None:
            self._write(offsets, peer_base, segment_bytes)

        return move_batches(write, segment_bytes=segment_bytes, **load)

    def _write(self, offsets: list[int], peer_base: int, segment_bytes: int) -> None:
        def descriptors(base: int) -> Any:
            return self.agent.get_xfer_descs([(base + at, segment_bytes, 0) for at in offsets], "DRAM")

        handle = self.agent.initialize_xfer(
            "WRITE", descriptors(self.pool.base), descriptors(peer_base), self.peer
        )
        state = self.agent.transfer(handle)
        while state == "PROC":
            time.sleep(K_POLL_S)  # a busy wait would only take a core from the transfer
            state = self.agent.check_xfer_state(handle)
        self.agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"a transfer of {len(offsets)} segments ended as {state}")


def handlers() -> dict[str, Handler]:
    end = End()
    return {
        **common_handlers(lambda: end.pool),
        "start": end.start,
        "connect": end.connect,
        "move": end.move,
    }
