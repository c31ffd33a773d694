"""What another site adds to a first token: measured from runs, judged against the wire."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfaas.config.run import Run, write_run
from prfaas.model.errors import UsageError
from prfaas_testbed.claim import handover, pieces, runs, worlds


def run_of(late_s: float, *names: str) -> Run:
    """A testbed's record: near as simulated, far by the link's own figures and `late_s` more."""
    known = dict(runs.parts(handover.K_EXPERIMENT))
    link = handover._link(known["far"])
    near = worlds.simulated(known["near"], worlds.requests_of_testbed(known["near"]))
    rows = []
    for name in names:
        for place in range(len(near)):
            tokens = int(near["prompt_tokens"][place])
            more_s = 0.0 if name == "near" else link["rtt_s"] + handover._wire_s(link, tokens) + late_s
            rows.append(
                {"part": name, "id": f"r{place}", "model": "m", "prompt_tokens": tokens, "site": "east",
                 "sent_s": near["sent_s"][place], "ttft_s": near["ttft_s"][place] + more_s, "e2e_s": 3.0}
            )  # fmt: skip
    definitions = {n: known[n].model_dump(mode="json", exclude_defaults=True) for n in names}
    return Run.model_validate(
        {"experiment": handover.K_EXPERIMENT, "commit": "0" * 40, "started": "2026-01-01T00:00:00Z",
         "versions": {}, "machine": {"cores": 2}, "emulation": "appliance", "scale": 100,
         "parts": list(names), "definition": {"parts": definitions},
         "repetitions": [{"index": 0, "requests": rows}],
         "part_runs": {n: {"commit": "0" * 40, "started": "2026", "wall_s": 60.0} for n in names}}
    )  # fmt: skip


@pytest.mark.parametrize(("late_s", "reached"), [(0.004, True), (0.02, False)])
def test_ten_ms_beyond_round_trip_and_wire_are_allowed(tmp_path: Path, late_s: float, reached: bool) -> None:
    write_run(run_of(late_s, "near", "far"), tmp_path)
    data = pieces.gather("handover", [tmp_path], lambda line: None)
    found = handover._by_length(data, "far", "testbed")
    assert [one["tokens"] for one in found] == [512, 1024, 2048, 4096, 8192]
    assert all(one["beyond_s"] == pytest.approx(late_s, abs=3e-4) for one in found)
    assert [goal.reached for goal in handover.goals(data)] == [reached]
    assert "| 8K |" in handover.tell(data)
    assert handover.draw(data, tmp_path / "figures") == ["handover.png"]


def test_the_wire_carries_the_last_chunk_alone() -> None:
    link = {"chunk_tokens": 512, "bytes_per_token": 1000.0, "rate_bps": 8e6}
    assert handover._wire_s(link, 512) == handover._wire_s(link, 1024) == pytest.approx(0.512)
    assert handover._wire_s(link, 600) == pytest.approx(0.088)


def test_without_equal_hardware_nearby_there_is_nothing_to_tell(tmp_path: Path) -> None:
    write_run(run_of(0.0, "far"), tmp_path)
    with pytest.raises(UsageError, match="no run of the part near"):
        pieces.gather("handover", [tmp_path], lambda line: None)
    with pytest.raises(UsageError, match="claim add handover"):
        pieces.measure("handover", 1, lambda line: None)
