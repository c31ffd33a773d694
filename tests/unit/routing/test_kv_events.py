"""KV event messages: SGLang's encoding, order restored, gaps and restarts noticed, garbage counted."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.routing import AllBlocksCleared, BlockRemoved, BlockStored, EventFeed, decode_batch


def message(*events: object, rank: int | None = None) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), rank])


def stored(*hashes: int) -> dict[str, object]:
    """As SGLang sends it, fields we don't use included."""
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": None,
        "token_ids": [5] * len(hashes),
        "block_size": 1,
        "lora_id": None,
        "medium": "GPU",
        "session_id": "s",
    }


def hashes_of(events: object) -> list[int]:
    return [block for event in events for block in event.block_hashes]


def test_the_three_kinds_are_read() -> None:
    payload = message(
        stored(1, -2), {"type": "BlockRemoved", "block_hashes": [3]}, {"type": "AllBlocksCleared"}, rank=0
    )
    one, two, three = decode_batch(payload)
    assert isinstance(one, BlockStored)
    assert one.block_hashes == [1, -2]
    assert isinstance(two, BlockRemoved)
    assert isinstance(three, AllBlocksCleared)


def test_a_kind_of_a_later_version_is_left_out_and_the_rest_counts() -> None:
    assert hashes_of(decode_batch(message(stored(1), {"type": "BlockMoved", "to": "x"}, stored(2)))) == [1, 2]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xff",
        message()[:-2],
        msgspec.msgpack.encode({"not": "a batch"}),
        msgspec.msgpack.encode([1.0, [17]]),
        message({"block_hashes": [1]}),
        message({"type": ["x"], "block_hashes": [1]}),
        message({"type": "BlockStored", "block_hashes": "no"}),
        message({"type": "BlockStored", "block_hashes": [2**70 // 2**7], "block_size": -1, "medium": 3}),
    ],
)
def test_garbage_raises_value_error_and_nothing_else(payload: bytes) -> None:
    with pytest.raises(ValueError):
        decode_batch(payload)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_decoder(payload: bytes) -> None:
    try:
        decode_batch(payload)
    except ValueError:
        pass


def test_a_feed_restores_order_and_asks_for_what_is_missing_once() -> None:
    feed = EventFeed()
    assert hashes_of(feed.on_message(0, message(stored(0))).events) == [0]
    ahead = feed.on_message(3, message(stored(3)))
    assert (list(ahead.events), ahead.replay_from) == ([], 1)
    assert feed.on_message(4, message(stored(4))).replay_from is None
    assert hashes_of(feed.on_replayed(0, message(stored(0))).events) == []
    assert hashes_of(feed.on_replayed(1, message(stored(1))).events) == [1]
    assert hashes_of(feed.on_replayed(2, message(stored(2))).events) == [2, 3, 4]
    assert feed.next_sequence == 5


def test_joining_late_asks_for_the_beginning() -> None:
    assert EventFeed().on_message(7, message(stored(7))).replay_from == 0


def test_a_gap_that_can_not_be_filled_forgets_the_server() -> None:
    feed = EventFeed()
    feed.on_message(0, message(stored(0)))
    feed.on_message(5, message(stored(5)))
    told = feed.on_replay_failed()
    assert told.reset
    assert hashes_of(told.events) == [5]
    assert feed.on_replay_failed().events == ()


def test_a_sequence_that_starts_over_is_a_restart() -> None:
    feed = EventFeed()
    for sequence in range(3):
        feed.on_message(sequence, message(stored(sequence)))
    told = feed.on_message(0, message({"type": "AllBlocksCleared"}))
    assert told.reset
    assert hashes_of(feed.on_message(1, message(stored(9))).events) == [9]


def test_a_garbled_message_is_counted_and_what_it_hid_is_not_trusted() -> None:
    feed = EventFeed()
    feed.on_message(0, message(stored(0)))
    told = feed.on_message(1, b"\xc1")
    assert (told.garbage, told.reset) == (1, True)
    assert hashes_of(feed.on_message(2, message(stored(2))).events) == [2]


@given(st.permutations(range(12)), st.lists(st.integers(0, 11)))
def test_any_order_and_any_repeats_give_the_same_events(order: list[int], repeats: list[int]) -> None:
    feed = EventFeed()
    seen: list[int] = []
    for sequence in [*order, *repeats]:
        told = feed.on_replayed(sequence, message(stored(sequence)))
        assert not told.reset
        seen += hashes_of(told.events)
    assert seen == list(range(12))
