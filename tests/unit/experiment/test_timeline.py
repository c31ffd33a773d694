"""What the timeline records of the trouble that it makes."""

from __future__ import annotations

import datetime
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from prfaas.config.experiment import CrossTraffic, Experiment, Kill, ReplaceCertificate
from prfaas.config.run import EventRow
from prfaas.pump import keys
from prfaas_testbed.experiment.timeline import Timeline
from prfaas_testbed.experiment.view import field, number

EVENTS: list[dict[str, Any]] = [
    {"do": "kill", "at_s": 0.0, "instance": "p", "restart_after_s": 0.05},
    {"do": "kill", "at_s": 0.02, "instance": "d", "what": "pump", "restart_after_s": 0.05},
    {"do": "kill", "at_s": 60.0, "instance": "d"},
]


class Server:
    """Takes its time to be ready, as a real one does."""

    pid = None

    def __init__(self) -> None:
        self.said: list[str] = []
        self.gone, self.back = threading.Event(), threading.Event()

    def kill(self) -> None:
        self.said.append("kill")
        self.gone.set()

    def start(self) -> None:
        self.said.append("start")

    def wait_ready(self, progress: Any) -> None:
        self.said.append("ready")
        self.back.set()


def rows_of() -> tuple[list[EventRow], Server, Server]:
    experiment = Experiment.model_validate(
        {
            "name": "e", "description": "d", "wall_time_s": 60, "network": "hello",
            "models": [{"name": "toy", "profile": "toy"}],
            "instances": [
                {"name": "p", "site": "east", "role": "prefill"},
                {"name": "d", "site": "west", "role": "decode"},
            ],
            "workload": {
                "kind": "synthetic", "arrivals": {"process": "at_once"}, "requests": 1,
                "input_tokens": {"distribution": "uniform", "min": 1, "max": 2}, "output_tokens": 1,
            },
            "timeline": EVENTS,
        }
    )  # fmt: skip
    server, pump = Server(), Server()
    places = {
        "p": SimpleNamespace(site="east", process=server),
        "d": SimpleNamespace(site="west", process=server),
    }
    fleet = SimpleNamespace(
        named=places.__getitem__, pumps={"west": pump}, given_up=set(),
        control_socket=lambda site: Path("/run/nobody.sock"),
    )  # fmt: skip
    net = SimpleNamespace(prepare_changes=lambda changes: None, check_links=lambda: None)
    timeline = Timeline(experiment.timeline, net, fleet)  # type: ignore[arg-type]
    timeline.prepare()
    timeline.start(time.monotonic())
    assert server.back.wait(10)
    assert pump.back.wait(10)
    return timeline.finish(), server, pump


def test_kills_and_restarts_are_told_with_their_distance_from_the_plan_and_what_they_took() -> None:
    rows, server, pump = rows_of()
    assert server.said == pump.said == ["kill", "start", "ready"]
    done = [row for row in rows if field(row, "skipped") is None]
    assert [(row.event, field(row, "what")) for row in done] == [
        ("kill", "server"), ("kill", "pump"), ("kill_end", "server"), ("kill_end", "pump"),
    ]  # fmt: skip
    assert all((number(row, "lag_ms") or 0) >= 0 for row in done)
    assert all(field(row, "signal") == "SIGKILL" and number(row, "dead_ms") is not None for row in done[:2])
    assert all(number(row, "ready_s") is not None for row in done[2:])


def test_what_the_load_did_not_wait_for_has_no_distance() -> None:
    rows, _, _ = rows_of()
    (skipped,) = [row for row in rows if field(row, "skipped")]
    assert number(skipped, "planned_s") == 60
    assert number(skipped, "lag_ms") is None


def test_a_certificate_that_nobody_trusts_is_gone_with_the_load_and_can_come_again(tmp_path: Path) -> None:
    """As when a void repetition is run again."""
    folder, now = tmp_path / "keys" / "east", datetime.datetime.now(datetime.UTC)
    keys.create_site(folder, "east", days=2, authority_days=4, now=now)
    authority = x509.load_pem_x509_certificate((folder / keys.K_AUTHORITY_CERTIFICATE).read_bytes())

    def is_trusted() -> bool:
        try:
            x509.load_pem_x509_certificate(
                (folder / keys.K_SITE_FILE).read_bytes()
            ).verify_directly_issued_by(authority)
        except InvalidSignature:
            return False
        return True

    replaced = ReplaceCertificate(do="replace_certificate", at_s=0.0, site="east", trusted=False)
    fleet = SimpleNamespace(folder=tmp_path)
    net = SimpleNamespace(prepare_changes=lambda changes: None, check_links=lambda: None)
    for _ in range(2):
        timeline = Timeline([replaced], net, fleet)  # type: ignore[arg-type]
        timeline.start(time.monotonic())
        end_s = time.monotonic() + 10
        while is_trusted():
            assert time.monotonic() < end_s, "it was never replaced"
        (row,) = timeline.finish()
        assert field(row, "failed") is None
        assert is_trusted()
    assert sorted(one.name for one in (tmp_path / "keys").iterdir()) == ["east"]


