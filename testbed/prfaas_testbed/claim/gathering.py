"""Runs of the testbed as a piece takes them: each part with the definition that it was run by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prfaas.config.experiment import Experiment
from prfaas.config.loading import check
from prfaas.config.run import Run, read_run
from prfaas.config.workload import Synthetic
from prfaas.model.errors import UsageError
from prfaas_testbed.claim.runs import parts
from prfaas_testbed.experiment.view import View

K_BELIEVED_SINCE = "2026-11-24T18:15:53"
"""UTC. In runs before, the router refused what profiled instances said of their load (8d4397dd9b70)."""
K_BRIEF = ("commit", "started", "machine", "wall_s")


@dataclass(frozen=True)
class Gathered:
    """One part of one run ("" where the run is of a single experiment)."""

    part: str
    run: Run
    experiment: Experiment
    """As the run's own record has it: a file that was edited since says nothing of it."""
    brief: dict[str, Any]
    """When it ran, of which commit, on what, and for how long."""

    @property
    def view(self) -> View:
        return View(self.run, self.part or None)


def by_hand(piece: str, experiment: str) -> UsageError:
    """What `measure` raises for a piece that is made of runs."""
    return UsageError(
        f"{piece}: `prfaas-testbed run {experiment}` measures it (a set in pieces: --for S, --resume DIR), "
        f"`prfaas-testbed claim add {piece} DIR` makes its record"
    )


def gathered(folders: Sequence[Path], experiment: str) -> list[Gathered]:
    """Every part that has requests, in the folders' order. Raises UsageError for a run of another experiment
    and for one without its definition.
    """
    found: list[Gathered] = []
    for folder in folders:
        run = read_run(folder)
        if run.experiment != experiment:
            raise UsageError(f"a run of {run.experiment}; this piece is made of {experiment}")
        if not run.definition:
            raise UsageError(f"{folder}: its record doesn't say by which definition it was run")
        extra = run.model_extra or {}
        definitions = run.definition.get("parts", {"": run.definition})
        for part, definition in definitions.items():
            if not View(run, part or None).requests():
                continue
            own = extra.get("part_runs", {}).get(part) or {**extra, **run.model_dump(include=set(K_BRIEF))}
            brief = {"part": part, **{name: own[name] for name in K_BRIEF if name in own}}
            where = f"{folder}: the definition{f' of part {part}' if part else ''}"
            found.append(Gathered(part, run, check(_told(definition), Experiment, where), brief))
    if not found:
        raise UsageError(f"{', '.join(map(str, folders))}: no request of any part was played")
    return found


def _told(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A record leaves out what is a field's default, and so the kind of a workload of its own."""
    workload = definition.get("workload")
    if not isinstance(workload, Mapping) or "kind" in workload:
        return dict(definition)
    kind = "synthetic" if set(workload) <= set(Synthetic.model_fields) else "sessions"
    return {**definition, "workload": {"kind": kind, **workload}}


def last_of_each(found: Iterable[Gathered]) -> dict[str, Gathered]:
    """What was added later stands in place of what there was of a part."""
    return {one.part: one for one in found}


def not_run(experiment: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """A paragraph on the parts of the experiment's file that no run has; empty where there is none."""
    known = {run["part"] for run in runs}
    missing = [part for part, _ in parts(experiment) if part not in known]
    return f"**Not run yet**: {', '.join(missing)}.\n\n" if missing else ""


def unbelieved(runs: Sequence[Mapping[str, Any]]) -> str:
    """A paragraph on the parts in which the router refused the instances' loads; empty where it didn't."""
    older = [run["part"] for run in runs if run["started"] < K_BELIEVED_SINCE]
    if not older:
        return ""
    others = "" if len(older) == len(runs) else " In the other parts it believes them."
    return (
        "Of code in which the router refused what profiled instances report of their load, and went by what "
        f"it had sent them itself: {', '.join(older)}.{others}\n\n"
    )
