"""YAML to checked models: one way for every file, so that every error reads alike."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Tag, ValidationError

from prfaas.model.errors import ConfigError, UsageError


class Strict(BaseModel):
    """Base of every schema: unknown fields are errors, instances don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=BaseModel)


class _Together:
    def __repr__(self) -> str:
        return "fields that don't fit together"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


class _Loader(yaml.SafeLoader):
    """A field given twice is an error: YAML's libraries let the last one win, without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                problem = f"{key.value!r} a second time"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if name is not None:
                seen.add(name)
        return node


def read_yaml(path: Path | str) -> object:
    """The file's YAML as plain objects. Raises UsageError (no such file) or ConfigError (not YAML)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, ValueError) as error:  # the latter: a name with a NUL
        raise UsageError(f"{path}: can't be read: {error}") from None
    try:
        data: object = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
        problem = getattr(error, "problem", None) or "not YAML"
        twice = isinstance(error, yaml.constructor.ConstructorError) and "second time" in problem
        raise ConfigError(
            str(path), where, problem, "expected each field once" if twice else "expected YAML"
        ) from None
    except (ValueError, OverflowError) as error:  # of a date that isn't one, or a number without digits
        raise ConfigError(str(path), "the file", str(error), "expected YAML") from None
    except RecursionError:
        raise ConfigError(str(path), "the file", "nested too deeply", "expected YAML") from None
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
    path, here = _follow(model, fault["loc"][:-1])
    if fault["type"] == "extra_forbidden":
        path.append(fault["loc"][-1])
    else:
        path, here = _follow(model, fault["loc"])
    field = ".".join(str(part) for part in path) or "the file"
    found: object = fault["input"]
    allowed = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = ", ".join(sorted({name for one in here for name in one.model_fields})) or "none"
        allowed = f"unknown field; known here: {known}"
    elif fault["type"] == "missing":
        found, allowed = None, "this field is required"
    elif fault["type"] == "union_tag_invalid":
        tag = str(fault["ctx"]["discriminator"]).strip("'")
        field, found = f"{field}.{tag}", fault["ctx"]["tag"]
        allowed = f"expected {fault['ctx']['expected_tags']}"
    elif fault["type"] == "union_tag_not_found":
        field, found = f"{field}.{str(fault['ctx']['discriminator']).strip(chr(39))}", None
        allowed = "this field is required"
    elif not path and fault["type"] == "value_error":
        found = _Together()  # fields that are each sound: the file's beginning would say nothing
    elif isinstance(found, (dict, list)) and len(_SHORT.repr(found)) > 80:
        # Aliases make an object of any size out of a few lines: it isn't written out whole.
        found = _SHORT.repr(found)[:77] + "..."
    elif isinstance(found, str):
        found = found if len(found) <= 200 else found[:197] + "..."
    return ConfigError(file, field, found, allowed)


def _follow(
    model: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[list[int | str], list[type[BaseModel]]]:
    """The path that a person sees in the file, without pydantic's tags of unions; and the models there."""
    path: list[int | str] = []
    here, tags = [model], set[str]()
    for part in loc:
        fields = [
            one.model_fields[part] for one in here if isinstance(part, str) and part in one.model_fields
        ]
        if fields:
            path.append(part)
            here = [inner for field in fields for inner in _models_in(field.annotation)]
            tags = {tag for field in fields for tag in _tags_in(field.annotation)}
        elif isinstance(part, str) and (tagged := [one for one in here if part in _names_of(one)]):
            here = tagged
        elif isinstance(part, int) or part not in tags:
            path.append(part)
    return path, here


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The models that a field's annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _models_in(inner)]


def _tags_in(annotation: object) -> set[str]:
    """Tags, and names of plain types, by which pydantic's errors tell a union's branches apart."""
    found = {part.tag for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Tag)}
    if isinstance(annotation, type):
        found.add(annotation.__name__)
    for inner in getattr(annotation, "__args__", ()):
        found |= _tags_in(inner)
    return found


def _names_of(model: type[BaseModel]) -> set[object]:
    """What a union's error may call this branch: its class, or a value of one of its Literal fields."""
    names: set[object] = {model.__name__}
    for field in model.model_fields.values():
        if get_origin(field.annotation) is Literal:
            names.update(get_args(field.annotation))
    return names
