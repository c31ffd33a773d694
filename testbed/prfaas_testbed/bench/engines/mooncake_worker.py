"""One end of a Mooncake transfer: its TCP transport as SGLang's `mooncake_tcp` uses it (P2PHANDSHAKE,
batches).
"""

from __future__ import annotations

from typing import Any

from mooncake.engine import TransferEngine

from prfaas_testbed.bench.engines.pool_worker import Pool, common_handlers, move_batches
from prfaas_testbed.bench.worker import Handler


class End:
    """An engine and one registered pool."""

    pool: Pool

    def __init__(self) -> None:
        self.engine = TransferEngine()

    def start(self, address: str, pool_bytes: int) -> dict[str, Any]:
        if self.engine.initialize(address, "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError(f"TransferEngine.initialize({address!r}) failed")
        self.pool = Pool(pool_bytes)
        if self.engine.register_memory(self.pool.base, pool_bytes) != 0:
            raise RuntimeError("register_memory failed")
        return {"session": f"{address}:{self.engine.get_rpc_port()}", "base": self.pool.base}

    def move(self, session: str, peer_base: int, segment_bytes: int, **load: Any) -> dict[str, Any]:
        def write(offsets: list[int]) -> None:
            answer = self.engine.batch_transfer_sync_write(
                session,
                [self.pool.base + at for at in offsets],
                [peer_base + at for at in offsets],
                [segment_bytes] * len(offsets),
            )
            if answer != 0:
                raise RuntimeError(f"batch_transfer_sync_write of {len(offsets)} segments answered {answer}")

        return move_batches(write, segment_bytes=segment_bytes, **load)


def handlers() -> dict[str, Handler]:
    end = End()
    return {**common_handlers(lambda: end.pool), "start": end.start, "move": end.move}
