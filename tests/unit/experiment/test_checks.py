"""Judging from raw rows: what must fail does fail."""

from __future__ import annotations

import pytest
import yaml

from prfaas.config.experiment import CheckSpec
from prfaas.config.run import CalibrationRow, EventRow, Repetition, RequestRow, Row, Run
from prfaas.model.errors import ConfigError
from prfaas_testbed.experiment.checks import exit_status, judge, require_known
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.metrics import K_METRICS, metric, union_s
from prfaas_testbed.experiment.table import summary_lines
from prfaas_testbed.experiment.view import View


def request(id: str, ids: list[int], **fields: object) -> RequestRow:
    values: dict[str, object] = {
        "model": "m", "prompt_tokens": 10, "sent_s": 0.0, "ttft_s": 0.5, "e2e_s": 1.0, "output_ids": ids,
        "logprobs": [-1.0] * len(ids), "kv_bytes": 1000, "source_digest": "d", "landed_digest": "d",
    }  # fmt: skip
    return RequestRow.model_validate({"id": id, **values, **fields})


def run_of(requests: list[RequestRow], checks: list[dict[str, object]], **fields: object) -> Run:
    repetition = Repetition(
        index=0,
        requests=requests,
        events=[EventRow.model_validate({"at_s": 0, "event": "load", "requests": len(requests)})],
    )
    base: dict[str, object] = {
        "experiment": "t", "commit": "c", "started": "s", "versions": {}, "machine": {},
        "emulation": "native", "repetitions": [repetition],
        "baseline": [request("a", [1, 2, 3]), request("b", [4, 5])],
        "definition": {"checks": checks},
    }  # fmt: skip
    return Run.model_validate({**base, **fields})


def outcome(run: Run) -> dict[str, tuple[str, object]]:
    return {row.name: (row.outcome, row.value) for row in judge(run)}


EXACT: list[dict[str, object]] = [
    {"name": "tokens_equal_share", "at_least": 1},
    {"name": "wrong_answers", "at_most": 0},
    {"name": "logprob_gap", "at_most": 0.05},
    {"name": "digests_equal_share", "at_least": 1},
    {"name": "digests_missing", "at_most": 0},
    {"name": "lost", "at_most": 0},
    {"name": "answered_share", "at_least": 1},
]


def test_equal_answers_pass() -> None:
    rows = judge(run_of([request("a", [1, 2, 3]), request("b", [4, 5])], EXACT))
    assert {row.outcome for row in rows} == {"passed"}
    assert exit_status(rows) == 0


def test_one_wrong_token_fails() -> None:
    found = outcome(run_of([request("a", [1, 2, 9]), request("b", [4, 5])], EXACT))
    assert found["tokens_equal_share"] == ("failed", 0.5)
    assert found["wrong_answers"] == ("failed", 1)
    assert found["logprob_gap"][0] == "passed"


def test_a_digest_that_differs_fails() -> None:
    found = outcome(run_of([request("a", [1, 2, 3]), request("b", [4, 5], landed_digest="e")], EXACT))
    assert found["digests_equal_share"] == ("failed", 0.5)
    assert found["digests_missing"] == ("passed", 0)


@pytest.mark.parametrize("side", ["source_digest", "landed_digest"])
def test_a_digest_that_one_side_lacks_is_counted_apart_and_fails(side: str) -> None:
    found = outcome(run_of([request("a", [1, 2, 3]), request("b", [4, 5], **{side: None})], EXACT))
    assert found["digests_equal_share"] == ("passed", 1.0)
    assert found["digests_missing"] == ("failed", 1)


def test_where_no_request_has_both_digests_nothing_is_equal() -> None:
    found = outcome(run_of([request("a", [1, 2, 3], source_digest=None)], EXACT))
    assert found["digests_equal_share"] == ("unsupported", None)
    assert found["digests_missing"] == ("failed", 1)


def test_an_experiment_that_wants_digests_equal_wants_none_missing_unless_it_fills_disks() -> None:
    """One request with both would be enough for the first."""
    unbounded = set()
    for path in (K_TOPOLOGIES / "experiments").glob("*.yaml"):
        names = {row["name"] for row in yaml.safe_load(path.read_text()).get("checks", ())}
        if "digests_equal_share" in names and "digests_missing" not in names:
            unbounded.add(path.stem)
    assert unbounded == {"claim-faults-base"}


def test_an_unanswered_request_is_not_equal_and_a_silent_one_is_lost() -> None:
    rows = [request("a", [1, 2, 3]), request("b", [], error="no", e2e_s=None)]
    found = outcome(run_of(rows, EXACT))
    assert found["tokens_equal_share"] == ("failed", 0.5)
    assert found["lost"] == ("passed", 0)
    silent = outcome(run_of([request("a", [1, 2, 3]), request("b", [], e2e_s=None)], EXACT))
    assert silent["lost"] == ("failed", 1)


def test_logprobs_are_compared_where_tokens_agree() -> None:
    rows = [request("a", [1, 2, 3], logprobs=[-1.0, -1.2, -1.0]), request("b", [4, 9], logprobs=[-1.0, -7.0])]
    assert outcome(run_of(rows, EXACT))["logprob_gap"] == ("failed", pytest.approx(0.2))


def test_without_a_plain_server_equality_is_unsupported_never_passed() -> None:
    rows = judge(run_of([request("a", [1])], EXACT[:3], baseline=[]))
    assert {row.outcome for row in rows} == {"unsupported"}
    assert all(row.reason for row in rows)


