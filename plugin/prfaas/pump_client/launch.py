"""Find the node's pump, or start one: detached, under a file lock, so that many servers start one between
them.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from prfaas.config.pump import PumpConfig
from prfaas.model.errors import MachineError

K_START_S = 20.0


def connect(path: Path) -> socket.socket | None:
    """A connection to the pump at `path`; None when nobody answers."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise MachineError(f"{path}: {error.strerror}") from None
    return sock


def connect_or_start(config: PumpConfig) -> socket.socket:
    """Raises MachineError when a pump neither answers nor starts; the message ends with what it logged."""
    path = config.control_path
    sock = connect(path)
    if sock is not None:
        return sock
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sock = connect(path)
        return sock if sock is not None else _start(config, path)
    finally:
        os.close(lock)


def _start(config: PumpConfig, path: Path) -> socket.socket:
    log_path = Path(f"{path}.log")
    config_path = Path(f"{path}.json")
    _write_private(config_path, config.model_dump_json(exclude_none=True))
    with open(log_path, "ab") as out:
        size = out.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "prfaas.pump", "--config", str(config_path), "--for-clients"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, close_fds=True, cwd="/",
        )  # fmt: skip
    end_s = time.monotonic() + K_START_S
    while time.monotonic() < end_s:
        sock = connect(path)
        if sock is not None:
            # It may outlive us, and we it: a child that nobody waits for would stay as a zombie.
            threading.Thread(target=process.wait, name="prfaas-pump-ends", daemon=True).start()
            return sock
        if process.poll() is not None:
            break
        time.sleep(0.02)
    else:
        process.kill()
        process.wait()
    with open(log_path, "rb") as written:
        written.seek(size)
        said = written.read().decode(errors="replace").strip().splitlines()
    raise MachineError(f"the pump didn't start: {said[-1] if said else 'it said nothing'} (log: {log_path})")


def _write_private(path: Path, text: str) -> None:
    fresh = path.with_suffix(f".{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as out:
        out.write(text)
    fresh.rename(path)
