"""Trouble with servers, streams and certificates while requests are served: each event happens, at its time,
and does what it says.

One load, since a network takes seconds to make: a certificate is replaced and a stream cut, so that the next
is opened with the new one; a server stops and goes on; a server dies and comes back; then a site gets a
certificate that nobody trusts, and its pump starts with it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from prfaas.config.run import EventRow, Repetition, RequestRow, read_run
from prfaas_testbed.experiment.view import field, number

RUN = [sys.executable, "-m", "prfaas_testbed.cli.main", "run"]
K_RPS, K_LOAD_S, K_LIMIT_S = 4, 19, 4.0
K_STRANGER_S = 15.0
K_LAG_MS = 1000.0  # 50 ms is what is wanted of a machine that does nothing else
TIMELINE = [
    {"do": "replace_certificate", "at_s": 1, "site": "east"},
    {"do": "cut_stream", "at_s": 1.5, "source": "east", "target": "west", "streams": 1},
    {"do": "kill", "at_s": 4, "instance": "decode", "signal": "freeze", "restart_after_s": 1},
    {"do": "kill", "at_s": 7, "instance": "prefill", "restart_after_s": 0.5},
    {"do": "replace_certificate", "at_s": K_STRANGER_S, "site": "east", "trusted": False},
    {"do": "kill", "at_s": K_STRANGER_S + 0.2, "instance": "prefill", "what": "pump", "restart_after_s": 0.3},
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, hello: Callable[[Path], dict[str, Any]]) -> Repetition:
    folder = tmp_path_factory.mktemp("events")
    data = hello(folder)
    del data["baseline"]
    data |= {"name": "events", "timeline": TIMELINE, "request_timeout_s": K_LIMIT_S}
    data["workload"] |= {
        "arrivals": {"process": "paced", "rate_rps": K_RPS},
        # Long enough for a stream to be found with bytes on it.
        "input_tokens": {"distribution": "uniform", "min": 512, "max": 1024},
        "requests": K_RPS * K_LOAD_S,
    }
    # What fails here is meant to: the tests below say what must, and what must not.
    data["checks"] = [{"name": "lost", "at_most": 0}]
    path = folder / "events.yaml"
    path.write_text(yaml.safe_dump(data))
    done = subprocess.run(
        [*RUN, str(path), "--out", str(folder), "--wait", "60"],
        capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = (folder / "events").iterdir()
    return read_run(found).repetitions[0]


pytestmark = pytest.mark.timeout(180)


def of(served: Repetition, name: str, what: str | None = None, signal: str | None = None) -> EventRow:
    (row,) = [
        row
        for row in served.events
        if row.event == name and what in (None, field(row, "what")) and signal in (None, field(row, "signal"))
    ]
    return row


def sent(served: Repetition, after_s: float, before_s: float) -> list[RequestRow]:
    found = [row for row in served.requests if after_s < row.sent_s < before_s]
    assert found, f"no request was sent between {after_s:g} and {before_s:g} s"
    return found


def test_every_event_happened_about_when_it_was_to(served: Repetition) -> None:
    planned = [row for row in served.events if number(row, "planned_s") is not None]
    assert len(planned) == len(TIMELINE) + 3  # the three kills have an end
    assert not [row for row in planned if field(row, "failed") or field(row, "skipped")]
    lags = [number(row, "lag_ms") for row in planned]
    sys.stderr.write(f"lags of the timeline, ms: {lags}\n")
    assert all(lag is not None and -1 < lag < K_LAG_MS for lag in lags)


def test_a_stream_that_is_cut_is_opened_again_with_the_new_certificate_and_costs_no_answer(
    served: Repetition,
) -> None:
    cut = of(served, "cut_stream")
    assert number(cut, "streams") == 1
    assert [row.error for row in sent(served, 0, 3.5)] == [None] * len(sent(served, 0, 3.5))


def test_a_server_that_stands_still_answers_when_it_goes_on(served: Repetition) -> None:
    stopped = of(served, "kill", signal="SIGSTOP")
    thawed = of(served, "kill_end", signal="SIGCONT")
    waiting = sent(served, stopped.at_s, thawed.at_s - 0.1)
    assert all(row.error is None for row in waiting)
    # By the load's clock no first token came before it went on.
    assert all(row.sent_s + (row.ttft_s or 0) > thawed.at_s - 0.01 for row in waiting)


def test_a_server_that_is_killed_answers_nothing_until_it_is_started_again(served: Repetition) -> None:
    killed = of(served, "kill", what="server", signal="SIGKILL")
    back = next(
        row for row in served.events if row.event == "kill_end" and number(row, "ready_s") is not None
    )
    assert field(back, "what") == "server"
    assert all(row.error for row in sent(served, killed.at_s + 0.05, back.at_s))
    ready_s = back.at_s + (number(back, "ready_s") or 0)
    after = [row for row in served.requests if ready_s + 0.5 < row.sent_s < K_STRANGER_S - 1]
    assert [row.error for row in after] == [None] * len(after)


def test_a_site_whose_certificate_nobody_trusts_moves_nothing(served: Repetition) -> None:
    killed = of(served, "kill", what="pump")
    assert field(killed, "signal") == "SIGKILL"
    late = sent(served, killed.at_s + 0.1, K_LOAD_S)
    assert all(row.error for row in late)
    assert not any(row.kv_bytes for row in late)
