"""YAML to checked models: one way for every file, so that every error reads alike."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError

from prfaas.model.errors import ConfigError, UsageError


class Strict(BaseModel):
    """Base of every schema: unknown fields are errors, instances don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


M = TypeVar("M", bound=BaseModel)


class _Together:
    def __repr__(self) -> str:
        return "fields that don't fit together"


_WORDS: dict[str, str] = {}


def pattern(expression: str, words: str, **kwargs: Any) -> Any:
    """A text field by a regular expression, and what an error says in its place."""
    _WORDS[expression] = words
    return Field(pattern=expression, **kwargs)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


K_MOST_BYTES = 16 << 20
K_NUL = "a NUL character"
K_YAML_KINDS: dict[type, str] = {str: "text", list: "a list", int: "a number", float: "a number"}
K_NEAR = 0.7  # of a misspelt name to the one that was meant; `rate_mbps` is 0.62 from `at_s`
_KINDS = {  # in YAML's words, by pydantic's name of the fault
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "string_type": "text",
}


class _Loader(yaml.SafeLoader):
    """A field given twice is an error: YAML's libraries let the last one win, without a word. So is a NUL in
    a text, which no file's name, host or key may have.
    """

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if "\0" in node.value:
            raise yaml.constructor.ConstructorError(None, None, K_NUL, node.start_mark)
        return node

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
        with path.open("rb") as file:
            content = file.read(K_MOST_BYTES + 1)
        if len(content) > K_MOST_BYTES:  # a device, or a file of another kind: it might have no end
            raise UsageError(f"{path}: longer than {K_MOST_BYTES >> 20} MiB; no file of this kind is")
        text = content.decode("utf-8")
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
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        if problem == K_NUL:
            raise ConfigError(str(path), where, problem, "expected text without one") from None
        if isinstance(error, yaml.constructor.ConstructorError) and "second time" in problem:
            raise ConfigError(str(path), where, problem, "expected each field once") from None
        lines = text.splitlines()
        # What is missing at the end of the file is missed on a line that isn't there.
        line = lines[min(mark.line, len(lines) - 1)] if mark and lines else ""
        raise ConfigError(str(path), where, _SHORT.repr(line.strip())[1:-1], f"no YAML: {problem}") from None
    except (ValueError, OverflowError, LookupError, AttributeError) as error:
        # Of a date that isn't one, a number without digits, a tag (!!float) before what isn't of its kind.
        raise ConfigError(str(path), "the file", str(error), "expected YAML") from None
    except RecursionError:
        raise ConfigError(str(path), "the file", "nested too deeply", "expected YAML") from None
    return data


def load(path: Path | str, model: type[M]) -> M:
    """The file as a `model`. Raises UsageError or ConfigError; never pydantic's own error."""
    return check(read_yaml(path), model, str(path))


def not_a_mapping(data: object, file: str) -> ConfigError:
    """Of a file whose YAML holds something else, or nothing."""
    found = "nothing" if data is None else K_YAML_KINDS.get(type(data), type(data).__name__)
    return ConfigError(file, "the file", found, "expected a mapping of fields")


def check(data: object, model: type[M], file: str) -> M:
    """`data` as a `model`; `file` names its origin in errors. Raises ConfigError for the first fault."""
    if not isinstance(data, dict):
        raise not_a_mapping(data, file)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise first_fault(error, file, model) from None


def first_fault(error: ValidationError, file: str, model: type[BaseModel]) -> ConfigError:
    """Pydantic's first fault in our words; a field misspelt, before that it is missing by its right name."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    if fault["type"] == "missing":
        beside = [one for one in faults if one["loc"][:-1] == fault["loc"][:-1]]
        fault = next((one for one in beside if one["type"] == "extra_forbidden"), fault)
    path, here = _follow(model, fault["loc"][:-1])
    if fault["type"] == "extra_forbidden":
        path.append(fault["loc"][-1])
    else:
        path, here = _follow(model, fault["loc"])
    field = ".".join(str(part) for part in path) or "the file"
    found: object = fault["input"]
    allowed = str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "expected", 1)
    if fault["type"] in _KINDS:
        allowed = f"expected {_KINDS[fault['type']]}"
    elif fault["type"] in ("too_short", "too_long"):
        least, most = fault["ctx"].get("min_length"), fault["ctx"].get("max_length")
        allowed = f"expected at least {least}" if least is not None else f"expected at most {most}"
    if fault["type"] == "extra_forbidden":
        known = sorted({field.alias or name for one in here for name, field in one.model_fields.items()})
        near = _nearest(str(fault["loc"][-1]), known)
        allowed = f"unknown field{near}; known here: {', '.join(known) or 'none'}"
    elif fault["type"] == "missing":
        found, allowed = None, "this field is required"
    elif fault["type"] == "string_pattern_mismatch":
        allowed = _WORDS.get(fault["ctx"]["pattern"], allowed)
    elif fault["type"] in ("float_parsing", "int_parsing"):
        allowed = "expected a number alone: the unit is in the field's name"
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


def is_path(name: str) -> bool:
    """Whether what may be a name or a path is a path."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def unknown_name(kind: str, name: str, folder: Path, known: Sequence[str]) -> UsageError:
    """Of a file that was named and isn't in `folder`: near ones, or else all that there are."""
    near = difflib.get_close_matches(name, known, 3)
    if near:
        return UsageError(f"unknown {kind} {name!r}, perhaps {' or '.join(near)}; they are in {folder}")
    return UsageError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known)) or f'none in {folder}'}")


def _nearest(name: str, known: list[str]) -> str:
    """A guess at the field that was meant, for an error: `, perhaps …`, or nothing."""
    near = [one for one in known if one.startswith(f"{name}_")] or difflib.get_close_matches(
        name, known, 1, K_NEAR
    )
    return f", perhaps {near[0]}" if near else ""


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
        elif isinstance(part, int) or (part not in tags and part != "[key]"):
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
