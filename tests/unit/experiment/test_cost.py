"""What a fleet's processes cost: from the kernel's own figures, by name."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

from prfaas_testbed.experiment.cost import Spent, cost_rows, spent
from prfaas_testbed.experiment.fleet import Fleet

K_NO_PID = (1 << 22) + 1  # above the kernel's largest


def fleet(**pids: int | None) -> Fleet:
    servers = [
        SimpleNamespace(name=name, site="west", role="decode", process=SimpleNamespace(pid=pid))
        for name, pid in pids.items()
    ]
    pumps = {"east": SimpleNamespace(pid=os.getpid())}
    return cast(Fleet, cast(Any, SimpleNamespace(everything=lambda: servers, pumps=pumps)))


def test_running_processes_are_found_by_name_and_others_left_out() -> None:
    found = spent(fleet(decode=os.getpid(), gone=K_NO_PID, never=None))
    assert sorted(found) == ["decode", "pump-east"]
    assert found["decode"].cpu_s > 0
    assert found["decode"].rss_bytes > 1 << 20
    assert (found["pump-east"].role, found["pump-east"].site) == ("pump", "east")


def test_only_what_was_spent_in_between_counts() -> None:
    before = {"a": Spent(1, "decode", "west", 2.0, 100), "b": Spent(2, "pump", "west", 5.0, 100)}
    after = {"a": Spent(1, "decode", "west", 2.5, 200), "b": Spent(3, "pump", "west", 0.25, 300)}
    rows = [row.model_dump() for row in cost_rows(before, after, 10.0, 11.0)]
    assert [(row["name"], row["cpu_s"], row["wall_s"], row["rss_bytes"]) for row in rows] == [
        ("a", 0.5, 10.0, 200),
        ("b", 0.25, 10.0, 300),  # started anew: from its start
    ]
    assert {row["event"] for row in rows} == {"cost"}
