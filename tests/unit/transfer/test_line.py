"""The line gives what order.py's shares say, however many stand in it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prfaas.transfer.line import K_STALE_MOST, Line
from prfaas.transfer.order import SendOrder

K_BLOCK = 1000


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 30)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 11), st.booleans()), min_size=20, max_size=200),
    st.floats(0, 30),
)
def test_bytes_drawn_follow_the_integrated_shares_while_transfers_come_go_and_stand_aside(
    transfers, changes, now
):
    """Within three blocks for each time that somebody joins or leaves: each account's debt is within one."""
    order: SendOrder[int] = SendOrder()
    line: Line[int] = Line()
    for key, (blocks, deadline_s) in enumerate(transfers):
        order.add(key, blocks * K_BLOCK, deadline_s)
        line.join(key, blocks * K_BLOCK, deadline_s)
    integrated = dict.fromkeys(range(len(transfers)), 0.0)
    drawn = dict.fromkeys(range(len(transfers)), 0)
    aside: set[int] = set()
    n_changes = 1
    for who, stand_aside in changes:
        key = who % len(transfers)
        if stand_aside and key in line:
            line.leave(key)
            aside.add(key)
            n_changes += 1
        elif not stand_aside and key in aside:
            line.join(key, order.remaining_bytes(key), transfers[key][1])
            aside.discard(key)
            n_changes += 1
        able = [k for k in drawn if k in order and k not in aside]
        assert set(able) == {k for k in drawn if k in line}
        key = line.next(now, K_BLOCK)
        if key is None:
            assert not able
            continue
        for other, share in order.shares(now, able).items():
            integrated[other] += share * K_BLOCK
        line.sent(key, K_BLOCK)
        order.sent(now, key, K_BLOCK, [key])
        drawn[key] += K_BLOCK
        n_changes += key not in order
    assert max(abs(drawn[k] - integrated[k]) for k in drawn) <= 3 * K_BLOCK * n_changes


@given(st.integers(2, 20), st.integers(50, 400))
def test_of_transfers_that_stay_each_gets_its_share_within_three_blocks(n, n_blocks):
    order: SendOrder[int] = SendOrder()
    line: Line[int] = Line()
    for key in range(n):
        order.add(key, 10_000 * K_BLOCK + key, 10.0 + key)
        line.join(key, 10_000 * K_BLOCK + key, 10.0 + key)
    drawn, integrated = dict.fromkeys(range(n), 0.0), dict.fromkeys(range(n), 0.0)
    for _ in range(n_blocks):
        for other, share in order.shares(0.0).items():
            integrated[other] += share * K_BLOCK
        key = line.next(0.0, K_BLOCK)
        line.sent(key, K_BLOCK)
        order.sent(0.0, key, K_BLOCK, [key])
        drawn[key] += K_BLOCK
    assert max(abs(drawn[k] - integrated[k]) for k in drawn) <= 3 * K_BLOCK


def test_a_small_transfer_behind_a_large_one_leaves_at_once_and_the_large_one_gets_its_part():
    line: Line[str] = Line()
    line.join("2 GB", 2_000_000 * K_BLOCK, 10.0)
    for _ in range(1000):
        line.sent(line.next(0.0, K_BLOCK), K_BLOCK)
    line.join("1 MB", 1000 * K_BLOCK, 20.0)
    drawn = []
    for _ in range(5000):
        drawn.append(line.next(0.0, K_BLOCK))
        line.sent(drawn[-1], K_BLOCK)
    assert "1 MB" in drawn[:10]
    assert drawn.count("1 MB") == 1000
    assert drawn[:3000].count("2 GB") > 1000


def test_a_large_transfer_is_not_starved_by_an_endless_line_of_small_urgent_ones():
    line: Line[str] = Line()
    line.join("large", 10**9, 1000.0)
    sent = 0
    for i in range(2000):
        line.join(f"small {i}", K_BLOCK, 1.0 + i)
        key = line.next(float(i), K_BLOCK)
        line.sent(key, K_BLOCK)
        sent += key == "large"
    # It takes K_EQUAL / n of the blocks, while the small ones that it keeps waiting make n grow.
    assert sent > 10


def test_a_deadline_that_has_passed_comes_last():
    line: Line[str] = Line()
    line.join("missed", 1000 * K_BLOCK, 1.0)
    line.join("can be met", 1001 * K_BLOCK, 9.0)
    drawn = []
    for _ in range(100):
        drawn.append(line.next(2.0, K_BLOCK))
        line.sent(drawn[-1], K_BLOCK)
    assert drawn.count("can be met") >= 60


def test_what_it_keeps_is_bounded_by_what_stands_in_it():
    line: Line[int] = Line()
    line.join(0, 10**12, 1.0)
    for i in range(1, 20_000):
        line.join(i, 3 * K_BLOCK, float(i))
        for _ in range(2):
            line.sent(line.next(0.0, K_BLOCK), K_BLOCK)
        if i % 7 == 0:
            line.leave(i - 3)
            line.leave(i - 3, for_good=True)
    for key in list(range(1, 20_000)):
        line.leave(key, for_good=True)
    line.sent(0, 1)
    most = 2 * len(line) + K_STALE_MOST + 1
    assert max(len(h) for h in (line._shortest, line._least, line._earliest, line._passed)) <= most
    assert not line._served
