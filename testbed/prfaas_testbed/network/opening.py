"""Opening an emulated network, one at a time on a machine, and taking it down whatever happens inside."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prfaas.config.topology import Topology
from prfaas.model.errors import MachineError
from prfaas.model.programs import K_NETWORK_PROGRAMS
from prfaas_testbed.network.disk import mount_disk
from prfaas_testbed.network.network import Network, Progress
from prfaas_testbed.network.state import K_TMP_PREFIX, Lock, Record, clean_up, state_file

K_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21, "CAP_SYS_NICE": 23}
"""What of root's rights a network is made with, by their bits; root of a container often lacks some."""


def held_capabilities() -> int:
    """This process's, as bits."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1), 16) if found else -1


def check_machine() -> None:
    """Raises MachineError for what this machine lacks: root or a right of it, or a program, with the package
    that has it."""
    if os.geteuid() != 0:
        raise MachineError("an emulated network needs root: run it with sudo")
    held = held_capabilities()
    if lacks := [name for name, bit in K_CAPABILITIES.items() if not held >> bit & 1]:
        raise MachineError(
            f"an emulated network needs all of root's rights, and this root lacks {', '.join(lacks)}: "
            f"run it outside a container, or in a privileged one"
        )
    for program, package in K_NETWORK_PROGRAMS.items():
        if shutil.which(program) is None:
            raise MachineError(
                f"{program} is missing; install Debian's package {package}, or run `make setup`"
            )


def recover(lock: Lock, progress: Progress) -> None:
    """Clean up after a run that was killed, in this checkout or in the one that last held the lock."""
    for path in {state_file(), Path(lock.previous_state) if lock.previous_state else state_file()}:
        for line in clean_up(path, grace_s=0.5):
            progress(f"left by a killed run, now gone: {line}")


@contextmanager
def open_network(
    topology: Topology,
    workdir: str | os.PathLike[str],
    progress: Progress | None = None,
    emulation: str | None = None,
    wait_s: float = 0.0,
    disks: Sequence[Path] = (),
) -> Iterator[Network]:
    """Bring `topology` up, and take it down whatever happens inside.

    `workdir` (made if missing) is seen by the sites under its own path, as the checkout is. `emulation`
    forces `native` or `appliance`; another run is waited for up to `wait_s`. Each of `disks`, a folder, is a
    small disk meanwhile, whose files stay. Raises MachineError when this machine lacks something or another
    run holds it.
    """
    tell = progress or (lambda text: None)
    check_machine()
    workdir = Path(workdir).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    with terminated_as_interrupt():
        lock = Lock(topology.name, wait_s)
        try:
            recover(lock, tell)
            record = Record(state_file())
            folder = Path(tempfile.mkdtemp(prefix=K_TMP_PREFIX))
            record.folder(folder)
            net = Network(topology, workdir, tell, record)
            try:
                for disk in (one.resolve() for one in disks):
                    record.disk(disk)
                    mount_disk(disk)
                net.bring_up(emulation, folder)
                yield net
            finally:
                with undisturbed():
                    began_s = time.monotonic()
                    try:
                        net.close()
                    finally:
                        clean_up(state_file())
                    net.down_s = time.monotonic() - began_s
                    tell(f"down in {net.down_s:.1f} s")
        finally:
            lock.release()


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, with everything cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Taking down is not interrupted half way: a second Ctrl-C waits the seconds it needs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
