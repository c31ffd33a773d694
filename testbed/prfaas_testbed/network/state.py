"""What a run made on this machine, written down before it is made, so that a killed run can be cleaned up
after.

One run at a time holds the machine's lock; its record lies in the checkout under .cache/testbed/. A process
is known by its id and its start time, so that an id that went to somebody else is never signalled; a site's
processes are known by its network namespace, which a name under /run/netns keeps from being reused.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prfaas.config.places import checkout
from prfaas.model.errors import MachineError
from prfaas_testbed.network.disk import give_back_disk, is_disk, kept_of

K_LOCK = Path("/run/prfaas-testbed.lock")
K_NETNS = Path("/run/netns")
K_TMP_PREFIX = "prfaas-testbed-"


def state_file() -> Path:
    return checkout() / ".cache" / "testbed" / "state.json"


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When the process started, in the kernel's ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


class Lock:
    """The machine's lock. Held while a network is up; released by the kernel if its holder dies."""

    def __init__(self, topology: str, wait_s: float = 0.0) -> None:
        """Raises MachineError naming the holder if it doesn't let go within `wait_s`."""
        self._fd = os.open(K_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
            holder = self._read()
            os.close(self._fd)
            raise MachineError(
                f"another testbed run holds this machine's network ({K_LOCK}): topology "
                f"{holder.get('topology', '?')}, process {holder.get('pid', '?')}; wait for it, or end it"
            )
        self.previous_state = self._read().get("state")
        mine = {"pid": os.getpid(), "topology": topology, "state": str(state_file())}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(mine).encode(), 0)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(os.pread(self._fd, 65536, 0) or b"{}")
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    def release(self, clean: bool = True) -> None:
        if clean:
            os.ftruncate(self._fd, 0)
        os.close(self._fd)


class Record:
    """The list of what was made. Each method writes before its thing is made, or right after it is gone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data: dict[str, Any] = {
            "boot_id": boot_id(),
            "owner": {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid())},
            "processes": [],
            "namespaces": [],
            "devices": [],
            "sysctls": {},
            "folders": [],
            "disks": [],
        }
        self._write()

    def process(self, pid: int) -> None:
        self._data["processes"].append({"pid": pid, "start_ticks": start_ticks(pid)})
        self._write()

    def namespace(self, name: str) -> None:
        self._data["namespaces"].append(name)
        self._write()

    def devices(self, names: Iterable[str]) -> None:
        """Interfaces that are in the machine's own namespace for a moment while they are made."""
        self._data["devices"].extend(names)
        self._write()

    def folder(self, path: Path) -> None:
        self._data["folders"].append(str(path))
        self._write()

    def disk(self, folder: Path) -> None:
        self._data["disks"].append(str(folder))
        self._write()

    def raise_sysctl(self, name: str, value: str) -> None:
        """Set a sysctl of the machine, remembering what it was."""
        before = read_sysctl(name)
        if before == value:
            return
        self._data["sysctls"].setdefault(name, {"before": before, "raised": value})
        self._data["sysctls"][name]["raised"] = value
        self._write()
        write_sysctl(name, value)

    def restore_sysctl(self, name: str) -> None:
        entry = self._data["sysctls"].pop(name, None)
        if entry:
            write_sysctl(name, entry["before"])
            self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps(self._data, indent=1))
        draft.replace(self._path)


def read_sysctl(name: str) -> str:
    return " ".join(Path("/proc/sys", *name.split(".")).read_text().split())


def write_sysctl(name: str, value: str) -> None:
    Path("/proc/sys", *name.split(".")).write_text(value)


def in_namespace(name: str) -> list[int]:
    """Ids of the processes in the network namespace that /run/netns/`name` keeps."""
    try:
        wanted = (K_NETNS / name).stat()
    except OSError:
        return []
    return in_namespace_of(wanted)


def in_namespace_of(wanted: os.stat_result) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                here = os.stat(f"/proc/{entry}/ns/net")
            except OSError:
                continue
            if (here.st_dev, here.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.append(int(entry))
    return found


def is_pinned(name: str) -> bool:
    """Whether the name holds a namespace, and isn't just an empty file left by a failed start."""
    try:
        return (K_NETNS / name).stat().st_dev == os.stat("/proc/self/ns/net").st_dev
    except OSError:
        return False


def empty_namespace(name: str, grace_s: float) -> int:
    """End all processes of a namespace: SIGTERM, and after `grace_s` SIGKILL. Returns how many there were."""
    if not is_pinned(name) or (K_NETNS / name).stat().st_ino == os.stat("/proc/self/ns/net").st_ino:
        return 0
    first = in_namespace(name)
    if grace_s > 0:
        for pid in first:
            signal_quietly(pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and in_namespace(name):
            time.sleep(0.05)
    for _ in range(60):  # a process may start another while we look
        left = in_namespace(name)
        if not left:
            break
        for pid in left:
            signal_quietly(pid, signal.SIGKILL)
        time.sleep(0.05)
    return len(first)


def signal_quietly(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def unpin(name: str) -> None:
    if (K_NETNS / name).exists():
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def clean_up(path: Path, grace_s: float = 1.0) -> list[str]:
    """Undo what the record at `path` lists and remove it. Returns a line for each thing that was still
    there. Raises MachineError where a disk's files have no room: disk and record stay.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except ValueError:
        path.unlink()
        return [f"{path}: not readable, removed"]
    done: list[str] = []
    if data["boot_id"] == boot_id():  # else the machine was restarted: only files are left
        for name in data["namespaces"]:
            if is_pinned(name):
                count = empty_namespace(name, grace_s)
                done.append(f"namespace {name}, with {count} processes")
            unpin(name)
        for entry in data["processes"]:
            if entry["start_ticks"] is not None and start_ticks(entry["pid"]) == entry["start_ticks"]:
                signal_quietly(entry["pid"], signal.SIGKILL)
                done.append(f"process {entry['pid']}")
        for name in data["devices"]:
            if Path("/sys/class/net", name).exists():
                subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
                done.append(f"interface {name}")
        for name, entry in data["sysctls"].items():
            if read_sysctl(name) == entry["raised"]:  # somebody else's later value stays
                write_sysctl(name, entry["before"])
                done.append(f"sysctl {name}, back to {entry['before']}")
    for folder in map(Path, data.get("disks", ())):
        if is_disk(folder) or kept_of(folder).exists():
            give_back_disk(folder)
            done.append(f"disk {folder}")
    for folder in data["folders"]:
        if Path(folder).name.startswith(K_TMP_PREFIX) and Path(folder).exists():
            shutil.rmtree(folder, ignore_errors=True)
            done.append(f"folder {folder}")
    path.unlink(missing_ok=True)
    return done