K_REPORT_S = 3.0


class Traffic:
    """Cross-traffic as the timeline takes it, whose report takes its time; by a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.begun_s: float | None = None
        self.ended_early, self.stopped = False, threading.Event()
        self.stops = 0

    def begin(self) -> None:
        self.begun_s = self.now_s

    def stop(self) -> dict[str, Any]:
        self.stops += 1
        self.now_s += K_REPORT_S
        self.stopped.set()
        return {"seconds": 1.0, "mbps": 7.5, "error": None}


def crossed(at_s: float, waits: bool) -> tuple[list[EventRow], Traffic]:
    """`waits`: the load lasts until the traffic has ended."""
    event = CrossTraffic(do="cross_traffic", at_s=at_s, source="a", target="b", for_s=0.05)
    traffic = Traffic()
    net = SimpleNamespace(prepare_changes=lambda links: None, prepare_traffic=lambda *words: traffic)
    timeline = Timeline([event], net, SimpleNamespace(), now=lambda: traffic.now_s)  # type: ignore[arg-type]
    timeline.prepare()
    timeline.start(traffic.now_s)
    assert not waits or traffic.stopped.wait(10)
    return timeline.finish(), traffic


def test_cross_traffic_ends_when_it_is_told_to_and_not_when_its_report_has_come() -> None:
    rows, traffic = crossed(0.0, waits=True)
    assert [row.event for row in rows] == ["cross_traffic", "cross_traffic_end"]
    assert field(rows[1], "mbps") == 7.5
    assert rows[1].at_s < K_REPORT_S
    assert field(rows[1], "early") is None
    assert traffic.stops == 1


def test_cross_traffic_that_the_load_did_not_wait_for_is_skipped_and_its_receiver_gone() -> None:
    rows, traffic = crossed(60.0, waits=False)
    assert all(field(row, "skipped") for row in rows)
    assert traffic.begun_s is None
    assert traffic.stops == 1


class Slow(Traffic):
    """It takes its time to begin."""

    def __init__(self) -> None:
        super().__init__()
        self.beginning = threading.Event()
        self.stopped_early = False

    def begin(self) -> None:
        self.beginning.set()
        self.stopped_early = self.stopped.wait(0.2)
        super().begin()


def test_cross_traffic_that_begins_as_the_load_ends_is_stopped_after_it_has_begun() -> None:
    """Stopped before, it would run on beside all that comes later."""
    traffic = Slow()
    event = CrossTraffic(do="cross_traffic", at_s=0.0, source="a", target="b", for_s=60.0)
    net = SimpleNamespace(prepare_changes=lambda links: None, prepare_traffic=lambda *words: traffic)
    timeline = Timeline([event], net, SimpleNamespace(), now=lambda: traffic.now_s)  # type: ignore[arg-type]
    timeline.prepare()
    timeline.start(traffic.now_s)
    assert traffic.beginning.wait(10)
    rows = timeline.finish()
    assert not traffic.stopped_early
    assert [(row.event, field(row, "skipped")) for row in rows] == [
        ("cross_traffic", None), ("cross_traffic_end", None),
    ]  # fmt: skip
    # Its end was the load's: it came a minute before its time, and that is no lag.
    assert field(rows[1], "early")
    assert number(rows[1], "lag_ms") is None


def test_an_abandoned_timeline_brings_nobody_back_and_waits_for_nothing() -> None:
    server = Server()
    fleet = SimpleNamespace(named=lambda name: SimpleNamespace(site="east", process=server))
    event = Kill(do="kill", at_s=0.0, instance="p", restart_after_s=30.0)
    timeline = Timeline([event], SimpleNamespace(prepare_changes=lambda links: None), fleet)  # type: ignore[arg-type]
    timeline.prepare()
    began_s = time.monotonic()
    timeline.start(began_s)
    assert server.gone.wait(10)
    timeline.abandon()
    assert server.said == ["kill"]
    assert time.monotonic() < began_s + 15
