"""A set of experiments in one record, part by part; an interrupted one goes on where it was.

After every part the whole record is written again, so what a run has at any moment can be resumed:

    missing                     run
    stopped by the machine      run again   (too busy, a port taken, a calibration missed)
    stopped by the testbed      run again   (a fault of its own)
    made by another definition  run again   (the file, or one that it names, was edited since; not where only
                                             the time changed that a part may take, which it ended in)
    ended, or the system's fault stopped it   kept, whatever it says: nothing is run until it passes

Each part keeps its own start, commit, machine and load under `part_runs`, with the attempts before it.
"""

from __future__ import annotations

import fnmatch
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prfaas.config.experiment import Experiment, ExperimentSet
from prfaas.config.run import Repetition, Row, Run, read_run, write_run
from prfaas.config.topology import load_topology
from prfaas.model.errors import EXIT_MACHINE, MachineError, PrfaasError, UsageError
from prfaas_testbed.experiment.before import check_before
from prfaas_testbed.experiment.checks import judge
from prfaas_testbed.experiment.inputs import inputs_of
from prfaas_testbed.experiment.place import DiskFull, Place
from prfaas_testbed.experiment.record import dump_of, record_of
from prfaas_testbed.experiment.runner import CalibrationMissed, Progress, Results, Runner
from prfaas_testbed.experiment.table import check_lines
from prfaas_testbed.experiment.view import field

K_OWN = ("started", "commit", "versions", "machine", "emulation", "scale")
"""What each part of a set says for itself."""
K_OWN_EXTRA = ("topology", "inputs", "network_s")
K_ROWS = ("calibration", "baseline", "controls", "void")

Conduct = Callable[[str, Experiment, Results], None]
"""Runs one part and fills its results; raises PrfaasError when it can't."""


def by_machine(error: PrfaasError) -> bool:
    """Whether it was the machine that failed, and not the system under test."""
    return isinstance(error, MachineError | CalibrationMissed)


class SetRun:
    """One set's record as it grows."""

    def __init__(
        self, choice: ExperimentSet, parts: Sequence[tuple[str, Experiment]], folder: Path, tell: Progress,
        again: Sequence[str] = (), keep: Callable[[Run], object] | None = None,
    ) -> None:  # fmt: skip
        """`again`: globs of parts that run although they are in the record, which says so. `keep` writes the
        record, into `folder` where absent."""
        self._parts, self._folder, self._tell = dict(parts), folder, tell
        self._choice, self._again = choice, tuple(again)
        self._keep = keep or (lambda run: write_run(run, folder))
        self.record: Run | None = None
        self.stopped_now: list[str] = []
        """Parts that this machine stopped since this object was made, whatever the record holds of them."""

    def resume(self) -> None:
        """Take what the folder holds. Raises UsageError where that isn't a run of this set."""
        record = read_run(self._folder)
        if record.experiment != self._choice.name or "part_runs" not in (record.model_extra or {}):
            raise UsageError(
                f"--resume {self._folder}: holds a run of {record.experiment}, and not one of the set "
                f"{self._choice.name} that can go on"
            )
        self.record = record

    @property
    def part_runs(self) -> dict[str, dict[str, Any]]:
        return {} if self.record is None else (self.record.model_extra or {})["part_runs"]

    def why_run(self, name: str) -> str | None:
        """Why this part has to be run; None where what is recorded stands."""
        done = self.part_runs.get(name)
        if done is None:
            return "not run yet"
        if any(fnmatch.fnmatchcase(name, glob) for glob in self._again):
            return "asked for again"
        assert self.record is not None
        was, now = self.record.definition["parts"][name], _definition(self._parts[name])
        # What ended in its time would with more of it too; what was stopped might have been by that.
        if was != now and (done.get("stopped") or _but_its_time(was) != _but_its_time(now)):
            return "its definition has changed"
        changed = self._changed_inputs(name, done)
        if changed:
            return f"what it reads has changed: {', '.join(changed)}"
        if done.get("stopped") and done.get("stopped_by") in ("machine", "testbed"):
            return f"stopped by the {done['stopped_by']}: {done['stopped']}"
        return None

    def _changed_inputs(self, name: str, done: dict[str, Any]) -> list[str]:
        """Files that the part reads and that were others when it ran."""
        experiment = self._parts[name]
        if "inputs" in done:
            now = inputs_of(experiment)
            return sorted(
                file for file in {*now, *done["inputs"]} if now.get(file) != done["inputs"].get(file)
            )
        # Of a record that doesn't say: what it holds of the network at least.
        same = done.get("topology") in (None, dump_of(load_topology(experiment.network)))
        return [] if same else [experiment.network]

    def go(self, conduct: Conduct, budget_s: float = float("inf")) -> Run:
        """Run what is to be run, beginning no part when `budget_s` are over; the record so far."""
        began_s = time.monotonic()
        waiting = [(name, why) for name in self._parts if (why := self.why_run(name)) is not None]
        for i, (name, why) in enumerate(waiting):
            if time.monotonic() - began_s > budget_s:
                self._tell(f"{len(waiting) - i} parts are left for another time")
                break
            self._tell(f"part {i + 1} of {len(waiting)}: {name} ({why})")
            self._one(name, conduct)
        if self.record is None:
            raise UsageError(f"{self._choice.name}: nothing was run")
        return self.record

    def _one(self, name: str, conduct: Conduct) -> None:
        experiment, results = self._parts[name], Results()
        record = record_of(experiment, check_before(experiment, f"part {name}"))
        began_s = time.monotonic()
        own: dict[str, Any] = {}
        full: DiskFull | None = None
        try:
            conduct(name, experiment, results)
        except PrfaasError as error:
            # The other parts can still be had; this one counts as failed.
            self._tell(f"part {name} was stopped: {error}")
            own = {
                "stopped": str(error),
                "stopped_by": "machine" if by_machine(error) else "system",
                "status": error.exit_status,
            }
            full = error if isinstance(error, DiskFull) else None
            if error.exit_status == EXIT_MACHINE:
                self.stopped_now.append(name)
        except Exception as error:
            # A fault of the testbed's own: what was measured before it is kept, and the part runs again.
            self._tell(f"part {name} was stopped:\n{traceback.format_exc()}")
            own = {"stopped": f"{type(error).__name__}: {error}", "stopped_by": "testbed"}
        results.into(record)
        own = {
            **record.model_dump(mode="json", include=set(K_OWN)),
            **{key: value for key, value in (record.model_extra or {}).items() if key in K_OWN_EXTRA},
            "wall_s": round(time.monotonic() - began_s, 1),
            **own,
        }
        before = self.part_runs.get(name)
        if (
            before is not None
            and own.get("stopped_by") == "machine"
            and not any(one.requests for one in record.repetitions)
        ):
            # It gave nothing: what there was stays, whatever that is worth.
            brief = {key: own[key] for key in ("started", "commit", "stopped") if key in own}
            before["attempts_before"] = [*before.get("attempts_before", []), brief]
            assert self.record is not None
            self._write(full)
            return
        if before is not None:
            brief = {key: before[key] for key in ("started", "commit", "stopped") if key in before}
            own["attempts_before"] = [*before.get("attempts_before", []), brief]
        self.record = with_part(self.record, self._choice, list(self._parts), name, record, own)
        self.record.checks = judge(self.record)
        self._write(full)
        for line in check_lines([row for row in self.record.checks if row.name.startswith(f"{name}/")]):
            self._tell(line)

    def _write(self, full: DiskFull | None) -> None:
        """Raises DiskFull, `full` itself where it was so before: no other part could be run."""
        assert self.record is not None
        self._keep(self.record)
        if full is not None:
            raise full


