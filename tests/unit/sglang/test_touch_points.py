"""The tables of touch points name all that the backend's modules read of SGLang's things: what isn't in them
is found out by a request, not at launch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from prfaas.sglang import touch_points

K_FOLDER = Path(touch_points.__file__).parent
K_POINTS = [
    point
    for name, table in vars(touch_points).items()
    if name.startswith("K_") and isinstance(table, tuple)
    for point in table
]
K_THEIRS: dict[str, tuple[str, ...]] = {
    "args": ("KVArgs",),
    "kv_args": ("KVArgs",),
    "self._args": ("KVArgs",),
    "self.kv_args": ("KVArgs",),
    "self.server_args": ("ServerArgs",),
    "manager.server_args": ("ServerArgs",),
    "chunk": ("TransferKVChunk",),
    "item": ("TransferKVChunk",),
    "peer": ("TransferInfo", "KVArgsRegisterInfo"),
    "request": ("TransferInfo",),
    "batch": ("ScheduleBatch",),
    "req": ("Req",),
    "req.kv": ("ReqKvInfo",),
    "req.finished_reason": ("FINISH_ABORT",),
    "sender": ("MooncakeKVSender",),
    "scheduler": ("Scheduler",),
    "scheduler.req_to_token_pool": ("ReqToTokenPool",),
    "scheduler.token_to_kv_pool_allocator": ("BaseTokenToKVPoolAllocator",),
    "pool": ("MHATokenToKVPool", "MLATokenToKVPool"),
    "layer": ("RadixAttention",),
    "kv_receiver": ("MooncakeKVReceiver",),
    "compat.KVPoll": ("KVPoll",),
    "poll": ("KVPoll",),
    "compat.DisaggregationMode": ("DisaggregationMode",),
    "compat.HookType": ("HookType",),
    "compat.HookRegistry": ("HookRegistry",),
    "kinds": ("KVClassType",),
}
"""What the backend's modules call things of SGLang's, and which points tell of them."""
K_OF_OURS = ("self", "super()", "manager", "ours", "self.kv_mgr", "mgr", "self.manager")
"""Of our classes on SGLang's: what isn't made here is theirs."""
K_THEIR_CLASSES = ("CommonKVManager", "MooncakeKVManager", "MooncakeKVSender", "MooncakeKVReceiver")
K_ON_THEIRS = ("backend", "decode_side", "prefill_side", "layer_side", "layout", "near")
"""Modules whose classes stand on SGLang's, or work for one that does."""


def told(*names: str) -> set[str]:
    """All that the tables say of these."""
    found: set[str] = set()
    for point in K_POINTS:
        if point.name in names:
            found |= {*point.members, *point.attributes, *point.fields, *point.methods}
    return found


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(set(K_FOLDER.glob("*.py")) - {K_FOLDER / "compat.py"}):
        yield path.stem, ast.parse(path.read_text())


def made_here() -> set[str]:
    """Names of our own classes' methods and attributes."""
    names: set[str] = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
    return names


def reads(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """(thing, attribute, line) of all that a module reads, also by `getattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            thing, name = node.args[:2]
            if isinstance(name, ast.Constant):
                yield ast.unparse(thing), str(name.value), node.lineno


def test_what_is_read_of_sglangs_things_is_in_the_tables() -> None:
    own = made_here()
    lacking = []
    for module, tree in trees():
        for thing, name, line in reads(tree):
            if thing == "item" and name in own:
                continue  # a worker's queue has both, theirs and ours
            known = {name}
            if thing in K_THEIRS:
                known = told(*K_THEIRS[thing])
            elif thing in K_OF_OURS and module in K_ON_THEIRS:
                known = own | told(*K_THEIR_CLASSES)
            if name not in known:
                lacking.append(f"{module}:{line}: {thing}.{name}")
    assert lacking == []


def test_what_replaces_a_method_of_sglangs_is_in_the_tables() -> None:
    """A method that calls `super()` for the one it replaces; layer_side's stand on prefill_side's."""
    known = told(*K_THEIR_CLASSES) | {"_hand_over", "_sent"}
    lacking = [
        f"{module}:{line}: {name}"
        for module, tree in trees()
        if module in ("backend", "decode_side", "prefill_side", "layer_side")
        for thing, name, line in reads(tree)
        if thing == "super()" and not name.startswith("__") and name not in known
    ]
    assert lacking == []


@pytest.mark.parametrize(
    "target",
    [
        value
        for value in vars(touch_points).values()
        if isinstance(value, str) and value.startswith("sglang.")
    ],
)
def test_what_is_hooked_is_in_the_tables(target: str) -> None:
    functions = {point.path for point in K_POINTS}
    methods = {f"{point.path}.{name}" for point in K_POINTS for name in point.methods}
    modules = {point.module for point in K_POINTS}
    assert target in functions | methods | modules
