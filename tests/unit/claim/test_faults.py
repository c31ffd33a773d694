"""Trouble on real servers: what became of each request, when service was whole, what was still held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas.config.run import Run, write_run
from prfaas.model.errors import UsageError
from prfaas_testbed.claim import faults, pieces, runs

Asked = tuple[float, float, bool | None, str | None]
K_PART = "network-dense"


def round_of(
    index: int,
    name: str,
    requests: list[Asked],
    steps: list[dict[str, Any]],
    *,
    free_s: float | None = 0.5,
    probes: tuple[tuple[float, bool], ...] = ((20.0, True),),
    planned: int | None = None,
) -> dict[str, Any]:
    """(sent, first token after, equal, error) of each request; each answer ends 0.1 s after its first."""
    rows = [
        {"id": f"r{i}", "model": "dense", "part": K_PART, "prompt_tokens": 100, "sent_s": sent_s,
         "ttft_s": ttft_s, "e2e_s": ttft_s + 0.1, "tokens_equal": equal, "error": error}
        for i, (sent_s, ttft_s, equal, error) in enumerate(requests)
    ]  # fmt: skip
    count = len(rows) if planned is None else planned
    events: list[dict[str, Any]] = [
        *steps,
        {"at_s": 0.0, "event": "load", "requests": count},
        {"at_s": 19.0, "event": "settled", "site": "east", "free_s": 0.25, "held": {"pages": 0}},
        {"at_s": 19.0, "event": "settled", "site": "west", "free_s": free_s, "held": {"pages": 7}},
        *({"at_s": at_s, "event": "probe", "good": good, "e2e_s": 0.5} for at_s, good in probes),
        {"at_s": 0.0, "event": "round", "round": name, "lagged": None},
    ]  # fmt: skip
    return {
        "index": index,
        "requests": rows,
        "events": [{**e, "part": K_PART, "model": "dense"} for e in events],
    }


def gathered(folder: Path, *rounds: dict[str, Any], started: str = "2026") -> dict[str, Any]:
    experiment = dict(runs.parts(faults.K_EXPERIMENT))[K_PART]
    run = Run.model_validate(
        {"experiment": faults.K_EXPERIMENT, "commit": "0" * 40, "started": "2026-01-01T00:00:00Z",
         "versions": {}, "machine": {"cores": 2}, "emulation": "appliance", "parts": [K_PART],
         "definition": {"parts": {K_PART: experiment.model_dump(mode="json", exclude_defaults=True)}},
         "part_runs": {K_PART: {"commit": "0" * 40, "started": started, "wall_s": 60.0}},
         "repetitions": list(rounds)}
    )  # fmt: skip
    write_run(run, folder)
    return pieces.gather("faults", [folder], lambda line: None)


CALM = round_of(0, "calm", [(1.0, 0.2, True, None), (2.0, 0.3, True, None)], [])
DOWN = [
    {"at_s": 4.0, "event": "link_down", "planned_s": 4.0},
    {"at_s": 6.0, "event": "link_down_end", "planned_s": 6.0},
]


def test_each_request_is_equal_refused_lost_or_wrong(tmp_path: Path) -> None:
    asked: list[Asked] = [
        (3.0, 3.5, True, None),
        (3.1, 0.1, None, "StreamError: HTTP 503: no path"),
        (3.2, 60.0, None, "no whole answer within 60 s"),
        (3.3, 0.1, None, "ServerDisconnectedError: Server disconnected"),
        (3.4, 0.3, False, None),
        (3.5, 0.3, None, None),
    ]
    data = gathered(tmp_path, CALM, round_of(1, "link down 2 s", asked, DOWN, planned=7))
    calm, down = faults.judged(data)
    assert (calm.equal, calm.requests, calm.recovery_s) == (2, 2, 0.0)
    assert (down.equal, down.refused, down.lost, down.wrong, down.requests) == (1, 1, 3, 2, 7)
    assert [goal.reached for goal in faults.goals(data)] == [False, False, True, False, False]
    assert "| link down 2 s, dense | 1 | 7 | 1 | 1 | 2 | 3 |" in faults.tell(data)
    assert "**Not run yet**: on the dense model streams cut, link down 30 s," in faults.tell(data)
    assert faults.draw(data, tmp_path / "figures") == ["faults.png"]


def test_a_reset_is_an_error_where_the_router_was_killed(tmp_path: Path) -> None:
    asked: list[Asked] = [(3.3, 0.1, None, "ServerDisconnectedError: Server disconnected")]
    killed = [
        {"at_s": 4.0, "event": "kill", "planned_s": 4.0},
        {"at_s": 5.0, "event": "kill_end", "planned_s": 5.0, "ready_s": 1.5},
    ]
    data = gathered(tmp_path, CALM, round_of(1, faults.K_ROUTER, asked, killed))
    assert (faults.judged(data)[1].refused, faults.judged(data)[1].lost) == (1, 0)
    # Back when the next process says so.
    assert data["rounds"][1]["until_s"] == 6.5


@pytest.mark.parametrize(
    ("asked", "probes", "recovery_s"),
    [
        ([(3.0, 0.3, True, None)], ((20.0, True),), 0.0),
        ([(5.0, 2.0, True, None)], ((20.0, True),), 1.0),  # late: beyond twice the calm's 0.3 s
        ([(7.0, 2.0, None, "HTTP 503")], ((20.0, True),), 3.1),
        ([(3.0, 0.3, True, None)], ((20.0, False), (25.0, True)), 19.5),
        ([(3.0, 0.3, True, None)], ((20.0, False),), float("inf")),
    ],
)
def test_service_is_whole_when_nobody_is_late_or_refused_any_more_and_a_probe_is_answered(
    tmp_path: Path, asked: list[Asked], probes: tuple[tuple[float, bool], ...], recovery_s: float
) -> None:
    data = gathered(tmp_path, CALM, round_of(1, "link down 2 s", asked, DOWN, probes=probes))
    assert faults.judged(data)[1].recovery_s == pytest.approx(recovery_s)
    assert faults.goals(data)[3].reached == (recovery_s <= faults.K_RECOVER_S)


@pytest.mark.parametrize(("free_s", "reached"), [(12.0, True), (31.0, False), (None, False)])
def test_what_is_still_held_is_told(tmp_path: Path, free_s: float | None, reached: bool) -> None:
    asked: list[Asked] = [(3.0, 0.3, True, None)]
    data = gathered(tmp_path, CALM, round_of(1, "link down 2 s", asked, DOWN, free_s=free_s))
    assert faults.goals(data)[2].reached == reached


def test_a_trouble_that_did_not_happen_is_not_one_that_was_tried(tmp_path: Path) -> None:
    steps = [{"at_s": 4.0, "event": "link_down", "planned_s": 4.0, "skipped": "the load ended before it"}]
    data = gathered(tmp_path, CALM, round_of(1, "link down 2 s", [(3.0, 0.3, True, None)], steps))
    assert faults.judged(data)[1].missed == 1


def test_a_run_is_told_by_the_definition_that_it_carries(tmp_path: Path) -> None:
    gathered(tmp_path, CALM)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"definition"', '"definition_lost"', 1))
    with pytest.raises(UsageError, match="by which definition"):
        pieces.gather("faults", [tmp_path], lambda line: None)


def test_a_later_run_is_a_further_repetition_of_what_the_record_has(tmp_path: Path) -> None:
    asked: list[Asked] = [(3.0, 0.3, True, None), (3.1, 0.1, None, "StreamError: HTTP 503: no path")]
    rounds = (CALM, round_of(1, "link down 2 s", asked, DOWN))
    first = gathered(tmp_path / "first", *rounds)
    joined = pieces.further(gathered(tmp_path / "second", *rounds, started="2027"), first)
    _, down = faults.judged(joined)
    assert (down.rounds, down.requests, down.equal, down.refused) == (2, 4, 2, 2)
    # Its requests are those of its own rounds.
    assert [row["round"] for row in joined["rows"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(UsageError, match="in the record already"):
        pieces.further(first, joined)
    with pytest.raises(UsageError, match="takes the last run of each part"):
        pieces.further({**first, "piece": "testbed"}, joined)


def test_what_a_repetition_takes_and_how_many_are_to_come_is_told_until_all_were_run(tmp_path: Path) -> None:
    rounds = (CALM, round_of(1, "link down 2 s", [(3.0, 0.3, True, None)], DOWN))
    record = gathered(tmp_path / "0", *rounds)
    assert f"{K_PART} 1.0 minutes for 1 kinds, 4 to come: 4 minutes in all" in faults.tell(record)
    for number in range(1, faults.K_WANTED):
        record = pieces.further(gathered(tmp_path / f"{number}", *rounds, started=f"{2026 + number}"), record)
    assert "to come" not in faults.tell(record)


def test_a_first_token_is_late_by_the_calm_of_its_own_run(tmp_path: Path) -> None:
    slow = round_of(0, "calm", [(1.0, 5.0, True, None)], [])
    down = round_of(1, "link down 2 s", [(5.0, 2.0, True, None)], DOWN)
    first = gathered(tmp_path / "first", CALM, down)
    joined = pieces.further(gathered(tmp_path / "second", slow, down, started="2027"), first)
    assert faults._limits_s(joined) == [0.6, 0.6, 10.0, 10.0]
    assert faults.judged(joined)[1].recovery_s == pytest.approx(1.0)


def test_the_matrix_has_every_kind_of_trouble_on_both_models() -> None:
    by_model: dict[str, list[str]] = {}
    for _, experiment in runs.parts(faults.K_EXPERIMENT):
        names = [one.name for one in experiment.rounds if one.name != faults.K_CALM]
        by_model.setdefault(experiment.models[0].name, []).extend(names)
    assert set(by_model) == set(faults.K_MODELS)
    assert by_model["dense"] == by_model["hybrid"]
    assert len(set(by_model["dense"])) == len(by_model["dense"]) == 18
    assert faults.K_ROUTER in by_model["dense"]
