"""YAML to checked models: one way for every file, so that every error reads alike."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from prfaas.model.errors import ConfigError, UsageError


class Strict(BaseModel):
    """Base of every schema: unknown fields are errors, instances don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=BaseModel)


def read_yaml(path: Path | str) -> object:
    """The file's YAML as plain objects. Raises UsageError (no such file) or ConfigError (not YAML)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read: {error}") from None
    try:
        data: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(str(path), where, problem, "expected YAML") from None
    return data


def load(path: Path | str, model: type[M]) -> M:
    """The file as a `model`. Raises UsageError or ConfigError; never pydantic's own error."""
    return check(read_yaml(path), model, str(path))


def check(data: object, model: type[M], file: str) -> M:
    """`data` as a `model`; `file` names its origin in errors. Raises ConfigError for the first fault."""
    if not isinstance(data, dict):
        raise ConfigError(file, "the file", type(data).__name__, "expected a mapping of fields")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise first_fault(error, file, model) from None


def first_fault(error: ValidationError, file: str, model: type[BaseModel]) -> ConfigError:
    """Pydantic's first fault in our words."""
    fault = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in fault["loc"]) or "the file"
    found: object = fault["input"]
    allowed = str(fault["msg"])
    if fault["type"] == "extra_forbidden":
        known = ", ".join(sorted(_fields_at(model, fault["loc"][:-1]))) or "none"
        allowed = f"unknown field; known here: {known}"
    elif fault["type"] == "missing":
        found, allowed = None, "this field is required"
    elif isinstance(found, (dict, list)) and len(repr(found)) > 80:
        found = repr(found)[:77] + "..."
    return ConfigError(file, field, found, allowed)


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """Names of the fields of the model that `path` leads to; empty when it can't be told."""
    here: object = model
    for part in path:
        if isinstance(part, int):
            continue
        fields = getattr(here, "model_fields", {})
        if part not in fields:
            return set()
        here = _inner_model(fields[part].annotation)
    return set(getattr(here, "model_fields", {}))


def _inner_model(annotation: object) -> object:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _inner_model(inner)
        if found is not None:
            return found
    return None
