import sys

import pytest

import prfaas.cli
from prfaas.cli.main import command_modules, main


def test_a_command_loads_itself_alone_and_anything_else_loads_all() -> None:
    everything = command_modules(prfaas.cli, [])
    assert {"plan", "simulate", "router", "pump", "keys", "doctor", "config"} <= set(everything)
    assert "main" not in everything
    assert command_modules(prfaas.cli, ["plan", "x.yaml"]) == ["plan"]
    assert command_modules(prfaas.cli, ["nonsense"]) == everything
    assert command_modules(prfaas.cli, ["--help"]) == everything


def test_an_unknown_command_is_bad_usage_and_names_what_there_is(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["nonsense"])
    assert ended.value.code == 2
    assert "simulate" in capsys.readouterr().err


def test_the_words_are_those_of_the_command_line_unless_given(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["prfaas", "plan", "/nowhere/case.yaml"])
    assert main() == 2
    assert "/nowhere/case.yaml" in capsys.readouterr().err
