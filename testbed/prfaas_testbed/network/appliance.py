"""The real sch_netem where the machine's kernel has none: a User-Mode Linux guest is the WAN's router.

The guest runs Debian's linux.uml in the `wan` host's namespace, on the machine's own file system
(read-only), and takes each site's frames by a raw packet socket on the wan host's end of the site's cable.
It routes: a bridge would see its own frames again. A router that waits for a processor is a router with
another delay: the guest has a reserved share of one while load runs (realtime.py), or a real-time priority
where none can be had, and takes few packets at a time, so that those whose time has come don't wait for those
that just arrive.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prfaas.model.errors import MachineError
from prfaas_testbed.network.base import Emulation
from prfaas_testbed.network.edges import coalesce, dropped, filter_sockets
from prfaas_testbed.network.hosts import Host
from prfaas_testbed.network.plan import K_SITE_DEVICE, Plan
from prfaas_testbed.network.realtime import reserve
from prfaas_testbed.network.router import RouterAgent
from prfaas_testbed.network.state import Record, in_namespace, read_sysctl

K_MODULES = Path("/usr/lib/uml/modules")
K_PRIORITY = 10  # SCHED_FIFO
K_SHARE, K_PERIOD_S = 0.94, 0.0005  # of a processor; kernels give deadlines at most 0.95
K_MEMORY = "256M"
K_SOCKET_BYTES = (
    64 * 2**20
)  # of a raw socket's queue; with less, bursts are dropped before they reach the guest
K_DEPTH = 32  # packets a device takes at one go; with 256, others waited up to 7 ms at full rate
K_BOOT_S = 40.0
K_RMEM = "net.core.rmem_default"

_INIT = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
mount -n -t proc proc /proc
mount -n -t sysfs sysfs /sys
mount -n -t tmpfs tmpfs /run
modprobe -d {modules} -a sch_netem sch_tbf sch_red veth
echo 100000 > /proc/sys/net/core/netdev_max_backlog
echo {depth} > /proc/sys/net/core/netdev_budget
stty -F /dev/ttyS0 raw -echo
exec {python} -I -S {agent} 0 1 < /dev/ttyS0 > /dev/ttyS0
"""


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None  # it ended


