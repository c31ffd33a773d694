"""run.json: what is written is what is read, however large."""

from __future__ import annotations

import errno
import gzip
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

import prfaas.config.run as run_module
from prfaas.config.run import (
    CheckRow,
    EventRow,
    LinkRow,
    Repetition,
    RequestRow,
    Run,
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
    assert stored["repetitions"] == []
    named = set(stored["files"].values())
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", *named}
    assert stored["files"]["repetitions"].startswith("repetitions-")
    back = read_run(tmp_path)
    assert back.repetitions == example().repetitions
    assert back.baseline == example().baseline


@pytest.mark.parametrize("inline_bytes", [10, 10_000_000])
def test_a_record_names_its_own_files_as_seen_from_its_folder_and_others_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    monkeypatch.setattr(run_module, "K_INLINE_BYTES", inline_bytes)
    monkeypatch.chdir(tmp_path)
    folder = Path("out") / 'a "b" (1)'
    run = example()
    other = f"{tmp_path}/other/out/x.log"
    said = [f"died; log: {tmp_path / folder}/logs/pump.log", f"log: {folder}/logs/pump.log", f"log: {other}"]
    run.checks = [CheckRow(name="c", outcome="failed", value=None, wanted="w", reason=said[0])]
    run.baseline = [run.baseline[0].model_copy(update={"error": one}) for one in said]
    write_run(run, folder)
    back = read_run(folder)
    assert back.checks[0].reason == "died; log: logs/pump.log"
    assert [row.error for row in back.baseline] == [
        "died; log: logs/pump.log", "log: logs/pump.log", f"log: {other}"
    ]  # fmt: skip
    write_run(example(), Path("."))
    assert read_run(tmp_path).baseline == example().baseline


def test_rows_kept_outside_give_way_only_to_a_whole_new_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "K_INLINE_BYTES", 10)
    write_run(example(), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    grown = example()
    grown.repetitions[0].requests *= 2

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for writes in range(1, 5):
        # Each file is brought to the disk once: the disk is full at the first, the second, ...
        left = iter(range(writes - 1))
        monkeypatch.setattr(
            run_module.os, "fsync", lambda fd, left=left: None if next(left, None) is not None else full(fd)
        )
        with pytest.raises(OSError, match="No space left"):
            write_run(grown, tmp_path)
        assert read_run(tmp_path) == example().model_copy(update={"files": read_run(tmp_path).files})
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "K_INLINE_BYTES", 10)
    write_run(grown, tmp_path)
    assert len(read_run(tmp_path).repetitions[0].requests) == 2
    after = sorted(path.name for path in tmp_path.iterdir())
    assert len(after) == len(before) == 4


def test_what_is_not_a_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(UsageError, match="not a run"):
        read_run(tmp_path)
    for text in ("[" * 100_000, "", "\0", "{", '{"files": [1]}', '{"files": {"repetitions": 1}}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UsageError, match=r"run\.json: (not a run|files)"):
            read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"experiment": "prefixes", "checks": [], "rows": []}')
    with pytest.raises(UsageError, match="a record of `prfaas-testbed prefixes`, not of `run`"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"experiment": "t"}')
    with pytest.raises(ConfigError, match="commit"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"files": {"repetitions": "../x"}}')
    with pytest.raises(UsageError, match="isn't a file beside it"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"files": {"repetitions": "repetitions.jsonl.gz"}}')
    for raw in (
        None,
        b"",
        b"none",
        gzip.compress(b"{}")[:-9],
        gzip.compress(b"{"),
        gzip.compress(b"[" * 99999),
    ):
        if raw is not None:
            (tmp_path / "repetitions.jsonl.gz").write_bytes(raw)
        with pytest.raises((UsageError, ConfigError), match=r"jsonl\.gz: can't be read|run\.json: "):
            read_run(tmp_path)


def test_stamps_are_utc() -> None:
    assert stamp(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) == "20260102T030405Z"
