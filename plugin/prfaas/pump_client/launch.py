"""Find the node's pump, or start one: detached, under a file lock, so that many servers start one between
them.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from prfaas.config.pump import PumpConfig
from prfaas.model.errors import MachineError

K_START_S = 20.0
K_LOOK_S = 0.1


def connect(path: Path) -> socket.socket | None:
    """A connection to the pump at `path`; None when nobody answers. Raises MachineError.

    Where the path lies in /tmp anybody may have put a socket there: a pump reads and writes the memory of the
    server that attaches, so it must be this user's, or root's.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise MachineError(f"{path}: {error.strerror or error}") from None
    _, uid = peer_of(sock)
    if uid not in (os.getuid(), 0):
        sock.close()
        raise MachineError(
            f"{path}: the pump there belongs to user {uid}, not to {os.getuid()} or root; "
            "name another control_socket"
        )
    return sock


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user of who listens at the other end of a Unix socket."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", found)
    return pid, uid


def connect_or_start(config: PumpConfig, *, patience_s: float = K_START_S) -> socket.socket:
    """Raises MachineError when a pump neither answers nor starts; the message ends with what it logged. One
    that an operator starts is waited for, for `patience_s`.
    """
    path = config.control_path
    sock = connect(path)
    if sock is not None:
        return sock
    if config.started_by == "operator":
        return _await(path, patience_s)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{path.parent}: {error.strerror}") from None
    lock = _open_own(Path(f"{path}.lock"), os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sock = connect(path)
        return sock if sock is not None else _start(config, path)
    finally:
        os.close(lock)


def _await(path: Path, patience_s: float) -> socket.socket:
    end_s = time.monotonic() + patience_s
    while time.monotonic() < end_s:
        time.sleep(K_LOOK_S)
        if (sock := connect(path)) is not None:
            return sock
    raise MachineError(
        f"{path}: no pump answers; by `started_by: operator` it is a service of its own (prfaas pump)"
    )


def _start(config: PumpConfig, path: Path) -> socket.socket:
    log_path = Path(f"{path}.log")
    config_path = Path(f"{path}.json")
    _write_private(config_path, config.model_dump_json(exclude_none=True))
    with os.fdopen(_open_own(log_path, os.O_WRONLY | os.O_APPEND), "ab") as out:
        size = out.seek(0, os.SEEK_END)
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
    with os.fdopen(_open_own(fresh, os.O_WRONLY | os.O_TRUNC), "w") as out:
        out.write(text)
    fresh.rename(path)


def _open_own(path: Path, flags: int) -> int:
    """A descriptor of a file that only this user reads, made if need be; never by a link, and never another
    user's file, either of which may lie at a name in /tmp that can be guessed. Raises MachineError.
    """
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror or error}") from None
    owner = os.fstat(fd).st_uid
    if owner != os.getuid():
        os.close(fd)
        raise MachineError(
            f"{path}: belongs to user {owner}, not to {os.getuid()}; name another control_socket"
        )
    return fd
