"""The record of a run before it has rows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prfaas.config.experiment import Experiment
from prfaas.config.run import Run
from prfaas.config.topology import Topology
from prfaas_testbed.experiment.inputs import inputs_of
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
        "topology": dump_of(topology),
        "inputs": inputs_of(experiment),
    }
    return Run.model_validate(fields)


def dump_of(topology: Topology) -> dict[str, Any]:
    """A topology as a record holds it."""
    return topology.model_dump(mode="json", exclude_defaults=True, by_alias=True)
