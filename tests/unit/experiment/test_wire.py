"""Metrics that compare what was captured, carried or done with what was meant to be."""

from __future__ import annotations

from typing import Any

import pytest

from prfaas.config.run import EventRow, LinkRow, Repetition, Run
from prfaas_testbed.experiment.metrics import K_METRICS, Unsupported
from prfaas_testbed.experiment.view import View
from prfaas_testbed.experiment.wire import pairs, partial


def view(*repetitions: Repetition) -> View:
    run = Run.model_validate(
        {"experiment": "e", "commit": "0" * 40, "started": "2026-01-01T00:00:00Z", "versions": {},
         "machine": {}, "emulation": "appliance"}
    )  # fmt: skip
    run.repetitions = list(repetitions)
    return View(run)


def event(name: str, at_s: float, **fields: Any) -> EventRow:
    return EventRow.model_validate({"at_s": at_s, "event": name, "model": "m", **fields})


@pytest.mark.parametrize(("until_s", "gap"), [(40.0, 0.05), (30.0, None)])
def test_a_capture_that_ended_before_its_load_is_compared_with_nothing(
    until_s: float, gap: float | None
) -> None:
    packets = event("packets", 41.0, site="east", payload_bytes=1_900_000, until_s=until_s)
    account = event("accounting", 36.0, site="east", stream_bytes=2_000_000)
    seen = view(Repetition(index=0, events=[packets, account]))
    measure = K_METRICS["wire_bytes_gap_share"].compute
    if gap is None:
        with pytest.raises(Unsupported, match="the capture ended at 30 s, the load at 36 s"):
            measure(seen)
    else:
        assert measure(seen) == pytest.approx(gap)


@pytest.mark.parametrize(
    ("fate", "told"),
    [
        ({"until_s": 30.0, "truncated": ["east"]}, "ended at 30 s because it held its most packets"),
        ({"until_s": 40.0, "missed_packets": 7}, "the capture missed 7 packets"),
        ({"until_s": 40.0}, None),
    ],
)
def test_a_capture_that_lacks_packets_says_so_and_is_compared_with_nothing(
    fate: dict[str, Any], told: str | None
) -> None:
    packets = event("packets", 41.0, site="east", payload_bytes=1_900_000, **fate)
    account = event("accounting", 36.0, site="east", stream_bytes=2_000_000)
    seen = view(Repetition(index=0, events=[packets, account]))
    ((_, _),) = pairs(seen)
    if told is None:
        assert partial(packets, account) is None
        return
    with pytest.raises(Unsupported, match=told):
        K_METRICS["wire_bytes_gap_share"].compute(seen)


def test_packets_are_not_held_against_a_pump_that_was_started_again() -> None:
    packets = event("packets", 41.0, site="east", payload_bytes=1_900_000, until_s=40.0)
    account = event("accounting", 36.0, site="east", started_again=True, stream_bytes=None)
    with pytest.raises(Unsupported, match="started again"):
        K_METRICS["wire_bytes_gap_share"].compute(view(Repetition(index=0, events=[packets, account])))


def test_more_repetitions_make_no_link_busier() -> None:
    def repetition(index: int, megabytes: int) -> Repetition:
        row = {
            "link": "a->b",
            "direction": "a->b",
            "bytes": megabytes * 1_000_000,
            "drops": 0,
            "backlog_bytes": 0,
        }
        rows = [LinkRow.model_validate({**row, "at_s": float(at_s)}) for at_s in range(1, 9)]
        return Repetition(index=index, links=rows)

    busy = K_METRICS["busy_mbps"].compute
    assert busy(view(repetition(0, 10))) == pytest.approx(80)
    assert busy(view(repetition(0, 10), repetition(1, 10), repetition(2, 5))) == pytest.approx(40)


def test_trouble_that_failed_or_that_the_load_did_not_wait_for_is_counted() -> None:
    events = [
        event("flap", 2.0), event("flap", 6.0, skipped="the load ended before it"),
        event("kill", 3.0, failed="it didn't start"),
    ]  # fmt: skip
    measure = K_METRICS["events_missed"].compute
    with pytest.raises(Unsupported, match="no load ran"):
        measure(view(Repetition(index=0, events=events)))
    assert measure(view(Repetition(index=0, events=[*events, event("load", 0.0)]))) == 2


def test_a_packet_that_a_link_dropped_counts_whatever_the_reason() -> None:
    row = {"at_s": 1.0, "link": "a->b", "direction": "a->b", "bytes": 1, "backlog_bytes": 0}
    links = [LinkRow.model_validate({**row, "drops": drops}) for drops in (0, 3, 1)]
    drops = K_METRICS["link_drop_share"].compute
    with pytest.raises(Unsupported, match="watched"):
        drops(view(Repetition(index=0, links=links)))
    assert drops(view(Repetition(index=0, links=links, events=[event("watch", 2.0, packets=400)]))) == 0.01
