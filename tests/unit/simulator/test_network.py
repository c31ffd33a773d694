from functools import partial
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.config.topology import LinkChange, Topology
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.flows import (
    K_FRAME_BYTES,
    K_MSS_BYTES,
    answered_late_s,
    further_rounds,
    repeated_late_s,
    standing_queue,
    stream_ceiling_bps,
)
from prfaas.simulator.network import K_DONE_BYTES, Network
from prfaas.simulator.pipes import Transfer

SHARE = K_MSS_BYTES / K_FRAME_BYTES


def topology(rate_mbps=80.0, delay_ms=0.0, **more) -> Topology:
    return Topology.model_validate(
        {
            "name": "unit",
            "text": "two sites",
            "sites": {"a": {}, "b": {}},
            "links": [{"between": ["a", "b"], "rate_mbps": rate_mbps, "delay_ms": delay_ms, **more}],
        }
    )


def world(**kw) -> tuple[Agenda, Network]:
    agenda = Agenda()
    return agenda, Network(topology(**kw), agenda)


def send(agenda, network, total, landed, at_s=0.0, deadline_s=1e9, ends=("a", "b")) -> Transfer:
    transfer = Transfer(total, deadline_s, landed)

    def go(now: float) -> None:
        network.start(*ends, transfer, now)
        network.supply(*ends, transfer, total, now)

    agenda.at(at_s, go)
    return transfer


def test_one_transfer_takes_its_size_over_the_rate_and_the_way() -> None:
    agenda, network = world(delay_ms=10)
    network.pipes["a", "b"].ever_busy = True  # warm
    seen = []
    send(agenda, network, 1_000_000 * SHARE, seen.append)
    agenda.run()
    assert seen == [pytest.approx(0.110, rel=1e-4)]


def test_cold_streams_gather_speed_over_some_round_trips() -> None:
    agenda, network = world(delay_ms=50)
    seen = []
    send(agenda, network, 10_000_000 * SHARE, seen.append)
    agenda.run()
    assert 1.05 + 0.05 < seen[0] < 1.05 + 0.5


def test_bytes_leave_as_they_become_available() -> None:
    agenda, network = world()
    seen = []
    transfer = Transfer(int(8_000_000 * SHARE), 1e9, seen.append)
    network.start("a", "b", transfer, 0.0)
    for i in range(4):
        at_s = 1.0 * (i + 1)
        agenda.at(
            at_s, lambda now, n=i + 1: network.supply("a", "b", transfer, transfer.total_bytes * n / 4, now)
        )
    agenda.run()
    assert seen == [pytest.approx(4.2, rel=1e-3)]  # the last quarter, 2 MB, after prefill's end


def test_a_small_transfer_does_not_wait_for_a_large_one_which_still_moves() -> None:
    agenda, network = world()
    seen = {}
    send(agenda, network, 100_000_000, lambda now: seen.__setitem__("large", now), deadline_s=1.0)
    send(agenda, network, 100_000, lambda now: seen.__setitem__("small", now), at_s=1.0, deadline_s=100.0)
    agenda.run()
    assert seen["small"] < 1.2
    assert seen["large"] == pytest.approx(100.1e6 / (10e6 * SHARE), rel=1e-2)


def cut(agenda: Agenda, network: Network, *times: float) -> None:
    """Down at the first, up at the second, and so on."""

    def change(down: bool, now: float) -> None:
        network.before_change(now)
        link = network.links["a->b"]
        link.state = link.state.changed(LinkChange(down=down))
        network.changed(now)

    for index, at_s in enumerate(times):
        agenda.at(at_s, partial(change, index % 2 == 0))


def test_a_dead_link_stops_everything_and_streams_go_on_where_they_were_once_they_find_it_back() -> None:
    agenda, network = world()
    seen = []
    send(agenda, network, 10_000_000 * SHARE, seen.append)
    cut(agenda, network, 0.5, 0.8)
    agenda.run()
    # Tried at 0.7, and 0.4 s later: half a second of sending was left.
    assert seen == [pytest.approx(1.1 + 0.5, rel=1e-4)]


def test_streams_that_were_replaced_gather_speed_anew() -> None:
    found = []
    for delay_ms in (1, 50):
        agenda, network = world(delay_ms=delay_ms)
        network.pipes["a", "b"].ever_busy = True  # warm
        send(agenda, network, 10_000_000 * SHARE, found.append)
        cut(agenda, network, 0.5, 2.5)
        agenda.run()
    near_s, far_s = found
    assert near_s == pytest.approx(0.5 + 1.55 + 1.0 + 0.5, abs=0.03)
    assert far_s > near_s + 3 * 0.1 + 0.05 + 3 * 0.1  # opened, on their way, and some windows


def test_a_link_that_dies_again_before_its_streams_found_it_back_keeps_them_waiting() -> None:
    agenda, network = world()
    seen = []
    send(agenda, network, 10_000_000 * SHARE, seen.append)
    cut(agenda, network, 0.5, 0.8, 0.9, 1.2)  # their try at 1.1 is lost as well; the next is at 1.9
    agenda.run()
    assert seen == [pytest.approx(1.9 + 0.5, rel=1e-4)]


