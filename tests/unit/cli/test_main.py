import argparse
import errno
import importlib.metadata
import subprocess
import sys

import pytest

import prfaas.cli
from prfaas.cli.main import command_modules, main, run_command


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


def test_it_says_which_version_it_is(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"prfaas {importlib.metadata.version('prfaas')}\n"


def test_the_words_are_those_of_the_command_line_unless_given(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["prfaas", "plan", "/nowhere/case.yaml"])
    assert main() == 2
    assert "/nowhere/case.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/k/site.pem"),
            2,
            "/k/site.pem: Permission denied",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "x: File name too long"),
        (OSError(errno.ENOSPC, "No space left on device", "/out"), 3, "/out: No space left on device"),
    ],
)
def test_a_file_or_a_disk_that_cannot_be_used_is_one_line(error, status, said, capsys) -> None:
    def build(argv):
        parser = argparse.ArgumentParser()
        parser.set_defaults(run=lambda args: (_ for _ in ()).throw(error))
        return parser

    assert run_command("prfaas", build, []) == status
    assert capsys.readouterr().err == f"prfaas: {said}\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), OSError(errno.EBADF, "?", "f")]
)
def test_a_fault_of_ours_is_not_made_a_users(error) -> None:
    def build(argv):
        parser = argparse.ArgumentParser()
        parser.set_defaults(run=lambda args: (_ for _ in ()).throw(error))
        return parser

    with pytest.raises(OSError, match=r"denied|Errno 9"):
        run_command("prfaas", build, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-program"], "no-such-program can't be started here: No such file or directory; install it"),
        (["/etc/passwd"], "/etc/passwd can't be started here: Permission denied\n"),
    ],
)
def test_a_program_that_cannot_be_started_is_the_machines_lack(words, said, capsys) -> None:
    def build(argv):
        parser = argparse.ArgumentParser()
        parser.set_defaults(run=lambda args: subprocess.run(words, check=False).returncode)
        return parser

    assert run_command("prfaas", build, []) == 3
    assert capsys.readouterr().err.startswith(f"prfaas: {said}")


def test_a_name_with_a_line_break_makes_no_second_line(capsys) -> None:
    assert main(["plan", "no\nsuch.yaml"]) == 2
    assert capsys.readouterr().err == "prfaas: no\\x0asuch.yaml: no such file\n"
