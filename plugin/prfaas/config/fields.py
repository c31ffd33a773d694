"""What the fields of files are, by the schemas themselves: no page of text beside them can fall behind."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

K_BOUNDS = (("minimum", ">= "), ("exclusiveMinimum", "> "), ("maximum", "<= "), ("exclusiveMaximum", "< "))


def field_lines(files: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    """The fields of these kinds of files, each schema once."""
    told: set[type[BaseModel]] = set()
    for name, root in files.items():
        yield f"== a file of the kind {name}"
        waiting = [root]
        while waiting:
            model = waiting.pop(0)
            if model not in told:
                told.add(model)
                yield from _model_lines(model)
                waiting += [one for field in model.model_fields.values() for one in _models(field.annotation)]


def _model_lines(model: type[BaseModel]) -> Iterator[str]:
    yield ""
    yield from textwrap.wrap(f"{model.__name__}: {_one_line(model.__dict__.get('__doc__'))}", 110)
    properties = model.model_json_schema(by_alias=True)["properties"]
    for name, field in model.model_fields.items():
        shown = field.alias or name
        schema = properties[shown]
        told = "needed" if field.is_required() else f"default {_default(field)}"
        yield f"  {shown}: {_type(schema)}; {told}"
        if field.description:
            yield from textwrap.wrap(
                _one_line(field.description), 108, initial_indent=" " * 6, subsequent_indent=" " * 6
            )


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The schemas within a field's type."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _models(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType, list, tuple, dict):
        for argument in get_args(annotation):
            yield from _models(argument)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    return "its fields' own" if isinstance(value, BaseModel) else _value(value)


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema or "enum" in schema:
        return " | ".join(map(str, schema.get("enum") or [schema["const"]]))
    for kind in ("anyOf", "oneOf", "allOf"):
        if kind in schema:
            return " | ".join(dict.fromkeys(_type(one) for one in schema[kind]))
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        within = [_type(schema["items"])] if "items" in schema else map(_type, schema.get("prefixItems", ()))
        return f"list of {', '.join(within)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"map of names to {_type(schema['additionalProperties'])}"
    bounds = [sign + _value(schema[name]) for name, sign in K_BOUNDS if name in schema]
    return " ".join([{"object": "map", "number": "number", "string": "text"}.get(kind, kind), *bounds])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple) and value:
        return ", ".join(map(_value, value))
    if isinstance(value, str):
        return value or '""'
    return str(value) if value else "none"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