def test_an_outage_that_nothing_was_sent_in_costs_nothing() -> None:
    agenda, network = world()
    seen = []
    cut(agenda, network, 0.5, 2.5)
    send(agenda, network, 10_000_000 * SHARE, seen.append, at_s=2.6)
    agenda.run()
    assert seen == [pytest.approx(3.6, rel=1e-4)]


def test_bytes_whose_acknowledgements_a_cut_swallows_leave_their_streams_waiting() -> None:
    agenda, network = world(delay_ms=50)
    network.pipes["a", "b"].ever_busy = True  # warm
    seen = []
    send(agenda, network, 1_000_000 * SHARE, seen.append)  # left by 0.1, there at 0.15
    cut(agenda, network, 0.12, 0.9)
    send(agenda, network, 1_000_000 * SHARE, seen.append, at_s=1.0)
    agenda.run()
    first_s, second_s = seen
    assert first_s == pytest.approx(0.15, rel=1e-3)
    assert second_s == pytest.approx(0.12 + 0.3 + 0.6 + 0.1 + 0.05, rel=1e-2)


def test_two_pipes_share_a_bottleneck_and_what_one_cannot_use_the_other_takes() -> None:
    shared = Topology.model_validate(
        {
            "name": "unit",
            "text": "two senders behind one line",
            "sites": {"a": {}, "b": {}, "c": {}},
            "hubs": ["h"],
            "links": [
                {"between": ["a", "h"], "rate_mbps": 20},
                {"between": ["b", "h"], "rate_mbps": 1000},
                {"between": ["h", "c"], "rate_mbps": 100},
            ],
        }
    )
    agenda = Agenda()
    network = Network(shared, agenda)
    send(agenda, network, 1e9, lambda now: None, ends=("a", "c"))
    send(agenda, network, 1e9, lambda now: None, ends=("b", "c"))
    agenda.run(2.0)
    rates = {ends: sum(pipe.rates.values()) * 8 / SHARE / 1e6 for ends, pipe in network.pipes.items()}
    assert rates["a", "c"] == pytest.approx(20)
    assert rates["b", "c"] == pytest.approx(80)


def test_a_stream_under_loss_carries_what_its_congestion_control_allows() -> None:
    # 40 ms and 0.1%: about 11 Mbit/s whatever the link; BBR repeats what was lost and goes on.
    assert stream_ceiling_bps(0.04, 0.001, "cubic", 200e6) == pytest.approx(11.2e6, rel=0.02)
    assert stream_ceiling_bps(0.04, 0.001, "bbr", 200e6) == pytest.approx(199.8e6, rel=1e-3)
    assert stream_ceiling_bps(0.04, 0.0, "cubic", 200e6) == 200e6


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.integers(1, 3_000_000), st.floats(0.1, 10)), min_size=1, max_size=12
    )
)
def test_every_transfer_lands_once_and_no_byte_is_lost_or_made(jobs) -> None:
    agenda, network = world()
    landed = []
    for i, (at_s, total, deadline_s) in enumerate(jobs):
        send(agenda, network, total, lambda now, i=i: landed.append(i), at_s=at_s, deadline_s=deadline_s)
    agenda.run()
    assert sorted(landed) == list(range(len(jobs)))
    assert network.pipes["a", "b"].sent_bytes == pytest.approx(
        sum(total for _, total, _ in jobs), abs=len(jobs)
    )
    assert len(network.pipes["a", "b"].order) == 0
    # Work is conserved: the link is never idle while something is available.
    assert agenda.now <= 5.0 + sum(total for _, total, _ in jobs) / (10e6 * SHARE) + 1e-3


@given(seed=st.integers(0, 1 << 40))
def test_a_pipe_is_shared_by_all_that_have_something_to_send_in_the_order_in_which_they_came(seed) -> None:
    rng = Random(seed)
    agenda, network = world(delay_ms=5)
    pipe, under_way, landed = network.pipes["a", "b"], [], []
    for _ in range(25):
        what = rng.random()
        if what < 0.3:
            under_way.append(Transfer(rng.choice([10, 1000, 1_000_000]), rng.uniform(0, 9), landed.append))
            network.start("a", "b", under_way[-1], agenda.now)
        elif what < 0.8 and under_way:
            one = rng.choice(under_way)
            ready = rng.choice([one.available + 0.3, one.total_bytes / 3, one.total_bytes])
            network.supply("a", "b", one, ready, agenda.now)
        elif what < 0.85 and under_way:
            network.drop("a", "b", under_way.pop(rng.randrange(len(under_way))), agenda.now)
        elif what < 0.9:
            network.before_change(agenda.now)
            network.links[pipe.links[0].id].cross_bps = rng.choice([0.0, 5e7, 9e9])
            network.changed(agenda.now)
        else:
            agenda.run(agenda.now + rng.choice([1e-4, 0.01, 0.3]))
            continue
        waiting = [one for one in pipe.begun if one.available - one.sent > K_DONE_BYTES]
        assert list(pipe.rates) == waiting


