"""The check of touch points, against a small SGLang of our own making, right and doctored."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from prfaas.config.backend import BackendConfig
from prfaas.sglang import command_line, compat, plugin, touch_points
from prfaas.sglang.compat import SglangMoved, TouchPoint

K_MODULE = """
from dataclasses import dataclass

class Manager:
    limit = 3
    rooms: dict
    def __init__(self): self.port, self.socket = 1, 2
    def send(self, session, blocks): return self.engine.transfer(session, blocks)
    def probe(self): return self.engine.send_probe()
    def message(self, room):
        told = [room]
        return [str(told), b"host", b"port"]

@dataclass
class Chunk:
    room: int
    pages: list

def choose(backend, kind): ...
"""

K_POINTS = (
    TouchPoint(
        "little_sglang",
        "Manager",
        members=("limit",),
        attributes=("rooms", "port", "limit"),
        methods={"send": ("session", "blocks")},
        frames={"message": 3},
        engine_calls=frozenset({"transfer", "send_probe"}),
    ),
    TouchPoint("little_sglang", "Chunk", fields=("room", "pages")),
    TouchPoint("little_sglang", "choose", parameters=("backend", "kind")),
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "little_sglang.py"
    sys.modules.pop("little_sglang", None)


def load(path: Path, text: str) -> None:
    path.write_text(text)
    sys.modules.pop("little_sglang", None)
    importlib.invalidate_caches()


def test_the_sglang_it_is_made_for_passes(sources: Path) -> None:
    load(sources, K_MODULE)
    compat.check(K_POINTS, "1.0")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("limit = 3", "pass", "Manager: expected a member limit, found none"),
        ("def send(self, session, blocks)", "def push(self, session, blocks)", "expected a method send"),
        ("send(self, session, blocks):", "send(self, blocks):", "send: expected parameters session"),
        ("rooms: dict", "pass", "Manager: expected an attribute rooms, found none"),
        ("self.port, self", "self.address, self", "Manager: expected an attribute port, found none"),
        ('b"host", b"port"', 'b"host"', "message: expected a message of 3 parts, found 2"),
        ('[str(told), b"host", b"port"]', "told", "message: expected a message of 3 parts, found none"),
        ("engine.send_probe()", "engine.ping()", "expected it to ask its engine for send_probe, transfer"),
        ("pages: list", "tokens: list", "expected fields pages, found room, tokens"),
        ("def choose(backend, kind)", "def choose(backend)", "expected parameters kind, found (backend)"),
        ("def choose", "def pick", "choose: expected there, not found"),
    ],
)  # fmt: skip
def test_one_that_moved_is_named_with_what_was_expected_and_found(
    sources: Path, old: str, new: str, says: str
) -> None:
    assert old in K_MODULE
    load(sources, K_MODULE.replace(old, new, 1))
    with pytest.raises(SglangMoved) as caught:
        compat.check(K_POINTS, "9.9")
    assert says in str(caught.value)
    assert f"made for SGLang {touch_points.K_VERSION}, this is 9.9" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_gone_is_named(sources: Path) -> None:
    with pytest.raises(SglangMoved, match="expected a module little_sglang, found"):
        compat.check(K_POINTS, "9.9")


def test_names_outside_of_the_tables_are_no_names_of_ours() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Tokenizer'"):
        compat.Tokenizer  # noqa: B018


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (["x", "--disaggregation-transfer-backend", "prfaas"], True),
        (["x", "--disaggregation-transfer-backend=prfaas", "--tp", "2"], True),
        (["x", "--disaggregation-transfer-backend", "mooncake"], False),
        (["x", "--model-path", "prfaas"], False),
        (["x"], False),
    ],
)
def test_the_command_line_says_whether_the_backend_is_asked_for(argv: list[str], asked: bool) -> None:
    assert plugin.backend_asked_for(argv) is asked


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ([], "prefill"),
        (["--disaggregation-mode", "decode"], "decode"),
        (["--disaggregation-mode=decode"], "decode"),
        (["--config", "another.yaml"], None),
    ],
)
def test_sglangs_own_file_says_as_much_as_its_command_line_which_counts_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], mode: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (
        "disaggregation-mode: prefill",
        "enable_pd_role_switch: true",
        "disaggregation-transfer-backend: prfaas",
    )
    Path("server.yaml").write_text("\n".join(lines))
    argv = ["x", *(words if "--config" in words else ["--config", "server.yaml", *words])]
    assert command_line.value_of(argv, "--disaggregation-mode") == mode
    assert command_line.says(argv, "--enable-pd-role-switch") is (mode is not None)
    assert plugin.backend_asked_for(argv) is (mode is not None)


@pytest.mark.parametrize("text", ["[1, 2", "- a list", ""])
def test_a_file_that_sglang_cannot_take_says_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(text)
    assert not plugin.backend_asked_for(["x", "--config", str(path)])


def test_a_scheduler_without_a_command_line_gets_the_hooks_that_its_file_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of an engine that is made in Python."""
    hooked: list[str] = []
    registry = SimpleNamespace(
        register=lambda target, hook, kind: hooked.append(target),
        apply_hooks=lambda: hooked.append("applied"),
    )
    monkeypatch.setitem(vars(compat), "HookRegistry", registry)
    kinds = SimpleNamespace(AROUND=1, AFTER=2, BEFORE=3)
    monkeypatch.setitem(vars(compat), "HookType", kinds)
    monkeypatch.setattr(compat, "check_backend", lambda with_http: hooked.append("checked"))
    monkeypatch.setattr(plugin, "_registered", set())
    config = BackendConfig.model_validate({"overlap": "layer", "control": {}})
    plugin.complete(config, prefills=True)
    wanted = [
        touch_points.K_PREPARE_ABORT,
        touch_points.K_BOOTSTRAP_ADDRESS,
        touch_points.K_RUN_BATCH,
        touch_points.K_MHA_WRITE,
    ]
    assert hooked == [*wanted, touch_points.K_MLA_WRITE, touch_points.K_MLA_WRITE_PARTS, "checked", "applied"]
    plugin.complete(config, prefills=True)
    assert len(hooked) == 8


def moved(*args: object, **kwargs: object) -> None:
    raise SglangMoved("expected this, found that")


def test_a_moved_sglang_ends_a_launch_that_asks_for_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "check_backend", moved)
    monkeypatch.setattr(sys, "argv", ["x", "--disaggregation-transfer-backend", "prfaas"])
    with pytest.raises(SystemExit, match="prfaas: expected this, found that"):
        plugin.load_plugin()


def test_a_moved_sglang_leaves_other_launches_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "register", moved)
    monkeypatch.setattr(sys, "argv", ["x"])
    plugin.load_plugin()
    assert "prfaas isn't available: expected this, found that" in caplog.text


def test_http_workers_are_given_an_application_that_loads_plugins_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(touch_points.K_APP_PATH, "theirs:app")
    plugin._name_application()
    assert os.environ[touch_points.K_APP_PATH] == "theirs:app"
    assert (
        "names theirs:app: with --tokenizer-worker-num above 1 that must import prfaas.sglang.http_app first"
        in (caplog.text)
    )
    caplog.clear()
    monkeypatch.delenv(touch_points.K_APP_PATH)
    plugin._name_application()
    assert os.environ[touch_points.K_APP_PATH] == "prfaas.sglang.http_app:app"
    plugin._name_application()
    assert not caplog.text
