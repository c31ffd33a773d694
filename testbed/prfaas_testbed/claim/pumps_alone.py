"""What two pumps hold over many small transfers between them, on loopback, with nothing else beside them.

A pump that receives remembers ended transfers, up to a limit that a load of servers reaches after half an
hour. Here it is passed in minutes, so that growth to a limit is told from growth without one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from prfaas.config.pump import PumpConfig
from prfaas.model.errors import MachineError
from prfaas.model.transfer import TransferKind
from prfaas.pump_client import LocalPumpClient
from prfaas.pump_client.launch import connect

K_TRANSFERS = 24_000
K_LOOK_EVERY = 2_000
K_BYTES = 1 << 18
K_SEGMENT_BYTES = 4096
K_START_S = 20.0
K_END_S = 30.0  # each transfer must have ended by then


def alone(transfers: int = K_TRANSFERS, look_every: int = K_LOOK_EVERY) -> list[dict[str, Any]]:
    """Rows of what both pumps hold, by transfers ended so far. Raises MachineError where one won't start."""
    with tempfile.TemporaryDirectory(prefix="prfaas-pumps-") as held:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            configs = [_start(Path(held), site, processes) for site in ("sender", "receiver")]
            with (
                LocalPumpClient.open(configs[0], start=False) as sender,
                LocalPumpClient.open(configs[1], start=False) as receiver,
            ):
                return _played(sender, receiver, processes, transfers, look_every)
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def _start(folder: Path, site: str, processes: list[subprocess.Popen[bytes]]) -> PumpConfig:
    config = PumpConfig.model_validate({"site": site, "control_socket": folder / f"{site}.sock"})
    path = folder / f"{site}.yaml"
    path.write_text(config.model_dump_json(exclude_none=True), encoding="utf-8")
    argv = [sys.executable, "-m", "prfaas.pump", "--config", str(path)]
    with (folder / f"{site}.log").open("wb") as log:
        processes.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
    end_s = time.monotonic() + K_START_S
    while (sock := connect(config.control_path)) is None:
        if time.monotonic() > end_s or processes[-1].poll() is not None:
            said = (folder / f"{site}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            raise MachineError(f"the pump {site} didn't start: {said[-1] if said else 'it said nothing'}")
        time.sleep(0.05)
    sock.close()
    return config


def _played(
    sender: LocalPumpClient, receiver: LocalPumpClient, processes: list[subprocess.Popen[bytes]],
    transfers: int, look_every: int,
) -> list[dict[str, Any]]:  # fmt: skip
    source, target = np.ones(K_BYTES, np.uint8), np.zeros(K_BYTES, np.uint8)
    for client, array in ((sender, source), (receiver, target)):
        client.register([(array.ctypes.data, K_BYTES)])
    offsets = np.arange(0, K_BYTES, K_SEGMENT_BYTES, dtype=np.uint64)
    lengths = np.full(len(offsets), K_SEGMENT_BYTES, np.uint64)
    begun_s = time.monotonic()
    rows = []
    for number in range(transfers + 1):
        lease = receiver.grant_lease(number + 1, 0, [(target.ctypes.data, K_BYTES)], K_END_S)
        outcome = sender.submit(
            lease.grant, source.ctypes.data + offsets, target.ctypes.data + offsets, lengths,
            kind=TransferKind.KV, deadline_s=K_END_S, last=True,
        ).wait(K_END_S)  # fmt: skip
        if outcome is None or not outcome.ok:
            raise MachineError(f"transfer {number} between two pumps on loopback failed: {outcome}")
        lease.wait(K_END_S)
        lease.revoke()
        if number % look_every == 0:
            at_s = round(time.monotonic() - begun_s, 1)
            sends, receives = (_own_bytes(process.pid) for process in processes)
            rows.append(
                {"transfers": number, "at_s": at_s, "sender_bytes": sends, "receiver_bytes": receives}
            )
    return rows


def _own_bytes(pid: int) -> int:
    """Resident memory of the process's own; what it shares with a server isn't its to grow."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0