def test_a_cold_stream_waits_a_round_trip_whenever_its_window_is_spent() -> None:
    assert [further_rounds(size) for size in (0, 14_480, 14_481, 43_440, 43_441)] == [0, 0, 1, 1, 2]


def test_an_end_waits_for_what_was_lost_of_the_last_round_trip_and_of_no_earlier_one() -> None:
    few, all_of_it, long = (
        repeated_late_s(0.04, 0.001, size, 25e6) for size in (14_480, 1_000_000, 100_000_000)
    )
    assert few == pytest.approx(0.04 * (1 - 0.999**10), rel=2e-3)  # once in a thousand one is lost again
    assert few < all_of_it == pytest.approx(long)
    assert long < 0.04
    assert repeated_late_s(0.04, 0.0, 1e6, 25e6) == 0.0


def test_what_is_sent_again_may_be_lost_again() -> None:
    """The rounds until the last of n packets is through, by drawing them."""
    drawn = Random(1)

    def rounds(loss: float, packets: int) -> int:
        left, taken = packets, 0
        while left := sum(drawn.random() < loss for _ in range(left)):
            taken += 1
        return taken

    for loss, packets in ((0.15, 70), (0.01, 26), (0.3, 1)):
        mean = sum(rounds(loss, packets) for _ in range(4000)) / 4000
        late_s = repeated_late_s(1.0, loss, packets * K_MSS_BYTES, 1e9)
        assert late_s == pytest.approx(mean, rel=0.1)


def test_a_lone_answer_that_is_lost_comes_after_its_time_out_ever_later() -> None:
    assert answered_late_s(0.04, 0.0) == 0.0
    # 1% waits 0.24 s, one in a hundred of these 0.48 s more.
    assert answered_late_s(0.04, 0.01) == pytest.approx(0.01 * 0.24 + 0.0001 * 0.48, rel=1e-3)


def test_an_answer_takes_a_round_trip_and_what_a_lost_one_waits_for() -> None:
    _, network = world(delay_ms=20, loss_percent=1)
    assert network.answer_s("a", "b", 0.0) == pytest.approx(0.04 + answered_late_s(0.04, 0.01))


def test_bbr_s_streams_together_fill_a_buffer_and_lose_what_they_believe_in_beyond_the_link() -> None:
    rate, rtt_s = 25e6 / 8, 0.04  # 125 kB in a round trip
    assert standing_queue(rate, rtt_s, 1, 125e3, 9.0) == (0.0, 0.0)  # one alone knows what there is
    queue_bytes, lost = standing_queue(rate, rtt_s, 4, 125e3, 9.0)
    assert queue_bytes == 125e3
    assert lost == pytest.approx(1 - 4.25 / 5)  # 1.25 of 4.25 parts, where a fourth is theirs
    more = [standing_queue(25e6, rtt_s, n, 1e6, 9.0)[1] for n in (8, 16, 32)]
    assert more == pytest.approx([0.175, 0.1875, 0.19375])
    deep_bytes, none = standing_queue(rate, rtt_s, 4, 10e6, 9.0)
    assert (1.3 * 125e3 < deep_bytes < 1.7 * 125e3, none) == (True, 0.0)  # its window ends it


@given(st.floats(1e4, 1e9), st.floats(1e-3, 0.5), st.integers(1, 64), st.floats(3e3, 1e9), st.floats(0, 100))
def test_a_queue_stays_within_its_buffer_and_grows_with_time(
    rate, rtt_s, streams, buffer_bytes, busy_s
) -> None:
    queue_bytes, lost = standing_queue(rate, rtt_s, streams, buffer_bytes, busy_s)
    assert 0 <= queue_bytes <= buffer_bytes
    assert 0 <= lost < 0.2
    assert lost == 0 or queue_bytes == buffer_bytes
    later_bytes, later = standing_queue(rate, rtt_s, streams, buffer_bytes, busy_s + 1)
    assert later_bytes >= queue_bytes
    assert later >= lost
    assert standing_queue(rate, rtt_s, streams, buffer_bytes, 8 * rtt_s * 0.99) == (0.0, 0.0)


def test_a_transfer_at_the_end_of_a_long_busy_time_waits_for_what_the_full_queue_dropped() -> None:
    def end_s(total: float, streams: int) -> float:
        agenda, network = world(delay_ms=10)
        pipe = network.pipes["a", "b"]
        pipe.ever_busy, pipe.streams = True, streams  # warm
        seen = []
        send(agenda, network, total * SHARE, seen.append)
        agenda.run()
        return seen[0] - total / 10e6 - 0.01

    assert end_s(1_000_000, 4) == pytest.approx(0, abs=1e-4)  # over before all have probed
    assert end_s(10_000_000, 1) == pytest.approx(0, abs=1e-4)
    # 20 ms and as much again of queue, of 276 packets 15%, of those 15% again.
    assert end_s(10_000_000, 4) == pytest.approx(repeated_late_s(0.04, 0.15, 1e9, 10e6), rel=0.01)
