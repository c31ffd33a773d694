"""Copies on suspicion are bounded, whatever the link does; a single late block still gets its copy."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from prfaas.transfer.frames import Open
from prfaas.transfer.hedging import K_BURST_BYTES, K_SHARE, HedgeBudget
from prfaas.transfer.plans import Plan
from prfaas.transfer.sending import Sending

BLOCK = 256 * 1024


def submit(sending: Sending, transfer_id: int, n_blocks: int, now: float) -> None:
    plan = Plan([0], [0], [n_blocks * BLOCK], BLOCK)
    opening = Open(1, 1, 0, b"", "kv", plan.total_bytes, plan.n_blocks, 0.0)
    sending.submit(transfer_id, opening, plan, 1 << 40, 1e9, now)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("sent"), st.integers(0, 4 << 20)),
            st.tuples(st.just("copy"), st.integers(1, 4 << 20)),
        ),
        max_size=200,
    ),
    st.integers(0, 199),
)
def test_over_any_stretch_copies_are_a_burst_a_block_and_a_share_of_the_rest(
    steps: list[tuple[str, int]], start: int
) -> None:
    budget = HedgeBudget()
    copied = otherwise = 0
    for i, (what, size) in enumerate(steps):
        if what == "sent":
            budget.sent(size)
            otherwise += size * (i >= start)
        elif budget.open:
            budget.copied(size)
            copied += size * (i >= start)
        assert copied <= K_BURST_BYTES + K_SHARE * otherwise + (4 << 20) + 1
    assert budget.copied_bytes >= copied


@given(st.integers(0, 2**32), st.integers(2, 6), st.floats(0.0, 0.3))
def test_a_link_where_every_block_is_late_is_not_loaded_with_copies(
    seed: int, n_streams: int, acked_share: float
) -> None:
    """Streams take all that they are given; acknowledgements come long after hedge_after_s, or never."""
    rng = random.Random(seed)
    sending = Sending(1 << 40)
    sending.hedge_after_s = 0.1
    first: dict[int, int] = {}
    copied = sent = 0
    flying: list[tuple[int, int]] = []
    now = 0.0
    for step in range(120):
        now += rng.choice((0.01, 0.2))
        if step % 4 == 0:
            submit(sending, step + 1, rng.randint(1, 12), now)
        for _ in range(rng.randint(1, 6)):
            draw = sending.draw(rng.randrange(n_streams), now)
            if draw is None:
                continue
            key = draw.transfer_id << 20 | draw.block_id
            if key in first:
                copied += draw.payload_bytes
            else:
                sent += draw.payload_bytes
                flying.append((draw.transfer_id, draw.block_id))
            first[key] = 1
        for _ in range(int(len(flying) * acked_share)):
            sending.on_ack(*flying.pop(rng.randrange(len(flying))))
    assert copied <= K_BURST_BYTES + K_SHARE * sent + BLOCK
    assert copied == sending.hedges.copied_bytes


def test_one_late_block_gets_its_copy_over_another_stream() -> None:
    sending = Sending(1 << 40)
    sending.hedge_after_s = 0.1
    submit(sending, 1, 2, 0.0)
    first, second = sending.draw(0, 0.0), sending.draw(1, 0.0)
    assert first is not None
    assert second is not None
    sending.on_ack(1, second.block_id)
    assert sending.draw(1, 0.05) is None
    again = sending.draw(1, 0.2)
    assert again is not None
    assert again.block_id == first.block_id


def test_a_block_whose_other_copy_landed_while_it_was_to_go_again_goes_once_after_a_restart() -> None:
    sending = Sending(1 << 40)
    sending.hedge_after_s = 0.1
    submit(sending, 1, 4, now=0.0)
    for stream in (1, 1, 1):
        assert sending.draw(stream, 0.0) is not None
    sending.on_stream_lost(1)  # 0, 1 and 2 are to go again
    drawn = [sending.draw(2, 0.0).block_id for _ in range(4)]
    assert drawn == [0, 1, 2, 3]
    assert sending.draw(3, 1.0).block_id == 0  # two copies of 0
    assert sending.draw(3, 1.0).block_id == 1  # two of 1
    sending.on_nack(1, 0)
    sending.on_nack(1, 1)  # corrupt; the other copies are fine
    sending.on_ack(1, 1)  # while it is to go again, behind 0
    sending.on_peer_restarted()
    drawn = []
    while (draw := sending.draw(9, 2.0)) is not None:
        drawn.append(draw.block_id)
    assert sorted(drawn) == [0, 1, 2, 3]
    assert sending.in_flight_bytes == 4 * BLOCK
    for block in range(4):
        done = sending.on_ack(1, block)
    assert done is not None
    assert len(sending) == 0
