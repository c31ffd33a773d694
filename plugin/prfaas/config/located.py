"""Paths in files: relative ones are taken from the folder of the file that they stand in, wherever its reader
was started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


class _Located:
    """Marks a field's type."""


FilePath = Annotated[Path, _Located()]
FileName = Annotated[str, _Located()]
"""The same, kept as text."""


def located(config: M, file: Path | str) -> M:
    """A copy of `config`, which came from `file`, with all its paths absolute."""
    found = _from(config, type(config), Path(file).resolve().parent)
    assert isinstance(found, type(config))
    return found


def _from(value: Any, kind: Any, folder: Path) -> Any:
    """`value` of a field whose annotation is `kind`."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        changed = {
            name: new
            for name, field in fields.items()
            if (new := _from(old := getattr(value, name), _whole(field), folder)) is not old
        }
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, tuple):
        many = tuple(_from(one, kind, folder) for one in value)
        return many if any(a is not b for a, b in zip(many, value, strict=True)) else value
    if isinstance(value, dict):
        by_name = {key: _from(one, kind, folder) for key, one in value.items()}
        return by_name if any(by_name[key] is not value[key] for key in value) else value
    if isinstance(value, str | Path) and _is_located(kind):
        return type(value)(folder / value)
    return value


def _whole(field: Any) -> Any:
    """The field's annotation with its metadata, which pydantic takes apart."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _is_located(kind: Any) -> bool:
    if get_origin(kind) is Annotated and any(isinstance(one, _Located) for one in get_args(kind)[1:]):
        return True
    return any(_is_located(one) for one in get_args(kind))
