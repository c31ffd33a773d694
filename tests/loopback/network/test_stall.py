"""The router's agent, stopped from outside as a whole router can be: it notices."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from prfaas_testbed.network.agent import K_STALL_S, LagProbe

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


@pytest.mark.parametrize(("late_s", "counted_s"), [(K_STALL_S / 2, 0.0), (0.2, 0.2)])
def test_a_probe_counts_how_late_it_was_sent_where_that_was_a_stall(late_s: float, counted_s: float) -> None:
    """A little late is the agent's own doing, or that of packets that went first: those passed."""
    sent: list[bytes] = []
    probe = object.__new__(LagProbe)
    probe.sender, probe.head = SimpleNamespace(send=sent.append), bytes(14)  # type: ignore[assignment]
    before_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)
    probe.send(late_s)
    after_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)
    (stamp_ns,) = struct.unpack_from("=Q", sent[0], 14)
    assert before_ns <= stamp_ns + round(counted_s * 1e9) <= after_ns
