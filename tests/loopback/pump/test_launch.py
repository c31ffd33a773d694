"""Finding and starting a node's pump at a path where other users may write: /tmp is the default."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prfaas.config.pump import PumpConfig
from prfaas.model.errors import MachineError
from prfaas.pump_client import LocalPumpClient, launch

K_NOBODY = 65534
K_LISTEN = """
import os, socket, sys
os.setuid(int(sys.argv[2]))  # here, not by Popen: the interpreter may lie where others can't read
sock = socket.socket(socket.AF_UNIX); sock.bind(sys.argv[1]); sock.listen()
os.chmod(sys.argv[1], 0o777)
print("listening", flush=True); sys.stdin.read()
"""
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user as well")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp: everybody writes to it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@needs_root
def test_a_socket_of_another_user_is_not_taken_for_a_pump(shared: Path, monkeypatch) -> None:
    path = shared / "p.sock"
    listener = subprocess.Popen(
        [sys.executable, "-c", K_LISTEN, str(path), str(K_NOBODY)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with listener:
        assert listener.stdin
        assert listener.stdout
        assert listener.stdout.readline() == "listening\n"
        config = PumpConfig(site="west", control_socket=path)
        with pytest.raises(MachineError, match=f"belongs to user {K_NOBODY}"):
            LocalPumpClient.open(config)
        monkeypatch.setattr(os, "getuid", lambda: K_NOBODY)  # whose own it is
        sock = launch.connect(path)
        assert sock is not None
        sock.close()
        listener.stdin.close()


@pytest.mark.parametrize("name", ["lock", "log"])
def test_a_link_laid_where_a_pump_writes_is_not_followed(shared: Path, tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    (shared / f"p.sock.{name}").symlink_to(precious)
    with pytest.raises(MachineError, match=f"p.sock.{name}: Too many levels of symbolic links"):
        LocalPumpClient.open(PumpConfig(site="west", control_socket=shared / "p.sock"))
    assert precious.read_text() == "as it was"


@needs_root
def test_a_file_that_another_user_laid_there_is_not_written_to(shared: Path) -> None:
    log = shared / "p.sock.log"
    log.write_text("")
    os.chown(log, K_NOBODY, K_NOBODY)
    with pytest.raises(MachineError, match=f"p.sock.log.* belongs to user {K_NOBODY}|Permission denied"):
        LocalPumpClient.open(PumpConfig(site="west", control_socket=shared / "p.sock"))
    assert log.read_text() == ""


def test_what_a_started_pump_leaves_beside_its_socket_is_its_users_alone(shared: Path) -> None:
    config = PumpConfig(site="west", control_socket=shared / "p.sock", idle_exit_s=0.2)
    client = LocalPumpClient.open(config)
    try:
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in shared.iterdir()}
    finally:
        client.close()
    assert set(modes) == {"p.sock", "p.sock.lock", "p.sock.log", "p.sock.json"}
    assert all(mode & 0o077 == 0 for mode in modes.values()), modes
