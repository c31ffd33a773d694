"""What the processes of a fleet cost: CPU seconds over a stretch of time, the memory they hold at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from prfaas.config.run import EventRow
from prfaas_testbed.experiment.fleet import Fleet


@dataclass(frozen=True)
class Spent:
    """One process and its descendants, so far."""

    pid: int
    role: str
    site: str
    cpu_s: float
    rss_bytes: int


def spent(fleet: Fleet) -> dict[str, Spent]:
    """By name: servers, the router, the plain server, and pumps as `pump-SITE`. Those that are gone are left
    out.
    """
    known = [(server.name, server.process.pid, server.role, server.site) for server in fleet.everything()]
    known += [(f"pump-{site}", pump.pid, "pump", site) for site, pump in fleet.pumps.items()]
    found = {}
    for name, pid, role, site in known:
        if pid is not None:
            try:
                found[name] = Spent(pid, role, site, *_of_tree(psutil.Process(pid)))
            except psutil.NoSuchProcess:
                continue
    return found


def _of_tree(root: psutil.Process) -> tuple[float, int]:
    """CPU seconds and resident bytes. Raises NoSuchProcess for the root alone."""
    cpu_s, rss_bytes = 0.0, 0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            cpu_s += times.user + times.system
            rss_bytes += process.memory_info().rss
        except psutil.NoSuchProcess:
            if process is root:
                raise
    return cpu_s, rss_bytes


def cost_rows(
    before: Mapping[str, Spent], after: Mapping[str, Spent], wall_s: float, at_s: float
) -> list[EventRow]:
    """An event `cost` a process; one that was started in between counts from its start."""
    rows = []
    for name, now in after.items():
        then = before.get(name)
        cpu_s = now.cpu_s - (then.cpu_s if then is not None and then.pid == now.pid else 0.0)
        row = {
            "at_s": at_s, "event": "cost", "name": name, "role": now.role, "site": now.site,
            "cpu_s": round(max(0.0, cpu_s), 3), "wall_s": round(wall_s, 3), "rss_bytes": now.rss_bytes,
        }  # fmt: skip
        rows.append(EventRow.model_validate(row))
    return rows
