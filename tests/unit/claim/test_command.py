"""`prfaas-testbed claim run` of a piece that runs on the testbed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from prfaas.config.run import Run, write_run
from prfaas.model.errors import UsageError
from prfaas_testbed.claim import pieces, runs
from prfaas_testbed.cli import claim
from prfaas_testbed.cli import run as testbed_run

K_PART = "machines-dense"


def test_a_piece_of_the_testbed_is_run_and_then_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def conduct(args: argparse.Namespace) -> int:
        asked.append(args.experiment)
        mine = {"part": K_PART, "model": "dense"}
        row = {**mine, "id": "r0", "prompt_tokens": 9, "sent_s": 1.0, "ttft_s": 0.2, "e2e_s": 0.3}
        events = [{**mine, "at_s": 0.0, "event": "round", "round": name} for name in ("calm", "disk full")]
        experiment = dict(runs.parts(args.experiment))[K_PART]
        run = Run.model_validate(
            {"experiment": args.experiment, "commit": "0" * 40, "started": "2026-01-01T00:00:00Z",
             "versions": {}, "machine": {}, "emulation": "appliance",
             "definition": {"parts": {K_PART: experiment.model_dump(mode="json", exclude_defaults=True)}},
             "repetitions": [
                 {"index": i, "requests": [row], "events": [event]} for i, event in enumerate(events)
             ]}
        )  # fmt: skip
        write_run(run, args.out / args.experiment / "20260101T000000Z")
        return 1

    monkeypatch.setattr(testbed_run, "run", conduct)
    parser = argparse.ArgumentParser()
    claim.register(parser.add_subparsers())
    args = parser.parse_args(["claim", "run", "faults", "--out", str(tmp_path)])
    assert args.run(args) == 0
    assert asked == ["claim-faults"]
    record = json.loads((tmp_path / "faults.json").read_text())
    assert (record["world"], len(record["rows"])) == ("testbed", 2)


def test_what_ran_least_often_and_then_longest_ago_is_due_as_far_as_the_time_goes() -> None:
    runs = [
        {"part": part, "started": f"2026-01-0{day}T00:00:00Z", "wall_s": wall_s}
        for part, day, wall_s in (("a", 1, 300), ("a", 3, 300), ("b", 4, 200), ("c", 2, 100), ("d", 5, 150))
    ]
    assert pieces.due(runs, "abcd", 480) == ["c", "b", "d"]
    assert pieces.due(runs, "abcd", 260) == ["c", "d"]  # b wouldn't end in time
    assert pieces.due(runs, "abcd", 10) == ["c"]  # else it would never come
    assert pieces.due(runs, "abcde", 480) == ["e"]  # it may take all of it
    assert pieces.due([], "abc", 480) == ["a"]


def test_a_piece_without_runs_has_no_more_of_them(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    claim.register(parser.add_subparsers())
    args = parser.parse_args(["claim", "more", "capacity", "--out", str(tmp_path)])
    with pytest.raises(UsageError, match="capacity isn't made of runs"):
        args.run(args)
    args = parser.parse_args(["claim", "more", "faults", "--for", "0", "--out", str(tmp_path)])
    with pytest.raises(UsageError, match="--for 0"):
        args.run(args)


def test_parts_that_name_none_are_bad_usage_and_not_all_of_them(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    claim.register(parser.add_subparsers())
    args = parser.parse_args(["claim", "run", "capacity", "--only=,", "--out", str(tmp_path)])
    with pytest.raises(UsageError, match="names no part"):
        args.run(args)
