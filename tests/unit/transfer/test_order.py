"""Order of sending: what is drawn follows the shares, deadlines first, and nobody starves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.errors import LocalProtocolError
from prfaas.transfer.order import K_DEADLINE, K_EQUAL, K_SHORTEST, SendOrder

K_BLOCK = 1000


def run(order: SendOrder[str], n_blocks: int, now: float = 0.0) -> list[str]:
    drawn = []
    for _ in range(n_blocks):
        key = order.draw(now, K_BLOCK)
        if key is None:
            break
        order.sent(now, key, min(K_BLOCK, order.remaining_bytes(key)))
        drawn.append(key)
    return drawn


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 100)), min_size=1, max_size=30), st.floats(0, 100))
def test_shares_add_up_and_leave_nobody_out(transfers, now):
    order: SendOrder[int] = SendOrder()
    for i, (blocks, deadline) in enumerate(transfers):
        order.add(i, blocks * K_BLOCK, deadline)
    shares = order.shares(now)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= K_EQUAL / len(transfers) - 1e-12


@given(st.lists(st.floats(1, 100), min_size=2, max_size=12), st.integers(10, 400))
def test_bytes_drawn_follow_the_integrated_shares_within_two_blocks(deadlines, n_blocks):
    order: SendOrder[int] = SendOrder()
    for i, deadline in enumerate(deadlines):
        order.add(i, 10_000 * K_BLOCK + i, deadline)
    integrated = dict.fromkeys(range(len(deadlines)), 0.0)
    drawn = dict.fromkeys(range(len(deadlines)), 0.0)
    for _ in range(n_blocks):
        for key, share in order.shares(0.0).items():
            integrated[key] += share * K_BLOCK
        key = order.draw(0.0, K_BLOCK)
        assert key is not None
        order.sent(0.0, key, K_BLOCK)
        drawn[key] += K_BLOCK
    assert max(abs(drawn[k] - integrated[k]) for k in drawn) <= 2 * K_BLOCK


def test_the_earliest_deadline_gets_most_and_the_latest_still_its_part():
    order: SendOrder[str] = SendOrder()
    order.add("late", 1000 * K_BLOCK, 100.0)
    order.add("early", 5000 * K_BLOCK, 1.0)
    drawn = run(order, 500)
    assert drawn.count("early") == pytest.approx(500 * (K_DEADLINE + K_EQUAL / 2), abs=2)
    assert drawn.count("late") == pytest.approx(500 * (K_SHORTEST + K_EQUAL / 2), abs=2)


def test_a_small_transfer_behind_a_large_one_with_an_earlier_deadline_leaves_at_once():
    order: SendOrder[str] = SendOrder()
    order.add("2 GB", 2_000_000 * K_BLOCK, 10.0)
    run(order, 1000)
    order.add("1 MB", 1000 * K_BLOCK, 20.0)
    drawn = run(order, 5000)
    assert "1 MB" in drawn[:10]
    last = len(drawn) - 1 - drawn[::-1].index("1 MB")
    assert drawn.count("1 MB") == 1000
    assert last < 1000 / (K_SHORTEST + K_EQUAL / 2) + 10


def test_a_large_transfer_is_not_starved_by_an_endless_line_of_small_urgent_ones():
    order: SendOrder[str] = SendOrder()
    order.add("large", 10**9, 1000.0)
    sent = 0
    for i in range(2000):
        order.add(f"small {i}", K_BLOCK, 1.0 + i)
        key = order.draw(float(i), K_BLOCK)
        assert key is not None
        order.sent(float(i), key, K_BLOCK)
        sent += key == "large"
    assert sent > 0


def test_transfers_that_cannot_send_give_their_share_to_those_that_can():
    order: SendOrder[str] = SendOrder()
    order.add("frozen", 100 * K_BLOCK, 1.0)
    order.add("free", 100 * K_BLOCK, 2.0)
    assert order.shares(0.0, ["free"]) == {"free": pytest.approx(1.0)}
    assert order.draw(0.0, K_BLOCK, ["free"]) == "free"


def test_a_deadline_that_has_passed_comes_last():
    order: SendOrder[str] = SendOrder()
    order.add("missed", 100 * K_BLOCK, 1.0)
    order.add("can be met", 100 * K_BLOCK, 9.0)
    assert order.shares(0.5)["missed"] > order.shares(0.5)["can be met"]
    # Both are of one size: the shortest's part goes to the first of them.
    assert order.shares(2.0)["can be met"] >= K_DEADLINE


def test_a_transfer_without_bytes_or_twice_is_refused():
    order: SendOrder[str] = SendOrder()
    order.add("a", 5, 1.0)
    for key, remaining in (("a", 5), ("b", 0)):
        with pytest.raises(LocalProtocolError):
            order.add(key, remaining, 1.0)
    assert len(order) == 1


@pytest.mark.parametrize("removed", [0.0, 0.05])
def test_debts_add_up_to_nothing_whoever_has_gone(removed: float):
    """Else those that stay would be owed, or owe, ever more beside those that come."""
    rng, order, serial = random.Random(1), SendOrder[int](), 0
    for _ in range(2000):
        if len(order) < 4 or rng.random() < 0.2:
            serial += 1
            order.add(serial, rng.choice([200, 1000, 1500, 50_000]), 100 * rng.random())
        key = order.draw(0.0, K_BLOCK)
        assert key is not None
        order.sent(0.0, key, min(K_BLOCK, order.remaining_bytes(key)))
        if key in order and rng.random() < removed:
            order.remove(key)
        assert sum(entry.owed_bytes for entry in order._entries.values()) == pytest.approx(0, abs=1e-3)