def real_conduct(place: Place, tell: Progress, wait_s: float) -> Conduct:
    """Each part on an emulated network of its own."""

    def conduct(name: str, experiment: Experiment, results: Results) -> None:
        topology = check_before(experiment, f"part {name}")
        with place.watched():
            Runner(experiment, topology, place.folder / name, results, tell, wait_s).run()

    return conduct


def with_part(
    whole: Run | None,
    choice: ExperimentSet,
    order: Sequence[str],
    name: str,
    record: Run,
    own: dict[str, Any],
) -> Run:
    """The record with the rows of one part in place of those it had; rows carry their part, and repetition i
    holds every part's i-th."""
    if whole is None:
        whole = record.model_copy(
            update={
                "experiment": choice.name, "description": choice.description, "parts": [],
                "definition": {"parts": {}}, "repetitions": [], **{rows: [] for rows in K_ROWS},
            }
        )  # fmt: skip
        whole.__pydantic_extra__ = {"part_runs": {}, "stopped_parts": {}, "parts_planned": list(order)}
    extra: dict[str, Any] = whole.model_extra or {}
    planned = joined_order(extra["parts_planned"], order)
    extra["parts_planned"] = planned
    extra["part_runs"][name] = own
    extra["stopped_parts"].pop(name, None)
    if "stopped" in own:
        extra["stopped_parts"][name] = own["stopped"]
    whole.definition["parts"][name] = record.definition
    # The file's order, whatever was run when.
    whole.parts = [part for part in planned if part in extra["part_runs"]]
    whole.definition["parts"] = {part: whole.definition["parts"][part] for part in whole.parts}
    for kind in K_ROWS:
        kept = [row for row in getattr(whole, kind) if field(row, "part") != name]
        setattr(whole, kind, kept + [_marked(row, name) for row in getattr(record, kind)])
    indices = {r.index: r for r in whole.repetitions}
    for repetition in record.repetitions:
        indices.setdefault(repetition.index, Repetition(index=repetition.index))
    fresh = {repetition.index: repetition for repetition in record.repetitions}
    for index, target in indices.items():
        for kind in ("requests", "links", "events"):
            kept = [row for row in getattr(target, kind) if field(row, "part") != name]
            new = getattr(fresh[index], kind) if index in fresh else []
            setattr(target, kind, kept + [_marked(row, name) for row in new])
    whole.repetitions = [indices[i] for i in sorted(indices)]
    runs = extra["part_runs"].values()
    # The record begins with its first part; of many commits it says that there are many.
    whole.started = min(run["started"] for run in runs)
    commits = sorted({run["commit"] for run in runs})
    short = dict.fromkeys(commit[:12] for commit in commits)
    whole.commit = commits[0] if len(commits) == 1 else ",".join(short)
    whole.scale = max(run["scale"] for run in runs)
    emulations = {run["emulation"] for run in runs}
    whole.emulation = "appliance" if "appliance" in emulations else next(iter(emulations))
    extra["wall_s"] = round(sum(run["wall_s"] for run in runs), 1)
    return whole


def joined_order(known: Sequence[str], order: Sequence[str]) -> list[str]:
    """`order`, the file's of all or some parts, with those already known: these keep their places among
    themselves, unless the file tells the place of each."""
    if set(known) <= set(order):
        return list(order)
    found, place = list(known), 0
    for name in order:
        if name not in found:
            found.insert(place, name)
        place = found.index(name) + 1
    return found


def _definition(experiment: Experiment) -> dict[str, Any]:
    return experiment.model_dump(mode="json", exclude_defaults=True)


def _but_its_time(definition: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in definition.items() if key != "wall_time_s"}


def _marked(row: Any, part: str) -> Any:
    assert isinstance(row, Row)
    return type(row).model_validate({**row.model_dump(), "part": part})
