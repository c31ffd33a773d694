import re

import pytest

from prfaas.config.topology import Impairments
from prfaas_testbed.network.tc import burst_bytes, differences, limit_bytes, qdisc_commands


def words(state: Impairments, number: int) -> str:
    return " ".join(qdisc_commands("to-west", state)[number])


def test_a_plain_link_is_netem_over_a_bucket_whose_queue_is_a_round_trip() -> None:
    state = Impairments(delay_ms=20, rate_mbps=200, loss_percent=0.1)
    assert words(state, 0) == (
        "qdisc add dev to-west root handle 1: netem limit 200000 delay 20000us loss random 0.1% "
        "corrupt 0% duplicate 0% reorder 0% rate 0bit"
    )
    assert words(state, 1) == (
        "qdisc add dev to-west parent 1:1 handle 2: tbf rate 200000000bit burst 75000b limit 1000000b"
    )
    assert len(qdisc_commands("to-west", state)) == 2


def test_all_that_netem_can_do_is_said_at_once() -> None:
    state = Impairments.model_validate(
        {
            "delay_ms": 85,
            "jitter_ms": 1.5,
            "jitter_distribution": "pareto",
            "bursty_loss": {
                "enter_percent": 0.02,
                "leave_percent": 25,
                "loss_percent": 90,
                "good_loss_percent": 0.1,
            },
            "corrupt_percent": 0.5,
            "duplicate_percent": 0.25,
            "reorder_percent": 3,
        }
    )
    line = words(state, 0)
    assert "delay 85000us 1500us distribution pareto" in line
    assert "loss gemodel 0.02% 25% 90% 0.1%" in line
    assert "corrupt 0.5% duplicate 0.25% reorder 3%" in line


def test_jitter_keeps_packets_in_order_by_giving_netem_a_rate() -> None:
    assert words(Impairments(delay_ms=10), 0).endswith("rate 0bit")
    assert words(Impairments(delay_ms=10, jitter_ms=1), 0).endswith("rate 32000000000bit")


def test_down_loses_every_packet_and_keeps_the_rest() -> None:
    line = words(Impairments(delay_ms=10, loss_percent=1, down=True), 0)
    assert "loss random 100%" in line
    assert "delay 10000us" in line


def test_a_queue_in_packets_is_a_fifo_of_packets() -> None:
    state = Impairments(delay_ms=15, rate_mbps=10, queue_packets=25)
    assert words(state, 2) == "qdisc add dev to-west parent 2:1 handle 3: pfifo limit 25"


def test_ecn_marks_in_a_red_queue_within_the_limit() -> None:
    line = words(Impairments(delay_ms=15, rate_mbps=10, queue_bytes=200_000, ecn=True), 2)
    assert "red limit 200000b min 50000b max 150000b" in line
    assert line.endswith("ecn")


def test_red_of_a_queue_of_few_frames_has_room_between_its_thresholds() -> None:
    line = words(Impairments(delay_ms=15, rate_mbps=10, queue_bytes=2_000, ecn=True), 2)
    found = re.search(r"red limit (\d+)b min (\d+)b max (\d+)b", line)
    assert found is not None
    limit, low, high = map(int, found.groups())
    assert low >= 1514  # a full frame
    assert 2 * low <= high <= limit


def test_a_change_addresses_the_same_disciplines() -> None:
    first, second = qdisc_commands("to-west", Impairments(delay_ms=5, rate_mbps=5), "change")
    assert first[:6] == ["qdisc", "change", "dev", "to-west", "root", "handle"]
    assert second[:7] == ["qdisc", "change", "dev", "to-west", "parent", "1:1", "handle"]


@pytest.mark.parametrize("rate_mbps", [0.05, 1, 200, None])
def test_the_bucket_always_holds_two_frames_and_its_queue_at_least_as_much(rate_mbps: float | None) -> None:
    state = Impairments(rate_mbps=rate_mbps, mtu_bytes=9000, queue_bytes=1500)
    assert burst_bytes(state) >= 2 * 9014
    assert limit_bytes(state) >= 2 * 9014


def shown(**netem: object) -> list[dict[str, object]]:
    options = {
        "limit": 200000,
        "delay": {"delay": 0.02, "jitter": 0},
        "loss-random": {"loss": 0.001},
        **netem,
    }
    return [
        {"kind": "netem", "handle": "1:", "options": options},
        {"kind": "tbf", "handle": "2:", "options": {"rate": 25000000, "burst": 75000}},
    ]


def test_what_tc_shows_of_the_wanted_link_is_no_difference() -> None:
    assert differences(Impairments(delay_ms=20, rate_mbps=200, loss_percent=0.1), shown()) == []


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (Impairments(delay_ms=21, rate_mbps=200, loss_percent=0.1), "delay in s"),
        (Impairments(delay_ms=20, rate_mbps=100, loss_percent=0.1), "rate in bytes/s"),
        (Impairments(delay_ms=20, rate_mbps=200, loss_percent=0.2), "random loss"),
        (Impairments(delay_ms=20, rate_mbps=200, loss_percent=0.1, corrupt_percent=1), "corrupt"),
        (Impairments(delay_ms=20, rate_mbps=200, loss_percent=0.1, down=True), "random loss: wanted 1"),
        (Impairments(delay_ms=20, rate_mbps=200, loss_percent=0.1, queue_packets=9), "wanted pfifo"),
    ],
)
def test_each_difference_from_what_tc_shows_is_named(state: Impairments, said: str) -> None:
    assert any(said in line for line in differences(state, shown()))


def test_a_missing_discipline_is_a_difference() -> None:
    assert differences(Impairments(), []) == ["no netem at the root"]
    assert differences(Impairments(), shown()[:1]) == ["no token bucket below netem"]
