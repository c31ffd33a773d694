"""The goals, and the record of a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from measures import own_names
from stage import say

K_ADDED_P99_MS = 3.0
K_GROWN_MIB = 4.0


def judged(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of what was measured."""
    rows: list[tuple[str, float, bool, str]] = []
    if "rate_rps" in found:
        for name in own_names(found["ways"]):
            own, which = found["ways"][name], name.removeprefix("prfaas")
            worst = sorted(added[2] for added in own["added_ms"])
            value = round(worst[len(worst) // 2], 2)
            wanted = f"at most {K_ADDED_P99_MS:g}, median over rounds"
            rows.append((f"added-ttft-p99-ms{which}", value, value <= K_ADDED_P99_MS, wanted))
            rows.append((f"errors{which}", sum(own["errors"]), not sum(own["errors"]), "none"))
    elif "streams" in found:
        answered = found["ways"]["prfaas"]["answered"]
        rows.append(("streams-answered", answered, answered == found["streams"], f"all {found['streams']}"))
    elif "rss_mib" in found:
        grown = round(found["rss_mib"][-1] - found["rss_mib"][0], 2)
        wanted = (
            f"at most {K_GROWN_MIB:g} more after the last tenth of {found['requests']} than after the first"
        )
        rows.append(("memory-grown-mib", grown, grown <= K_GROWN_MIB, wanted))
        rows.append(("memory-errors", found["errors"], not found["errors"], "none"))
    return [
        {"name": name, "value": value, "outcome": "passed" if good else "failed", "wanted": wanted}
        for name, value, good, wanted in rows
    ]


def record(found: dict[str, Any], results: Path) -> None:
    """The run with its machine, its commit and its command, as other reference runs have them."""
    from prfaas.config.run import CheckRow, Run, stamp, write_run
    from prfaas_testbed.experiment.machine import commit, machine, versions

    parts = found.get("parts", {"": found})
    name = "door-by-deadline" if found.get("work_ms") else "door"
    checks = [CheckRow(**row) for part in parts.values() for row in judged(part)]
    run = Run(
        experiment=name,
        description="What the front door adds, stand-in servers behind it; routers on a core of their own",
        commit=commit(),
        started=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        versions=versions(),
        machine=machine(),
        emulation="native",
        checks=checks,
        files={},
    )
    update = {"command": ["scripts/bench-router", *map(without_folder, sys.argv[1:])], "measures": found}
    say(str(write_run(run.model_copy(update=update), results / name / stamp())))


def without_folder(word: str) -> str:
    """A word of the command line as anybody may read it: programs by their names."""
    name, sign, command = word.partition("=")
    if not sign:
        return Path(word).name if word.startswith("/") else word
    program, _, rest = command.partition(" ")
    return f"{name}={Path(program).name} {rest}"
