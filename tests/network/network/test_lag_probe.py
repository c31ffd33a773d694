"""The probe of the emulator's lag, in a network namespace of its own, where nothing delays its frames: each
arrives ahead of the time at which netem, which this kernel may lack, would have let it go.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

K_HELD_UP_NS = 300_000_000
K_STARVED_S = 0.3
PROBE = f"""
import json, subprocess, time
from types import SimpleNamespace
from prfaas_testbed.network import agent

def run(argv):
    return {{"rc": 0 if argv[0] == "tc" else subprocess.run(argv).returncode, "err": argv[0]}}

probe = agent.LagProbe(run)
ahead_ns, agent.K_PROBES_AHEAD_NS = agent.K_PROBES_AHEAD_NS, 1
for _ in range(100):  # until the kernel has begun to stamp
    probe.send()
    time.sleep(0.03)
    if list(probe.receive()):
        break
found = {{}}
agent.K_PROBES_AHEAD_NS = ahead_ns
cases = ("plain", 0, 0), ("held up", {K_HELD_UP_NS}, 0), ("starved", 0, {K_STARVED_S})
for name, held_up_ns, starved_s in cases:
    probe.planned_ns, probe.due_ns, probe.on_way = 0, 0, {{}}
    clock = time.clock_gettime_ns
    agent.time = SimpleNamespace(
        clock_gettime_ns=lambda kind: clock(kind) - held_up_ns, CLOCK_REALTIME=time.CLOCK_REALTIME
    )
    probe.send()
    takes_us = [takes_ns // 1000 for _, takes_ns in probe.on_way.values()]
    time.sleep(0.2 + starved_s)
    lags_us = list(probe.receive())
    found[name] = [takes_us, lags_us, len(probe.on_way)]
print(json.dumps(found))
"""


def test_a_frame_is_due_after_those_before_it_by_the_kernel_s_stamps_however_late_this_process_runs() -> None:
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    )
    for name, (takes_us, lags_us, left) in json.loads(done.stdout).items():
        ends_us = list(itertools.accumulate(takes_us))
        assert left == 0, name
        assert 10 < len(lags_us) == len(ends_us), name
        assert max(takes_us) <= 90_000, name
        # All arrived at once, the last a second before its time, none as late as this process was.
        for lag_us, end_us in zip(lags_us, ends_us, strict=True):
            assert 0 <= lag_us + end_us < K_HELD_UP_NS / 2000, name
