"""SGLang's names, imported when they are first used, and the check that it is the one that this package is
made for.

Nothing else in prfaas imports sglang: the rest of the package takes names from here (`compat.KVPoll`), so
that importing this module costs a server that doesn't use the backend nothing. Which they are is in
touch_points.py.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prfaas.model.errors import MachineError
from prfaas.sglang import touch_points as points
from prfaas.sglang.touch_points import K_BACKEND, K_VERSION, TouchPoint

if TYPE_CHECKING:
    import sglang  # noqa: F401  What is imported by name below, for the import rules to see.


class SglangMoved(MachineError):
    """SGLang isn't where this version of prfaas expects it: what was expected, and what was found."""


_NAMES = {
    point.name: point
    for point in (
        *points.K_NEAR_POINTS,
        *points.K_ENTRANCE,
        *points.K_ENTRANCE_UTILS,
        *points.K_BACKEND_POINTS,
        *points.K_PREFIX_POINTS,
        *points.K_LAYER_POINTS,
        *points.K_HTTP_POINTS,
    )
}


def __getattr__(name: str) -> Any:
    """A name of SGLang's from the tables above, imported now."""
    point = _NAMES.get(name)
    if point is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _resolve(point)


def check(held: Iterable[TouchPoint], found_version: str | None = None) -> None:
    """Hold every point against the SGLang that is installed.

    Raises SglangMoved naming the first that differs, with what was expected and what was found.
    """
    version = found_version or installed_version()
    for point in held:
        problem = _problem(point)
        if problem:
            raise SglangMoved(
                f"prfaas is made for SGLang {K_VERSION}, this is {version}: {point.path}: {problem}; "
                f"install sglang=={K_VERSION} or a prfaas made for {version}"
            )


def check_backend(with_http: bool = True) -> None:
    """All points at once, the version too; `with_http`: those of the process that serves HTTP as well, which
    needs its modules. Raises SglangMoved.
    """
    version = installed_version()
    if version != K_VERSION:
        raise SglangMoved(
            f"prfaas is made for SGLang {K_VERSION}, this is {version}; "
            f"install sglang=={K_VERSION} or a prfaas made for {version}"
        )
    http = points.K_HTTP_POINTS if with_http else ()
    ours = (points.K_ENTRANCE, points.K_ENTRANCE_UTILS, points.K_BACKEND_POINTS, points.K_LAYER_POINTS, http)
    for table in ours:
        check(table, version)


def installed_version() -> str:
    return str(getattr(importlib.import_module("sglang"), "__version__", "of unknown version"))


def has_cuda() -> bool:
    """Whether torch finds a GPU."""
    return bool(importlib.import_module("torch").cuda.is_available())


def utils_loaded() -> bool:
    """Whether SGLang itself has loaded the module that chooses a backend's classes in this process."""
    return "sglang.srt.disaggregation.utils" in sys.modules


def add_backend_member() -> Any:
    """TransferBackend.PRFAAS, added in place: SGLang imports the enum by name before plugins load."""
    enum = _resolve(_NAMES["TransferBackend"])
    if K_BACKEND in enum._value2member_map_:
        return enum(K_BACKEND)
    member = object.__new__(enum)
    name = K_BACKEND.upper()
    member._name_, member._value_, member._sort_order_ = name, K_BACKEND, len(enum._member_names_)
    member.__objclass__ = enum
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[K_BACKEND] = member
    type.__setattr__(enum, name, member)
    return member


def _resolve(point: TouchPoint) -> Any:
    try:
        module = importlib.import_module(point.module)
    except ImportError as error:
        raise SglangMoved(f"{point.path}: expected a module {point.module}, found: {error}") from error
    try:
        return getattr(module, point.name)
    except AttributeError:
        raise SglangMoved(f"{point.path}: expected there, not found") from None


def _problem(point: TouchPoint) -> str:
    """What differs at a point, or nothing."""
    try:
        thing = _resolve(point)
    except SglangMoved as moved:
        return str(moved).removeprefix(f"{point.path}: ")
    for member in point.members:
        if not hasattr(thing, member):
            return f"expected a member {member}, found none"
    known = _attributes(thing) if point.attributes else frozenset()
    for name in point.attributes:
        if name not in known:
            return f"expected an attribute {name}, found none"
    for name, n_frames in point.frames.items():
        found_frames = _frames(getattr(thing, name))
        if found_frames != n_frames:
            return f"{name}: expected a message of {n_frames} parts, found {found_frames or 'none'}"
    if point.parameters and (lack := _lacking(thing, point.parameters)):
        return lack
    for name, parameters in point.methods.items():
        method = getattr(thing, name, None)
        if not callable(method):
            return f"expected a method {name}, found {type(method).__name__}"
        if lack := _lacking(method, parameters):
            return f"{name}: {lack}"
    if point.fields:
        found = (
            {item.name for item in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
        )
        if missing := [name for name in point.fields if name not in found]:
            return f"expected fields {', '.join(missing)}, found {', '.join(sorted(found)) or 'none'}"
    if point.engine_calls:
        calls = set(re.findall(r"self\.engine\.(\w+)", inspect.getsource(thing)))
        if calls != point.engine_calls:
            return (
                f"expected it to ask its engine for {', '.join(sorted(point.engine_calls))}, "
                f"found {', '.join(sorted(calls))}"
            )
    return ""


def _lacking(function: Any, parameters: tuple[str, ...]) -> str:
    try:
        found = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return f"expected a function of ({', '.join(parameters)}), found {function!r}"
    missing = [name for name in parameters if name not in found]
    return f"expected parameters {', '.join(missing)}, found ({', '.join(found)})" if missing else ""


def _attributes(thing: type) -> frozenset[str]:
    """What is declared in a class or its bases, or set by a method of theirs."""
    names: set[str] = set()
    for one in thing.__mro__[:-1]:
        names |= set(vars(one)) | set(vars(one).get("__annotations__", ()))
        for function in filter(inspect.isfunction, vars(one).values()):
            names |= {step.argval for step in dis.get_instructions(function) if step.opname == "STORE_ATTR"}
    return frozenset(names)


def _frames(method: Any) -> int | None:
    """Of how many parts the message is that a method returns; None if it doesn't say so plainly."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    if len(returned) != 1 or not isinstance(returned[0], ast.List):
        return None
    return len(returned[0].elts)
