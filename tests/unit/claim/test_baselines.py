"""Two engines on one link: what each left without a right answer, and when first tokens came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas.config.run import Run, write_run
from prfaas.model.errors import UsageError
from prfaas_testbed.claim import baselines, pieces, runs


def run_of(ttfts_s: dict[str, float], wrong: str = "", started: str = "2026") -> Run:
    """A run whose engines have these first tokens; the last answer of `wrong` is another than the plain
    server's."""
    known = dict(runs.parts(baselines.K_EXPERIMENT))
    rows: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for part, ttft_s in ttfts_s.items():
        for i in range(4):
            rows.append(
                {"part": part, "id": f"r{i}", "model": "dense", "prompt_tokens": 2000, "sent_s": 1.0 * i,
                 "ttft_s": ttft_s + 0.1 * i, "e2e_s": 2.0, "tokens_equal": not (part == wrong and i == 3),
                 "transfer": "wan" if i else "local"}
            )  # fmt: skip
        events.append({"part": part, "model": "dense", "at_s": 0.0, "event": "round", "round": "healthy"})
        events += [
            {"part": part, "model": "dense", "at_s": 9.0, "event": "cost", "name": name, "role": role,
             "cpu_s": cpu_s, "wall_s": 9.0, "rss_bytes": 3 << 20}
            for name, role, cpu_s in (("e", "pump", 0.2), ("w", "pump", 0.6), ("p", "plain", 9.0))
            if part == "prfaas"
        ]  # fmt: skip
    definitions = {part: known[part].model_dump(mode="json", exclude_defaults=True) for part in ttfts_s}
    return Run.model_validate(
        {"experiment": baselines.K_EXPERIMENT, "commit": "0" * 40, "started": "2026-01-01T00:00:00Z",
         "versions": {}, "machine": {"cores": 2}, "emulation": "appliance", "parts": list(ttfts_s),
         "definition": {"parts": definitions},
         "part_runs": {part: {"commit": "0" * 40, "started": started, "wall_s": 60.0} for part in ttfts_s},
         "repetitions": [{"index": 0, "requests": rows, "events": events}]}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours_s", "wrong", "reached"),
    [(0.5, "", [True, True]), (0.5, "prfaas", [False, True]), (1.5, "mooncake_tcp", [True, False])],
)
def test_ours_is_judged_beside_the_stock_engine(
    tmp_path: Path, ours_s: float, wrong: str, reached: list[bool]
) -> None:
    write_run(run_of({"mooncake_tcp": 1.0, "prfaas": ours_s}, wrong), tmp_path)
    data = pieces.gather("baselines", [tmp_path], lambda line: None)
    assert [goal.reached for goal in baselines.goals(data)] == reached
    assert "| healthy, prfaas | 1 | 4 |" in baselines.tell(data)
    # Both sites' pumps, 0.8 s for four requests.
    assert "| prfaas | 0 | 200 | 0 | 0 | 0 | 6 | 0 | 0 |" in baselines.tell(data)
    assert baselines.draw(data, tmp_path / "figures") == ["baselines.png"]


@pytest.mark.parametrize("alone", ["prfaas", "mooncake_tcp"])
def test_an_engine_alone_reaches_no_goal(tmp_path: Path, alone: str) -> None:
    write_run(run_of({alone: 0.5}), tmp_path)
    data = pieces.gather("baselines", [tmp_path], lambda line: None)
    assert [goal.reached for goal in baselines.goals(data)] == [False, False]


@pytest.mark.parametrize(("failing", "reached"), [("prfaas", [False, False]), ("mooncake_tcp", [True, True])])
def test_an_engine_without_a_right_answer_is_the_slower_one(
    tmp_path: Path, failing: str, reached: list[bool]
) -> None:
    run = run_of({"mooncake_tcp": 1.0, "prfaas": 0.5})
    for row in run.repetitions[0].requests:
        if row.model_extra["part"] == failing:
            row.error = "503"
    write_run(run, tmp_path)
    found = baselines.goals(pieces.gather("baselines", [tmp_path], lambda line: None))
    assert [goal.reached for goal in found] == reached
    assert found[1].found == f"healthy: no right answer by {failing}"


def test_what_ran_once_is_said_to_have_run_once(tmp_path: Path) -> None:
    write_run(run_of({"mooncake_tcp": 1.0, "prfaas": 0.5}), tmp_path)
    data = pieces.gather("baselines", [tmp_path], lambda line: None)
    assert "ran once on each link" in baselines.tell(data)
    write_run(run_of({"mooncake_tcp": 1.0, "prfaas": 0.5}, started="2027"), tmp_path)
    more = pieces.further(pieces.gather("baselines", [tmp_path], lambda line: None), data)
    assert "ran once" not in baselines.tell(more)


def test_a_further_run_is_a_further_repetition(tmp_path: Path) -> None:
    write_run(run_of({"mooncake_tcp": 1.0, "prfaas": 0.5}), tmp_path / "a")
    write_run(run_of({"prfaas": 0.6}, started="2027"), tmp_path / "b")
    data = pieces.gather("baselines", [tmp_path / "a", tmp_path / "b"], lambda line: None)
    assert "| healthy, prfaas | 2 | 8 |" in baselines.tell(data)
    assert "| healthy, mooncake_tcp | 1 | 4 |" in baselines.tell(data)
    # Also where the first run is no more than a record.
    first, second = (pieces.gather("baselines", [tmp_path / name], lambda line: None) for name in "ab")
    joined = pieces.further(second, first)
    assert {name: joined[name] for name in ("rows", "costs", "runs")} == {
        name: data[name] for name in ("rows", "costs", "runs")
    }
    with pytest.raises(UsageError, match="run of prfaas is in the record already"):
        pieces.further(second, joined)


def test_both_engines_get_the_same_requests_on_the_same_link() -> None:
    stock, ours = (one for _, one in runs.parts(baselines.K_EXPERIMENT))
    assert stock.transfer.engine == "mooncake_tcp"
    assert ours.model_copy(update={"transfer": stock.transfer}) == stock
    with pytest.raises(UsageError, match="claim add baselines"):
        pieces.measure("baselines", 1, lambda line: None)
