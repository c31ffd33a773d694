"""Two Mooncake engines over TCP in a process of their own, driven by lines of JSON: what test_conformance.py
asks of any engine. Offsets are into a pool at each end; what lies beyond is nobody's registered memory.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from mooncake.engine import TransferEngine


def main(pool_bytes: int) -> None:
    ends = []
    for _ in range(2):
        engine = TransferEngine()
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        memory = np.zeros(2 * pool_bytes, np.uint8)  # the second half is never registered
        assert engine.register_memory(memory.ctypes.data, pool_bytes) == 0
        ends.append((engine, memory))
    (sender, source), (receiver, target) = ends
    session = f"127.0.0.1:{receiver.get_rpc_port()}"
    for line in sys.stdin:
        ask = json.loads(line)
        answer: object = None
        if ask["do"] == "write":
            rows = ask["rows"]
            answer = (
                sender.batch_transfer_sync_write(
                    session,
                    [source.ctypes.data + row[0] for row in rows],
                    [target.ctypes.data + row[1] for row in rows],
                    [row[2] for row in rows],
                )
                == 0
            )
        elif ask["do"] == "put":
            data = np.frombuffer(bytes.fromhex(ask["data"]), np.uint8)
            (source if ask["end"] == "source" else target)[ask["at"] : ask["at"] + len(data)] = data
        elif ask["do"] == "get":
            answer = target[ask["at"] : ask["at"] + ask["n"]].tobytes().hex()
        sys.stdout.write(f"@{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
