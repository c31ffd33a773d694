"""The page and the comparison are made from run.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas.config.run import CheckRow, EventRow, LinkRow, Run, read_run, write_run
from prfaas.model.errors import UsageError
from prfaas_testbed.cli.main import main
from prfaas_testbed.experiment.table import summary_lines
from prfaas_testbed.report.compare import compare_lines
from prfaas_testbed.report.figures import K_MOST_LINKS, busiest_links, draw_figures, label_of
from prfaas_testbed.report.page import draw_run
from prfaas_testbed.report.trials import draw_trials


def example(**changes: Any) -> Run:
    requests = [
        {
            "id": f"r{i}", "model": "toy", "prompt_tokens": 100 * (i + 1), "sent_s": 0.5 * i,
            "ttft_s": 0.1 * (i + 1), "e2e_s": 0.2 * (i + 1), "kv_bytes": 1000, "output_ids": [i],
            "logprobs": [-1.0], "site": "east",
            "transfer_start_s": 0.5 * i + 0.02, "transfer_end_s": 0.5 * i + 0.08,
            "source_digest": "d", "landed_digest": "d", "transfer": "wan",
        }
        for i in range(6)
    ]  # fmt: skip
    links = [
        {"at_s": 0.1 * i, "link": "east->west", "direction": "east->west", "bytes": 1000 * i, "drops": 0,
         "backlog_bytes": 0, "model": "toy"}
        for i in range(40)
    ]  # fmt: skip
    counts = dict.fromkeys(
        ("wan_bytes", "accounted_bytes", "payload_bytes", "framing_bytes", "tls_bytes", "control_bytes",
         "header_bytes", "retransmitted_bytes"), 1000,
    )  # fmt: skip
    events = [
        {"at_s": 1.0, "event": "cut_stream", "streams": 1, "model": "toy"},
        {"at_s": 3.0, "event": "accounting", "site": "east", "model": "toy", **counts},
        {
            "at_s": 3.0,
            "event": "watch",
            "lag_p99_ms": 0.2,
            "lag_max_ms": 0.3,
            "unplanned_drops": 0,
            "model": "toy",
        },
    ]
    base: dict[str, Any] = {
        "experiment": "t", "commit": "c" * 40, "started": "2026-01-01T00:00:00+00:00",
        "versions": {"python": "3"}, "machine": {"cpu": "<b>a&b</b>", "cores": 2},
        "emulation": "appliance", "description": "An example.",
        "repetitions": [{"index": 0, "requests": requests, "links": links, "events": events}],
        "baseline": [{**row, "ttft_s": 0.05} for row in requests],
        "definition": {"checks": [{"name": "tokens_equal_share", "at_least": 1}]},
    }  # fmt: skip
    return Run.model_validate({**base, **changes})


def test_a_run_gets_its_figures_and_a_page_that_shows_them(tmp_path: Path) -> None:
    write_run(example(), tmp_path)
    page = draw_run(tmp_path).read_text()
    for name in ("overview-toy", "ttft", "links", "transfers"):
        for kind in ("png", "svg", "csv"):
            assert (tmp_path / "figures" / f"{name}.{kind}").stat().st_size > 0
        assert f'src="figures/{name}.svg"' in page
    assert (tmp_path / "page.png").stat().st_size > 0
    assert "cut_stream" in page
    assert 'class="passed"' in page
    assert "&lt;b&gt;a&amp;b" in page, "what a run holds is text, not HTML"


def test_a_run_without_rows_still_has_a_page(tmp_path: Path) -> None:
    write_run(example(repetitions=[], baseline=[]), tmp_path)
    assert "An example." in draw_run(tmp_path).read_text()


def test_a_run_whose_links_carried_nothing_is_drawn_and_nothing_is_grumbled(tmp_path: Path) -> None:
    run = example()
    for row in run.repetitions[0].links:
        row.bytes = 0
    write_run(run, tmp_path)
    assert "overview-toy" in draw_run(tmp_path).read_text()


def test_a_step_of_the_timeline_that_did_not_happen_stands_under_the_figures() -> None:
    run = example()
    done = {"at_s": 1.0, "event": "set_link", "planned_s": 1.0, "model": "toy"}
    failed = {"at_s": 2.0, "event": "cut_stream", "planned_s": 2.0, "model": "toy", "failed": "no stream"}
    late = {
        "at_s": 9.0,
        "event": "kill",
        "planned_s": 8.5,
        "model": "toy",
        "skipped": "the load ended before it",
    }
    run.repetitions[0].events += [EventRow.model_validate(row) for row in (done, failed, late)]
    told = [line for line in summary_lines(run) if "not done" in line]
    assert told == [
        "  not done: cut_stream at 2 s: no stream",
        "  not done: kill at 8.5 s: the load ended before it",
    ]
    assert not [line for line in summary_lines(example()) if "not done" in line]


def test_two_runs_stand_side_by_side() -> None:
    slow = example()
    for row in slow.repetitions[0].requests:
        row.ttft_s = 2 * (row.ttft_s or 0)
    lines = compare_lines(example(), slow)
    (ttft,) = [line.split() for line in lines if line.strip().startswith("ttft_p50_s")]
    assert ttft[-1] == "2.000"
    strangers = example(repetitions=[], baseline=[])
    with pytest.raises(UsageError, match=r"nothing to compare: .* A has toy, B has none"):
        compare_lines(example(), strangers)


def test_check_says_what_the_rows_say_whatever_the_file_claims(tmp_path: Path, capsys: Any) -> None:
    run = example()
    run.repetitions[0].requests[0].__pydantic_extra__["output_ids"] = [99]  # type: ignore[index]
    run.checks = [CheckRow(name="tokens_equal_share", outcome="passed", value=1, wanted=">= 1")]
    write_run(run, tmp_path)
    assert read_run(tmp_path).checks[0].outcome == "passed"
    assert main(["check", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "FAIL  tokens_equal_share" in captured.out
    assert "the run says passed, its rows say failed" in captured.err


def test_check_of_a_record_without_a_definition_shows_what_its_own_command_judged(
    tmp_path: Path, capsys: Any
) -> None:
    rows = [CheckRow(name=name, outcome=name, value=1, wanted="> 0") for name in ("passed", "failed")]
    write_run(example(definition={}, checks=rows), tmp_path)
    assert main(["check", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "FAIL  failed" in captured.out
    assert "as its own command wrote them" in captured.err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"event": "hostile", "kind": "corrupt_payload"}, "hostile corrupt payload"),
        ({"event": "cross_traffic", "kind": "udp"}, "cross traffic udp"),
        ({"event": "cross_traffic_end", "kind": "udp"}, "cross traffic udp end"),
        ({"event": "kill", "instance": "decode", "what": "pump", "signal": "SIGKILL"}, "kill decode's pump"),
        ({"event": "kill_end", "instance": "decode", "what": "server"}, "kill decode end"),
        ({"event": "kill", "instance": "decode", "what": "server", "signal": "SIGSTOP"}, "freeze decode"),
        ({"event": "kill_end", "instance": "decode", "signal": "SIGCONT"}, "freeze decode end"),
        ({"event": "link_down", "link": "a->b"}, "link down"),
        (
            {"event": "set_link", "link": "a->b", "change": {"rate_mbps": 10.0, "loss_percent": 2.0}},
            "a->b rate mbps 10, loss percent 2",
        ),
        (
            {"event": "set_link_end", "link": "a->b", "change": {"bursty_loss": {"enter_percent": 1}}},
            "a->b bursty loss end",
        ),
    ],
)
def test_an_event_is_marked_by_its_kind(fields: dict[str, Any], words: str) -> None:
    assert label_of(EventRow.model_validate({"at_s": 1.0, **fields})) == words


def test_a_capacity_search_shows_every_trial_and_where_the_capacity_lies(tmp_path: Path) -> None:
    trials = [(6.0, 1.0), (9.0, 0.95), (13.5, 0.3), (9.0, 0.91)]
    events = [
        {
            "at_s": 0.0, "event": "capacity", "model": "toy", "rate_rps": rate, "slo_share": share,
            "held_rps": 9.0, "broken_rps": 13.5,
        }
        for rate, share in trials
    ]  # fmt: skip
    base = example()
    base.repetitions[0].events += [EventRow.model_validate(row) for row in events]
    draw_trials(base, tmp_path, None, "toy", "capacity-toy")
    drawn = (tmp_path / "capacity-toy.csv").read_text().split()
    assert drawn == ["rate_rps,slo_share", *(f"{rate},{share}" for rate, share in trials)]
    assert "capacity: 9 to 13.5 requests/s" in (tmp_path / "capacity-toy.svg").read_text()


def test_a_run_that_searched_for_no_capacity_has_no_such_picture(tmp_path: Path) -> None:
    assert draw_trials(example(), tmp_path, None, "toy", "capacity-toy") == []
    assert not list(tmp_path.iterdir())


def test_of_many_links_the_busiest_are_drawn_wherever_they_stand_and_each_in_one_colour() -> None:
    def row(place: int, sent: int) -> LinkRow:
        values = {"at_s": 0.1, "drops": 0, "backlog_bytes": 0, "bytes": sent}
        return LinkRow.model_validate({**values, "link": f"a->n{place}", "direction": f"a->n{place}"})

    busy = {12: 9000, 1: 5000, 11: 3000}
    rows = [row(place, busy.get(place, 1)) for place in range(13)]
    assert busiest_links(rows) == ["a->n1", "a->n11", "a->n12"]
    assert len(busiest_links([row(place, 1000 + place) for place in range(13)])) == K_MOST_LINKS
    assert busiest_links([]) == []


def test_a_prompt_that_was_prefilled_where_it_is_decoded_is_not_drawn_as_one_from_elsewhere(
    tmp_path: Path,
) -> None:
    run = example()
    run.repetitions[0].requests[0].__pydantic_extra__["transfer"] = "local"  # type: ignore[index]
    draw_figures(run, tmp_path)
    lines = (tmp_path / "ttft.csv").read_text().splitlines()
    assert sum("prefill and decode here" in line for line in lines) == 1
    assert sum("prefill elsewhere, decode here" in line for line in lines) == 5


def test_what_is_counted_though_the_emulator_spoilt_it_is_said_so(tmp_path: Path) -> None:
    run = example()
    assert "spoilt" not in "\n".join(summary_lines(run))
    late = {"event": "watch", "lag_p99_ms": 2.5, "lag_max_ms": 9, "unplanned_drops": 0, "spoilt": True}
    late |= {"at_s": 3.0, "reasons": ["timers lagged"], "model": "toy"}
    run.repetitions[0].events.append(EventRow.model_validate(late))
    assert "1 of 2 passes counted though the emulator spoilt them, the first: timers lagged" in "\n".join(
        summary_lines(run)
    )
    write_run(run, tmp_path)
    assert "<b>spoilt, and counted all the same</b>: timers lagged" in draw_run(tmp_path).read_text()


def test_a_network_that_is_not_as_asked_for_is_said_so_after_its_second_calibration(tmp_path: Path) -> None:
    row = {"wanted_rtt_ms": 20, "measured_rtt_ms": 25, "wanted_rate_mbps": 1, "measured_rate_mbps": 1}
    row |= {"wanted_loss": 0, "measured_loss": 0, "packets": 100}
    rows = [("a->b", False), ("b->a", False), ("a->b", True)]
    found = [
        {**row, "link": direction, "direction": direction, "inside": inside} for direction, inside in rows
    ]
    lines = summary_lines(example(calibration=found))
    assert [line.strip() for line in lines if "calibration" in line] == ["b->a is outside its calibration"]
