"""`prfaas config check`: which kind a file is, and its first fault."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from prfaas.cli._kinds import known_kinds
from prfaas.cli.main import main

TOPOLOGIES = Path(__file__).parents[3] / "topologies"


@pytest.mark.parametrize("kind", ["network", "profile"])
def test_files_that_come_with_the_project_are_told_apart_and_pass(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((TOPOLOGIES / f"{kind}s").glob("*.yaml"))
    assert files
    assert main(["config", "check", *map(str, files)]) == 0
    assert all(f": {kind}, no fault found" in line for line in capsys.readouterr().out.splitlines())


def test_a_fault_names_file_field_value_and_what_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pump.yaml"
    file.write_text("site: east\nlisten: 127.0.0.1:0\nmax_streams: 300\n")
    assert main(["config", "check", str(file)]) == 2
    said = capsys.readouterr().err
    for part in (str(file), "max_streams", "300", "256"):
        assert part in said


def test_one_wrong_file_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.yaml"
    good.write_text("site: east\n")
    assert main(["config", "check", str(tmp_path / "none.yaml"), str(good)]) == 2
    said = capsys.readouterr()
    assert "no such file" in said.err
    assert f"{good}: pump, no fault found" in said.out


@pytest.mark.parametrize(
    ("text", "says"), [("- a\n", "expected a mapping"), ("a: [\n", "YAML"), ("zz: 1\n", "--kind")]
)
def test_files_of_no_kind_are_refused(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    assert main(["config", "check", str(file)]) == 2
    assert says in capsys.readouterr().err


def test_a_kind_can_be_said_and_an_unknown_one_lists_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("home: east\n")
    assert main(["config", "check", "--kind", "router", str(file)]) == 2
    assert "models: found None; this field is required" in capsys.readouterr().err
    assert main(["config", "check", "--kind", "cake", str(file)]) == 2
    said = capsys.readouterr().err
    assert all(kind in said for kind in known_kinds())


def test_fields_tells_every_field_of_what_an_operator_writes_with_its_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "fields"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "  window_bytes: integer >= 4096 <= 1099511627776; default 67108864",
        "  protocol_versions: list of integer, integer; default 1, 3",
        "  overlap: layer | chunk | end; default chunk",
        "  role: prefill | decode | collocated; needed",
    ):
        assert line in lines
    schemas = {line.partition(":")[0] for line in lines if line[:1].isalpha()}
    untold = [
        line
        for line, after in itertools.pairwise(lines)
        if line.startswith("  ")
        and line[2] != " "
        and not after.startswith("      ")
        # A section's meaning stands at its own heading.
        and not any(name in line for name in schemas)
    ]
    assert untold == []


def test_fields_of_one_kind_alone_and_of_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "fields", "profile"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("== a file of the kind profile")
    assert "RouterConfig" not in told
    assert main(["config", "fields", "cake"]) == 2
    assert "known: network" in capsys.readouterr().err
