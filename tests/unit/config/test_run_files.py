"""run.json: what is written is what is read, however large."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

import prfaas.config.run as run_module
from prfaas.config.run import (
    EventRow,
    LinkRow,
    Repetition,
    RequestRow,
    Run,
    is_stamp,
    read_run,
    stamp,
    write_run,
)
from prfaas.model.errors import ConfigError, UsageError


def example() -> Run:
    request = RequestRow.model_validate({"id": "r0", "model": "m", "prompt_tokens": 3, "output_ids": [1, 2]})
    link = LinkRow(at_s=0.1, link="a->b", direction="a->b", bytes=1, drops=0, backlog_bytes=0)
    event = EventRow.model_validate({"at_s": 1.5, "event": "cut_stream", "streams": 1})
    return Run(
        experiment="t", commit="c", started="s", versions={"python": "3"}, machine={"cores": 2},
        emulation="native",
        repetitions=[Repetition(index=i, requests=[request], links=[link], events=[event]) for i in range(2)],
        baseline=[request],
    )  # fmt: skip


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    write_run(example(), tmp_path)
    assert read_run(tmp_path) == example()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_large_run_keeps_its_raw_rows_in_files_that_run_json_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "K_INLINE_BYTES", 10)
    write_run(example(), tmp_path)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["files"]["repetitions"] == "repetitions.jsonl.gz"
    assert stored["repetitions"] == []
    back = read_run(tmp_path)
    assert back.repetitions == example().repetitions
    assert back.baseline == example().baseline


def test_what_is_not_a_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(UsageError, match="not a run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"experiment": "t"}')
    with pytest.raises(ConfigError, match="commit"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"files": {"repetitions": "../x"}}')
    with pytest.raises(UsageError, match="isn't a file beside it"):
        read_run(tmp_path)


def test_stamps_are_utc_and_known_again() -> None:
    assert stamp(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) == "20260102T030405Z"
    assert is_stamp("20260102T030405Z")
    assert not is_stamp("scratch")
