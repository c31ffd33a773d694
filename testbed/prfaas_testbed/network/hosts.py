"""Mininet hosts with a file system view of their own: /tmp, /run and /dev/shm are private, the checkout is
shared.

The only module that imports mininet, and only when it is called. Of Mininet the hosts and their cables are
used; not its start-up, which raises limits of the whole machine without a record, nor its clean-up, which
kills by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from prfaas.config.places import checkout
from prfaas.model.errors import MachineError
from prfaas_testbed.network.state import K_NETNS, Record

K_PIN_PREFIX = "prfaas-"
K_PRIVATE = ("/tmp", "/run", "/dev/shm")

# Folders to keep are held open by their descriptors while a fresh file system covers them, then bound back.
_PRIVATE_MOUNTS = """
set -e
n=10
for keep in "$@"; do eval "exec $n<\\"\\$keep\\""; n=$((n+1)); done
for place in {places}; do mount -n -t tmpfs -o mode=1777 tmpfs "$place"; done
n=10
for keep in "$@"; do mkdir -p "$keep"; mount -n -c --rbind "/proc/self/fd/$n" "$keep"; n=$((n+1)); done
""".format(places=" ".join(K_PRIVATE))

File = int | IO[Any] | None


class Host:
    """One Mininet host: a network namespace and a mount namespace, kept by a shell, pinned under
    /run/netns.
    """

    def __init__(self, net: Any, name: str, keep: Sequence[Path], record: Record) -> None:
        self.name, self.pin = name, K_PIN_PREFIX + name
        record.namespace(self.pin)
        self.node = net.addHost(name)
        self.pid: int = self.node.pid
        record.process(self.pid)
        _checked(["ip", "netns", "attach", self.pin, str(self.pid)])
        self._privatise(keep)

    def _privatise(self, keep: Sequence[Path]) -> None:
        hidden = [str(path) for path in keep if any(path.is_relative_to(place) for place in K_PRIVATE)]
        self.check(["bash", "-c", _PRIVATE_MOUNTS, "bash", *sorted(set(hidden))])

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stdin: File = subprocess.DEVNULL,
        stdout: File = None,
        stderr: File = None,
        pass_fds: Sequence[int] = (),
        text: bool = False,
    ) -> subprocess.Popen[Any]:
        """Start a program inside this host, in a session and process group of its own; its pid is the
        program's.

        `cwd` (default: the checkout) must be a path that the host sees. Raises MachineError where the
        program isn't there.
        """
        environment = dict(os.environ if env is None else env)
        words = [os.fspath(word) for word in argv]
        folder = os.fspath(cwd or checkout())
        program = words[0] if "/" in words[0] else shutil.which(words[0], path=environment.get("PATH"))
        if program is None or not os.access(os.path.join(folder, program), os.X_OK):
            raise MachineError(
                f"{self.name} can't start {words[0]}: no such program; install it or put it on PATH"
            )
        return subprocess.Popen(
            ["mnexec", "-a", str(self.pid), "env", "-C", folder, "--", *words],
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            text=text,
            start_new_session=True,
            cwd=checkout(),
        )

    def run(self, argv: Sequence[str], lines: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """A short command inside this host, its output kept."""
        # mnexec goes to the folder that it was called in, which is hidden from the host where it is in /tmp.
        return subprocess.run(
            ["mnexec", "-a", str(self.pid), *argv],
            input="".join(line + "\n" for line in lines),
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            cwd=checkout(),
        )

    def check(self, argv: Sequence[str], lines: Sequence[str] = ()) -> str:
        """`run`, raising MachineError with what the command said if it fails."""
        done = self.run(argv, lines)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().replace("\n", "; ")
            raise MachineError(f"{self.name}: {' '.join(argv[:4])} failed: {said}")
        return done.stdout


def new_network() -> Any:
    """An empty Mininet, without its start-up's changes to the machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports distutils
        from mininet.log import setLogLevel
        from mininet.net import Mininet
    setLogLevel("critical")
    Mininet.inited = True
    return Mininet(controller=None, build=False)


def join(a: Host, device_a: str, b: Host, device_b: str, record: Record) -> None:
    """A veth cable between two hosts; loss must hit packets, so nothing is offloaded on either end."""
    from mininet.link import Link

    record.devices([device_a, device_b])
    Link(a.node, b.node, intfName1=device_a, intfName2=device_b)
    for host, device in ((a, device_a), (b, device_b)):
        host.check(["ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off", "tx", "off"])


def check_free(pins: Sequence[str], devices: Sequence[str]) -> None:
    """Raises MachineError if a name that a network needs is taken on this machine."""
    for pin in pins:
        if (K_NETNS / pin).exists():
            raise MachineError(
                f"the network namespace {pin} is taken; if a testbed left it, `prfaas-testbed clean` in its "
                f"checkout removes it, else `ip netns delete {pin}`"
            )
    for device in devices:
        if Path("/sys/class/net", device).exists():
            raise MachineError(f"the network interface {device} is taken; rename it, or the site")


def _checked(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