class Appliance(Emulation):
    name = "appliance"
    reach_mbps = 210.0

    def __init__(self) -> None:
        super().__init__()
        self._guest: subprocess.Popen[bytes] | None = None
        self._agent: RouterAgent | None = None
        self._wan: Host | None = None
        self._ends: tuple[tuple[Host, str], ...] = ()

    @classmethod
    def missing(cls) -> str | None:
        for program, package in (
            ("linux.uml", "user-mode-linux"),
            ("modprobe", "kmod"),
            ("chrt", "util-linux"),
        ):
            if shutil.which(program) is None:
                return f"{program} is missing; install Debian's package {package}"
        if not K_MODULES.is_dir():
            return f"{K_MODULES} is missing; install Debian's package user-mode-linux"
        return None

    def start(
        self, plan: Plan, wan: Host, devices: dict[str, str], record: Record, folder: Path
    ) -> RouterAgent:
        self._wan = wan
        init = folder / "init"
        modules = folder / "root" / "lib"
        modules.mkdir(parents=True)
        (modules / "modules").symlink_to(K_MODULES)
        python = os.path.realpath(sys.executable)
        agent = Path(__file__).with_name("agent.py").resolve()
        init.write_text(
            _INIT.format(
                modules=shlex.quote(str(folder / "root")),
                python=shlex.quote(python),
                agent=shlex.quote(str(agent)),
                depth=K_DEPTH,
            )
        )
        init.chmod(0o755)
        if int(read_sysctl(K_RMEM)) < K_SOCKET_BYTES:
            record.raise_sysctl(K_RMEM, str(K_SOCKET_BYTES))
        numbers = {site: number for number, site in enumerate(devices)}
        order_in, order_out = os.pipe()
        answer_in, answer_out = os.pipe()
        self._agent = RouterAgent(order_out, answer_in, self._waiting_bytes)
        log = (folder / "guest.log").open("wb")
        try:
            self._guest = wan.popen(
                [
                    "chrt", "-f", str(K_PRIORITY), "linux.uml", f"mem={K_MEMORY}",
                    "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}", "quiet",
                    "con=null", "con0=null,fd:1", f"ssl0=fd:{order_in},fd:{answer_out}",
                    f"uml_dir={folder}", "umid=router",
                    *(
                        f"vec{number}:transport=raw,ifname={devices[site]},depth={K_DEPTH},gro=0,mtu={plan.site_mtu_bytes}"
                        for site, number in numbers.items()
                    ),
                ],
                env={"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": "/dev/shm", "HOME": str(folder)},
                cwd=folder,
                stdout=log,
                stderr=log,
                pass_fds=(order_in, answer_out),
            )  # fmt: skip
        finally:
            log.close()
            os.close(order_in)
            os.close(answer_out)
        record.process(self._guest.pid)
        try:
            self._agent.wait_ready(K_BOOT_S)
            self._agent.run(None, ["ip", "-batch", "-"], plan.router_lines)
            moves = [
                f"link set vec{number} netns {site} name {K_SITE_DEVICE}" for site, number in numbers.items()
            ]
            self._agent.run(None, ["ip", "-batch", "-"], moves)
        except MachineError as error:
            tail = (folder / "guest.log").read_text(errors="replace").strip().splitlines()[-3:]
            raise MachineError(
                f"the appliance: {error}" + (f"; it said: {' | '.join(tail)}" if tail else "")
            ) from None
        return self._agent

    def started(self, record: Record) -> None:
        record.restore_sysctl(K_RMEM)

    def cables(self, ends: Sequence[tuple[Host, str]]) -> None:
        """Frames cost less; where this kernel can't have them so, they cost what they do."""
        assert self._guest is not None
        assert self._wan is not None
        self._ends = tuple(ends)
        try:
            filter_sockets(self._guest.pid, self._wan)
        except OSError as error:
            self.does_without["filters on its packet sockets"] = error.strerror or str(error)
        alone = [device for host, device in ends if not coalesce(host, device)]
        if alone:
            self.does_without["frames handed over together"] = f"refused for {', '.join(alone)}"

    def settled(self) -> None:
        """Not earlier: what forks under a deadline has ordinary children, whose priority is mended here."""
        assert self._guest is not None
        assert self._wan is not None
        try:
            reserve(self._guest.pid, K_SHARE * K_PERIOD_S, K_PERIOD_S)
        except OSError as error:  # then its real-time priority must do
            self.does_without["a processor's time of its own"] = error.strerror or str(error)
        for pid in in_namespace(self._wan.pin):
            if parent(pid) == self._guest.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(K_PRIORITY))

    def stop(self) -> None:
        if self._agent is not None:
            self._agent.stop()
        if self._guest is not None:
            try:
                self._guest.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                self._guest.kill()
                self._guest.wait()
            self._guest = None
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def cpu_s(self) -> float:
        """Of the guest's kernel and its processes, those that ended included."""
        if self._wan is None or self._guest is None:
            return 0.0
        ticks = 0
        for pid in in_namespace(self._wan.pin):
            if pid == self._wan.pid:
                continue
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += sum(int(field) for field in fields[11 : 15 if pid == self._guest.pid else 13])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _waiting_bytes(self) -> int:
        """Memory of frames that sites sent and the guest hasn't read: of its sockets for every protocol
        (0003).
        """
        assert self._wan is not None
        try:
            rows = Path(f"/proc/{self._wan.pid}/net/packet").read_text().splitlines()[1:]
        except OSError:
            return 0
        return sum(
            int(fields[6]) for fields in map(str.split, rows) if len(fields) > 6 and fields[3] == "0003"
        )

    def accidents(self) -> dict[str, int]:
        """Frames that a site sent and the guest's sockets had no room for, or either end of a cable."""
        if self._wan is None:
            return {}
        # The guest sends by a second socket a device, never read: its drops mean nothing.
        shown = self._wan.run(["ss", "-0", "-a", "-n", "-m"]).stdout
        reading = [line for line in shown.splitlines() if re.search(r"\s\*:wan-", line)]
        counts = re.findall(r"skmem:\([^)]*,d(\d+)\)", "\n".join(reading))
        return {"packet sockets": sum(int(count) for count in counts), "cables": dropped(self._ends)}