def test_a_control_counts_only_if_both_comparisons_caught_it() -> None:
    checks = [{"name": "controls_caught_share", "at_least": 1}]
    good, half = (
        {"tokens_caught": True, "digest_caught": True},
        {"tokens_caught": True, "digest_caught": False},
    )
    assert outcome(run_of([], checks, controls=[Row(**good)]))["controls_caught_share"] == ("passed", 1.0)
    found = outcome(run_of([], checks, controls=[Row(**good), Row(**half)]))
    assert found["controls_caught_share"] == ("failed", 0.5)


def test_parts_are_judged_by_their_own_rows() -> None:
    rows = [request("a", [1, 2, 3], part="x"), request("a", [9], part="y")]
    plain = [request("a", [1, 2, 3], part="x"), request("a", [1], part="y")]
    definition = {"parts": {"x": {"checks": EXACT[:1]}, "y": {"checks": EXACT[:1]}}}
    found = outcome(run_of(rows, [], baseline=plain, definition=definition))
    assert found == {"x/tokens_equal_share": ("passed", 1.0), "y/tokens_equal_share": ("failed", 0.0)}


def test_a_part_that_was_stopped_counts_as_failed() -> None:
    definition = {"parts": {"x": {"checks": []}}}
    run = run_of([], [], definition=definition, stopped_parts={"x": "the machine was too busy"})
    (row,) = judge(run)
    assert (row.name, row.outcome, row.reason) == ("x/ran", "failed", "the machine was too busy")
    assert exit_status([row]) == 1


def test_bytes_on_the_wan_beyond_two_percent_fail() -> None:
    run = run_of([request("a", [1, 2, 3])], [{"name": "bytes_gap_share", "at_most": 0.02}])
    event = {"at_s": 1, "event": "accounting", "wan_bytes": 1030, "accounted_bytes": 1000}
    run.repetitions[0].events.append(EventRow.model_validate(event))
    assert outcome(run)["bytes_gap_share"] == ("failed", 0.03)


def test_calibration_that_missed_shows() -> None:
    row = {
        "link": "a->b",
        "direction": "a->b",
        "wanted_rtt_ms": 40,
        "measured_rtt_ms": 50,
        "wanted_rate_mbps": 1,
        "measured_rate_mbps": 1,
        "wanted_loss": 0,
        "measured_loss": 0,
        "inside": False,
    }
    checks = [{"name": "calibrated_share", "at_least": 1}]
    found = outcome(run_of([], checks, calibration=[CalibrationRow.model_validate(row)]))
    assert found["calibrated_share"] == ("failed", 0.0)


def calibration(direction: str, inside: bool, **fields: object) -> CalibrationRow:
    row = {
        "link": direction, "direction": direction, "wanted_rtt_ms": 40, "measured_rtt_ms": 40.1,
        "wanted_rate_mbps": 100, "measured_rate_mbps": 99, "wanted_loss": 0, "measured_loss": 0,
        "inside": inside,
    }  # fmt: skip
    return CalibrationRow.model_validate({**row, **fields})


def test_the_second_calibration_of_a_direction_is_the_one_that_counts() -> None:
    checks: list[dict[str, object]] = [{"name": "calibrated_share", "at_least": 1}]
    rows = [calibration("a->b", False), calibration("b->a", True), calibration("a->b", True, attempt=2)]
    assert outcome(run_of([], checks, calibration=rows))["calibrated_share"] == ("passed", 1.0)
    rows.append(calibration("b->a", False, attempt=2))
    assert outcome(run_of([], checks, calibration=rows))["calibrated_share"] == ("failed", 0.5)


def test_one_part_s_calibration_is_not_another_s() -> None:
    checks: dict[str, object] = {"checks": [{"name": "calibrated_share", "at_least": 1}]}
    rows = [calibration("a->b", True, part="good"), calibration("a->b", False, part="bad")]
    run = run_of(
        [], [], calibration=rows, parts=["good", "bad"], definition={"parts": {"good": checks, "bad": checks}}
    )
    found = outcome(run)
    assert found["good/calibrated_share"] == ("passed", 1.0)
    assert found["bad/calibrated_share"] == ("failed", 0.0)


def test_a_metric_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"checks\.speed\.metric: found 'speed'; known: .*ttft_p50_s"):
        require_known([CheckSpec(name="speed", at_least=1)], "f.yaml")


def test_a_metric_is_registered_once_and_described() -> None:
    with pytest.raises(ValueError, match="twice"):
        metric("lost")(lambda view: 0.0)
    assert all(item.description.endswith(".") for item in K_METRICS.values())


def test_overlapping_spans_count_once() -> None:
    assert union_s([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == pytest.approx(4)


def test_the_table_tells_the_goodput_of_a_repetition_and_not_of_all_laid_over_one_another() -> None:
    rows = [request("a", [1], kv_bytes=1_000_000, transfer_start_s=0.0, transfer_end_s=1.0)]
    run = run_of(rows, [])
    run.repetitions = [run.repetitions[0].model_copy(update={"index": index}) for index in range(5)]
    (line,) = [line for line in summary_lines(run) if "goodput" in line]
    assert line.split()[4] == "8.0"


def test_what_moved_within_a_site_crossed_no_link() -> None:
    times: dict[str, object] = {"transfer_start_s": 0.0, "transfer_end_s": 0.5, "kv_bytes": 1_000_000}
    rows = [request("a", [1], transfer="wan", **times), request("b", [4], transfer="local", **times)]
    view = View(run_of(rows, EXACT))
    found = {name: K_METRICS[name].compute(view) for name in ("payload_bytes", "goodput_mbps", "egress_mbps")}
    assert found == {"payload_bytes": 1_000_000, "goodput_mbps": 16.0, "egress_mbps": 8.0}
    assert K_METRICS["offloaded_share"].compute(view) == 0.5
    assert any("KV and state, MB" in line and line.split()[-1] == "1.00" for line in summary_lines(view.run))
