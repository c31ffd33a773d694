"""netem of the machine's own kernel: the routers are namespaces beside the sites'."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prfaas_testbed.network.base import Emulation
from prfaas_testbed.network.hosts import Host
from prfaas_testbed.network.plan import K_SITE_DEVICE, Plan
from prfaas_testbed.network.router import RouterAgent
from prfaas_testbed.network.state import Record

K_START_S = 20.0
K_SOFTIRQ_FIELD = 7  # of /proc/stat's first line

_PROBE = """
ip link add n0 type veth peer name n1
tc qdisc add dev n0 root handle 1: netem delay 1ms
tc qdisc add dev n0 parent 1:1 handle 2: tbf rate 1mbit burst 10kb limit 10kb
"""


class Native(Emulation):
    name = "native"
    reach_mbps = None

    def __init__(self) -> None:
        super().__init__()
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: RouterAgent | None = None

    @classmethod
    def missing(cls) -> str | None:
        done = subprocess.run(
            ["unshare", "--net", "sh", "-ec", _PROBE], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[0]
            return f"the kernel refuses netem or tbf ({said})"
        return None

    def start(
        self, plan: Plan, wan: Host, devices: dict[str, str], record: Record, folder: Path
    ) -> RouterAgent:
        order_in, order_out = os.pipe()
        answer_in, answer_out = os.pipe()
        self._agent = RouterAgent(order_out, answer_in)
        try:
            self._process = wan.popen(
                [
                    os.path.realpath(sys.executable), "-I", "-S", Path(__file__).with_name("agent.py"),
                    str(order_in), str(answer_out),
                ],
                pass_fds=(order_in, answer_out),
            )  # fmt: skip
        finally:
            os.close(order_in)
            os.close(answer_out)
        record.process(self._process.pid)
        self._agent.wait_ready(K_START_S)
        self._agent.run(None, ["ip", "-batch", "-"], plan.router_lines)
        moves = [f"link set {device} netns {site} name {K_SITE_DEVICE}" for site, device in devices.items()]
        self._agent.run(None, ["ip", "-batch", "-"], moves)
        return self._agent

    def stop(self) -> None:
        if self._agent is not None:
            self._agent.stop()
        if self._process is not None:
            try:
                self._process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def cpu_s(self) -> float:
        """The machine's time in soft interrupts: netem has no process of its own to charge."""
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
        return int(fields[K_SOFTIRQ_FIELD]) / os.sysconf("SC_CLK_TCK")

    def accidents(self) -> dict[str, int]:
        return {}
