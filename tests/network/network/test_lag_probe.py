"""The probe of the emulator's lag, in a network namespace of its own, where nothing delays its frames."""

from __future__ import annotations

import subprocess
import sys

K_HELD_UP_NS = 300_000_000
PROBE = f"""
import subprocess, time
from types import SimpleNamespace
from prfaas_testbed.network import agent

def run(argv):
    # Without netem, which this kernel may lack: frames arrive at once, ahead of the delay that is expected.
    return {{"rc": 0 if argv[0] == "tc" else subprocess.run(argv).returncode, "err": argv[0]}}

probe = agent.LagProbe(run)
for _ in range(100):  # until the kernel has begun to stamp
    probe.send(0.0)
    time.sleep(0.02)
    probe.receive()
    if probe.lags_us:
        break
probe.on_way, probe.lags_us = {{}}, []
clock = time.clock_gettime_ns
for held_up_ns in (0, {K_HELD_UP_NS}):
    agent.time = SimpleNamespace(
        clock_gettime_ns=lambda kind: clock(kind) - held_up_ns, CLOCK_REALTIME=time.CLOCK_REALTIME
    )
    probe.send(0.0)
    time.sleep(0.2)
    probe.receive()
probe.send(agent.K_STALL_S / 2)
probe.send({K_HELD_UP_NS / 1e9})
time.sleep(0.2)
probe.receive()
print(*(lag + round(agent.K_PROBE_DELAY_S * 1e6) for lag in probe.lags_us), len(probe.on_way))
"""


def test_a_sender_that_is_held_up_before_its_frame_is_queued_is_no_lag_but_a_stall_of_the_router_is() -> None:
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    )
    plain_us, held_up_us, little_us, stalled_us, left = map(int, done.stdout.split())
    half_us = K_HELD_UP_NS / 2000
    assert max(plain_us, held_up_us, little_us) < half_us < stalled_us
    assert left == 0
