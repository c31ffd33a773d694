"""What is read from iperf3's reports."""

from __future__ import annotations

import pytest

from prfaas_testbed.bench.cell import NAMED_CELLS, Cell
from prfaas_testbed.bench.engines.iperf3 import _sample
from prfaas_testbed.bench.worker import WorkerError

RECEIVED = {
    "end": {
        "sum_received": {"bytes": 1_000_000, "seconds": 2.0, "bits_per_second": 4e6},
        "cpu_utilization_percent": {"host_total": 10.0},
        "receiver_tcp_congestion": "cubic",
    }
}
SENT = {
    "intervals": [
        {"sum": {"retransmits": 9, "omitted": True}},
        {"sum": {"retransmits": 2, "omitted": False}},
    ],
    "end": {"cpu_utilization_percent": {"host_total": 20.0}},
}


def test_goodput_is_the_receivers_word_and_omitted_seconds_do_not_count() -> None:
    sample = _sample(RECEIVED, SENT)
    assert sample.goodput_mbps == 4
    assert sample.retransmits == 2
    assert sample.cpu_s == pytest.approx(0.6)


def test_a_sender_that_lost_its_results_leaves_the_receivers_figure() -> None:
    sample = _sample(RECEIVED, {"end": {}, "error": "unable to receive results"})
    assert sample.goodput_mbps == 4
    assert sample.cpu_s is None


def test_nothing_arrived_is_an_error() -> None:
    with pytest.raises(WorkerError, match="reset"):
        _sample({"end": {}}, {"end": {}, "error": "connection reset"})


def test_it_runs_as_long_as_the_cells_bytes_take_within_the_limit() -> None:
    assert NAMED_CELLS["wan-clean"].steady_s(8.0) == pytest.approx(6.0)
    assert NAMED_CELLS["wan-clean"].steady_s(4.0) == 4.0
    assert Cell().steady_s(8.0) == 5.0


def test_the_seconds_left_out_count_in_the_whole() -> None:
    intervals = [
        {"sum": {"bytes": 250_000, "seconds": 1.0, "omitted": True}},
        {"sum": {"bytes": 1_000_000, "seconds": 2.0, "omitted": False}},
    ]
    sample = _sample({**RECEIVED, "intervals": intervals}, SENT)
    assert sample.goodput_mbps == 4
    assert sample.extra["whole_mbps"] == pytest.approx(1_250_000 * 8e-6 / 3, abs=1e-3)
