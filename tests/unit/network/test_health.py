import pytest

from prfaas_testbed.network.health import Health, judge
from prfaas_testbed.network.router import Sample


def samples(lag_ms: float, count: int = 50, waiting_bytes: int = 0) -> list[Sample]:
    return [Sample(0.1 * n, {}, (lag_ms, lag_ms), {}, waiting_bytes) for n in range(1, count)]


def health(rows: list[Sample], packets: int = 1_000_000, **drops: int) -> Health:
    return judge(seconds=5, samples=rows, began_s=0, ended_s=5, cpu_s=2, packets=packets, drops=drops)


def test_a_quiet_emulator_spoils_nothing() -> None:
    found = health(samples(0.2))
    assert not found.spoilt
    assert (found.lag_p99_ms, found.cpu_share, found.unplanned_drops) == (0.2, 0.4, {})


def test_timers_that_lag_two_milliseconds_spoil() -> None:
    assert "lagged 2.1 ms" in health(samples(2.1)).reasons[0]
    assert not health(samples(2.0)).spoilt


def test_one_unplanned_drop_in_a_hundred_thousand_is_forgiven_and_more_is_not() -> None:
    assert not health(samples(0.1), packets=100_000, sockets=1).spoilt
    found = health(samples(0.1), packets=100_000, sockets=2)
    assert "2 unplanned drops in 100000 packets (sockets 2)" in found.reasons[0]


def test_a_silent_emulator_spoils_even_though_no_lag_was_seen() -> None:
    assert "no counters for" in health([]).reasons[-1]


def test_an_emulator_whose_lag_was_hardly_seen_spoils_unless_the_time_was_short() -> None:
    """A kernel that stamps no probe, or one too busy to send them, isn't one whose timers are on time."""
    rows = [Sample(0.1 * n, {}, (), {}, 0) for n in range(1, 50)]
    assert health(rows).reasons == ["only 0 lags of the emulator's timers were seen in 5.0 s"]
    short = judge(seconds=2, samples=rows[:19], began_s=0, ended_s=2, cpu_s=1, packets=1, drops={})
    assert not short.spoilt


def test_packets_that_wait_for_the_emulator_spoil() -> None:
    assert health(samples(0.1, waiting_bytes=200_000)).spoilt


@pytest.mark.parametrize("key", ["lag_p99_ms", "cpu_share", "unplanned_drops", "spoilt", "reasons"])
def test_the_row_says_all_that_a_report_needs(key: str) -> None:
    assert key in health(samples(0.1)).as_row()
