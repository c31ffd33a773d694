import pytest

from prfaas.config.topology import Impairments
from prfaas_testbed.network.calibrate import (
    Calibration,
    judge_loss,
    judge_rtt,
    probe_size,
    rate_stack,
    verdict,
)
from prfaas_testbed.network.probe import summary

ROW = Calibration(link="a-b", direction="a->b", path=["a->b"], wanted_rtt_ms=40)
LINK = [Impairments(delay_ms=20, rate_mbps=200, loss_percent=0.1)]
BOTH = [*LINK, *LINK]


def probe(sent: int, lost: int, bursts: int = 0) -> dict[str, object]:
    return {"complete": True, "sent": sent, "lost": lost, "bursts": bursts, "delay_ms": 20.1}


def test_the_router_s_own_delay_is_taken_off_the_rtt() -> None:
    times = {"gateway a": [0.1, 0.1], "gateway b": [0.12], "a": [40.3], "b": [40.3]}
    row = judge_rtt(ROW, [40.3, 40.2, 40.4], times, BOTH)
    assert row.inside
    assert row.measured_rtt_ms == pytest.approx(40.08)
    assert row.router_rtt_ms == pytest.approx(0.22)


@pytest.mark.parametrize("rtt_ms", [38.9, 41.5])
def test_an_rtt_beyond_two_percent_misses_and_says_by_how_much(rtt_ms: float) -> None:
    row = judge_rtt(ROW, [rtt_ms], {"gateway a": [0.1], "gateway b": [0.1]}, BOTH)
    assert not row.inside
    assert "wanted 40 ± 0.80 ms" in row.misses[0]


def test_no_answer_to_pings_misses() -> None:
    assert judge_rtt(ROW, [], {"gateway a": [0.1], "gateway b": [0.1]}, BOTH).misses == ["no answer to pings"]


@pytest.mark.parametrize(("lost", "inside"), [(7, True), (20, True), (36, True), (6, False), (37, False)])
def test_loss_is_held_to_its_interval_at_both_ends(lost: int, inside: bool) -> None:
    assert judge_loss(ROW, probe(20_000, lost), LINK).inside is inside


def test_bursty_loss_is_held_to_its_burst_length_as_well() -> None:
    link = [Impairments.model_validate({"bursty_loss": {"enter_percent": 0.5, "leave_percent": 25}})]
    wanted = round(20_000 * link[0].mean_loss)
    assert judge_loss(ROW, probe(20_000, wanted, wanted // 4), link).inside
    single = judge_loss(ROW, probe(20_000, wanted, wanted), link)
    assert "bursts of 1.00 packets" in single.misses[0]


def test_a_probe_whose_end_never_came_misses() -> None:
    row = judge_loss(ROW, {"complete": False, "sent": 5, "lost": 0}, LINK)
    assert row.misses == ["loss: the probe's end never came"]


def test_a_probe_takes_a_small_share_of_a_thin_line() -> None:
    per_s, packets = probe_size([Impairments(rate_mbps=1)])
    assert per_s * 242 * 8 <= 0.31e6
    assert packets >= 500


def test_udp_measures_slow_or_lossy_lines_and_bbr_fast_ones() -> None:
    assert rate_stack(200, 0.001, ["cubic", "bbr"]) == "bbr"
    assert rate_stack(200, 0.001, ["cubic"]) == "udp"
    assert rate_stack(200, 0.05, ["cubic", "bbr"]) == "udp"
    assert rate_stack(50, 0.001, ["cubic", "bbr"]) == "udp"


def test_the_last_attempt_of_a_direction_counts() -> None:
    missed = Calibration("a-b", "a->b", ["a->b"], 40, misses=["rate"])
    again = Calibration("a-b", "a->b", ["a->b"], 40, attempt=2)
    assert verdict([missed, again]) == []
    assert verdict([again, missed]) == ["a->b: rate"]


def test_gaps_repeats_and_latecomers_are_told_apart() -> None:
    found = summary([0, 1, 4, 5, 5, 3, 9], [100, 300, 200], sent=12)
    assert (found["received"], found["lost"], found["bursts"]) == (6, 6, 3)
    assert (found["duplicates"], found["out_of_order"]) == (1, 1)
    assert found["delay_ms"] == 0.2
    assert summary([], [], sent=3)["lost"] == 3
