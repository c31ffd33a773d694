"""The files that an experiment reads besides its own, and what was in them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from prfaas.config.experiment import Experiment
from prfaas.config.profile import profile_file
from prfaas.config.topology import topology_file
from prfaas.config.workload import TraceCommon, trace_file
from prfaas_testbed.experiment.machine import K_TOPOLOGIES

K_DIGITS = 16


def files_of(experiment: Experiment) -> list[Path]:
    """Network, profiles and trace, each once. Raises UsageError for a name that isn't known."""
    found = [topology_file(experiment.network)]
    named = [model.profile for model in experiment.models] + [i.profile for i in experiment.instances]
    found += [profile_file(name, K_TOPOLOGIES) for name in named if name is not None]
    if isinstance(experiment.workload, TraceCommon):
        found.append(trace_file(experiment.workload.file, K_TOPOLOGIES))
    return list(dict.fromkeys(path.resolve() for path in found))


def inputs_of(experiment: Experiment) -> dict[str, str]:
    """File to a digest of its content; files of the checkout by their place under topologies/."""
    return {
        _name(path): hashlib.sha256(path.read_bytes()).hexdigest()[:K_DIGITS] for path in files_of(experiment)
    }


def _name(path: Path) -> str:
    return path.relative_to(K_TOPOLOGIES).as_posix() if path.is_relative_to(K_TOPOLOGIES) else path.name


def seen_profile(name: str | None, folder: Path) -> str | None:
    """A profile's name, or, where it is a path, that of a copy in `folder`: a site sees no other's /tmp."""
    if name is None or ("/" not in name and Path(name).suffix not in (".yaml", ".yml")):
        return name
    digest = hashlib.sha256(str(Path(name).resolve()).encode()).hexdigest()[:8]
    copy = folder / "profiles" / f"{digest}-{Path(name).name}"
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(name, copy)
    return str(copy)
