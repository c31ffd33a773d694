"""Kinds of files that people write, told apart by their fields."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from prfaas.config.loading import check, not_a_mapping, read_yaml
from prfaas.config.run import K_RUN_FILE, read_run
from prfaas.model.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """One kind of file: the model that checks it and the folder that holds such files."""

    name: str
    module: str
    model_name: str
    folder: str = ""
    """Name of the folder under topologies/, where they have one."""

    def model(self) -> type[BaseModel] | None:
        """None where this installation lacks it."""
        if importlib.util.find_spec(self.module) is None:
            return None
        found = getattr(importlib.import_module(self.module), self.model_name, None)
        return found if isinstance(found, type) and issubclass(found, BaseModel) else None


KINDS = (
    Kind("network", "prfaas.config.topology", "Topology", "networks"),
    Kind("experiment", "prfaas.config.experiment", "Experiment", "experiments"),
    Kind("experiment set", "prfaas.config.experiment", "ExperimentSet", "experiments"),
    Kind("case", "prfaas.config.case", "CaseConfig", "cases"),
    Kind("case of several sites", "prfaas.config.case", "SitesCaseConfig", "cases"),
    Kind("KV throughput table", "prfaas.config.case", "TableCaseConfig", "cases"),
    Kind("profile", "prfaas.config.profile", "ProfileConfig", "profiles"),
    Kind("router", "prfaas.config.router", "RouterConfig"),
    Kind("pump", "prfaas.config.pump", "PumpConfig"),
    Kind("plugin", "prfaas.config.backend", "BackendConfig"),
)


def check_file(path: Path, kind_name: str | None = None) -> str:
    """The kind that `path` is, once it has passed that kind's checks.

    Raises UsageError (no such file or kind, or nobody can tell which) and ConfigError (the first fault).
    """
    if path.name == K_RUN_FILE:
        read_run(path)
        return "run"
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise not_a_mapping(data, str(path))
    kind, model = named(kind_name) if kind_name else _guess({str(key) for key in data}, path)
    check(data, model, str(path))
    return kind.name


def known_kinds() -> dict[str, tuple[Kind, type[BaseModel]]]:
    """Kinds this installation can check, by name."""
    return {kind.name: (kind, model) for kind in KINDS if (model := kind.model()) is not None}


def named(name: str) -> tuple[Kind, type[BaseModel]]:
    known = known_kinds()
    if name not in known:
        raise UsageError(f"kind: found {name!r}; known: {', '.join(known)}")
    return known[name]


def _guess(fields: set[str], path: Path) -> tuple[Kind, type[BaseModel]]:
    """The kind whose fields fit best: most of the file's known, fewest required missing; then by folder."""

    def fit(entry: tuple[Kind, type[BaseModel]]) -> tuple[int, int, bool]:
        kind, model = entry
        names = _field_names(model)
        required = {name for name, field in model.model_fields.items() if field.is_required()}
        missing = len(required - fields)
        return len(fields & names) - len(fields - names), -missing, kind.folder == path.parent.name

    found = max(known_kinds().values(), key=fit)
    if not fields & _field_names(found[1]):
        raise UsageError(
            f"{path}: can't tell which kind of file this is; say --kind {'|'.join(known_kinds())}"
        )
    return found


def _field_names(model: type[BaseModel]) -> set[str]:
    aliases = {field.alias for field in model.model_fields.values() if field.alias}
    return set(model.model_fields) | aliases
