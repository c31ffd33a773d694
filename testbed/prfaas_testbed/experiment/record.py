"""The record of a run before it has rows, and several records as one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prfaas.config.experiment import Experiment, ExperimentSet
from prfaas.config.run import Repetition, Row, Run
from prfaas.config.topology import Topology
from prfaas_testbed.experiment.machine import commit, machine, versions
from prfaas_testbed.instances.sglang_server import K_CHECKOUT


def record_of(experiment: Experiment, topology: Topology) -> Run:
    """Everything about a run but its rows."""
    real = "sglang" in experiment.kinds()
    fields: dict[str, Any] = {
        "experiment": experiment.name,
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(K_CHECKOUT / ".venv-sglang" if real else None),
        "machine": machine(),
        "emulation": "native",
        "scale": topology.scale.factor if topology.scale else 1.0,
        "description": experiment.description,
        "definition": experiment.model_dump(mode="json", exclude_defaults=True),
        "topology": topology.model_dump(mode="json", exclude_defaults=True, by_alias=True),
    }
    return Run.model_validate(fields)


def join_parts(choice: ExperimentSet, records: list[tuple[str, Run]]) -> Run:
    """Parts' records as one: rows carry their part, repetition i holds every part's i-th."""
    first = records[0][1]
    whole = first.model_copy(
        update={
            "experiment": choice.name, "description": choice.description,
            "parts": [name for name, _ in records],
            "definition": {"parts": {name: record.definition for name, record in records}},
            "repetitions": [], "calibration": [], "baseline": [], "controls": [], "void": [],
        }
    )  # fmt: skip
    repetitions: dict[int, Repetition] = {}
    for name, record in records:
        for field in ("calibration", "baseline", "controls", "void"):
            rows = getattr(record, field)
            getattr(whole, field).extend(_marked(row, name) for row in rows)
        for repetition in record.repetitions:
            target = repetitions.setdefault(repetition.index, Repetition(index=repetition.index))
            target.requests += [_marked(row, name) for row in repetition.requests]
            target.links += [_marked(row, name) for row in repetition.links]
            target.events += [_marked(row, name) for row in repetition.events]
    whole.repetitions = [repetitions[i] for i in sorted(repetitions)]
    return whole


def _marked(row: Any, part: str) -> Any:
    assert isinstance(row, Row)
    return type(row).model_validate({**row.model_dump(), "part": part})
