"""A CPU server's process ends with the one that owns it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from prfaas_testbed.instances.sglang_server import K_CPU_PATH, K_OWNER

K_PATIENCE_S = 20.0
K_SERVES = """
import sys, time
from prfaas_cpu.owner import end_with_owner
end_with_owner()
print("serving", flush=True)
time.sleep(60)
"""


def owner() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def server(owner_pid: int | None) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(K_CPU_PATH)}
    if owner_pid is not None:
        env[K_OWNER] = str(owner_pid)
    return subprocess.Popen([sys.executable, "-c", K_SERVES], env=env, stdout=subprocess.PIPE)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_serves_while_its_owner_lives_and_ends_with_it(how: signal.Signals) -> None:
    own = owner()
    with server(own.pid) as serving:
        assert serving.stdout is not None
        assert serving.stdout.readline() == b"serving\n"
        assert serving.poll() is None
        own.send_signal(how)
        assert serving.wait(K_PATIENCE_S) == 3
    own.wait()


def test_where_the_owner_was_gone_before_it_got_so_far_it_serves_nobody() -> None:
    own = owner()
    own.kill()
    own.wait()
    with server(own.pid) as serving:
        assert serving.stdout is not None
        assert serving.stdout.read() == b""
        assert serving.wait(K_PATIENCE_S) == 3


def test_one_that_was_started_by_hand_has_no_owner_and_serves() -> None:
    with server(None) as serving:
        assert serving.stdout is not None
        assert serving.stdout.readline() == b"serving\n"
        serving.kill()
