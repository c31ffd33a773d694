"""The router's agent, stopped from outside as a whole router can be: it notices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

K_STOPPED_S = 0.3
AGENT = """
import sys
from types import SimpleNamespace
from prfaas_testbed.network.agent import Agent

def send(late_s):
    sys.stderr.write(f"{late_s}\\n")
    sys.stderr.flush()

agent = Agent(0, 1)
agent.probe = SimpleNamespace(receive=lambda: None, send=send)
agent.observer = SimpleNamespace(every_s=0.1, sample=lambda: {})
agent.loop()
"""


def test_a_stall_of_the_router_is_told_though_no_probe_was_on_its_way() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", AGENT], stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True
    ) as agent:
        assert agent.stdin is not None
        assert agent.stderr is not None
        try:
            for _ in range(5):
                agent.stderr.readline()
            os.kill(agent.pid, signal.SIGSTOP)
            time.sleep(K_STOPPED_S)
            os.kill(agent.pid, signal.SIGCONT)
            lates_s = [float(agent.stderr.readline()) for _ in range(5)]
        finally:
            agent.stdin.close()
            agent.kill()
            agent.stderr.close()
    # Of the time it was stopped all but what was left until the next probe, three quarters of 0.1 s at most.
    assert max(lates_s) > K_STOPPED_S - 0.1
