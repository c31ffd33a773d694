"""Pages and states in host memory: what is found is what was put there, nobody shares memory, and what was
used longest ago makes room."""

from __future__ import annotations

import ctypes
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prfaas.sglang.prefixes.store import Chunk, Key, PrefixStore
from prfaas.sglang.staging import K_ALIGN_BYTES, HostMemory, Staging

K_ITEM = K_ALIGN_BYTES // 4
K_ROOM = 16 * K_ALIGN_BYTES


def store_of(size_bytes: int = K_ROOM) -> tuple[PrefixStore, Staging]:
    memory = Staging(size_bytes, HostMemory())
    return PrefixStore(memory), memory


def as_keys(names: list[str]) -> list[Key]:
    return [name.encode() for name in names]


def holds(store: PrefixStore, name: str, pool: str = "pages") -> bool:
    return store.holds(pool, name.encode())


def leading(store: PrefixStore, names: list[str], keep_until_s: float = 0.0) -> int:
    return store.leading("pages", as_keys(names), keep_until_s)


def put(store: PrefixStore, keys: list[str], now_s: float = 0.0, pool: str = "pages") -> Chunk | None:
    chunk = store.room(pool, as_keys(keys), K_ITEM, now_s)
    if chunk is not None:
        for at, key in enumerate(keys):
            ctypes.memmove(chunk.address + at * K_ITEM, f"{pool}/{key}".encode().ljust(K_ITEM, b"."), K_ITEM)
        store.keep(chunk)
    return chunk


def read(store: PrefixStore, pool: str, keys: list[str]) -> list[str]:
    found = []
    with store.reading(pool, as_keys(keys)) as runs:
        for run in runs:
            data = ctypes.string_at(run.address, run.count * K_ITEM)
            found += [data[at : at + K_ITEM].rstrip(b".").decode() for at in range(0, len(data), K_ITEM)]
    return found


class Traffic(RuleBasedStateMachine):
    """Any coming, reading and clearing. Keys are of a few prefixes, as a tree has them."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.memory = store_of()
        self.now_s = 0.0
        self.got: list[Chunk] = []

    @rule(
        prefix=st.integers(0, 5), first=st.integers(0, 8), count=st.integers(1, 24), wait=st.integers(0, 60)
    )
    def comes(self, prefix: int, first: int, count: int, wait: int) -> None:
        self.now_s += wait
        put(self.store, [f"{prefix}.{at}" for at in range(first, first + count)], self.now_s)

    @rule(count=st.integers(1, 8))
    def is_got_and_given_back(self, count: int) -> None:
        chunk = self.store.room("pages", as_keys([f"x{at}" for at in range(count)]), K_ITEM, self.now_s)
        if chunk is not None:
            self.store.give_back(chunk)

    @rule(prefix=st.integers(0, 5), count=st.integers(1, 24))
    def is_looked_up(self, prefix: int, count: int) -> None:
        keys = [f"{prefix}.{at}" for at in range(count)]
        found = leading(self.store, keys, self.now_s + 30)
        assert read(self.store, "pages", keys[:found]) == [f"pages/{key}" for key in keys[:found]]
        assert found == count or not holds(self.store, keys[found])

    @precondition(lambda self: self.now_s > 0)
    @rule()
    def is_cleared(self) -> None:
        self.store.clear()
        assert self.store.held == {}
        assert self.memory.free_bytes == K_ROOM

    @invariant()
    def what_is_held_is_what_was_put(self) -> None:
        for prefix in range(6):
            for at in range(32):
                key = f"{prefix}.{at}"
                if holds(self.store, key):
                    assert read(self.store, "pages", [key]) == [f"pages/{key}"]


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=30)


def test_what_was_used_longest_ago_makes_room() -> None:
    store, _ = store_of()
    a_quarter = K_ROOM // K_ITEM // 4
    for name in "abcd":
        put(store, [f"{name}{at}" for at in range(a_quarter)])
    assert leading(store, ["a0"]) == 1
    put(store, [f"e{at}" for at in range(a_quarter)])
    assert [name for name in "abcde" if holds(store, f"{name}0")] == ["a", "c", "d", "e"]


def test_the_beginning_of_a_prefix_outlives_its_end() -> None:
    store, _ = store_of()
    half = K_ROOM // K_ITEM // 2
    begin, end = [f"b{at}" for at in range(half)], [f"e{at}" for at in range(half)]
    put(store, begin)
    put(store, end)
    assert leading(store, begin + end) == 2 * half
    put(store, ["new"])
    assert leading(store, begin + end) == half


def test_what_somebody_was_told_of_stays_until_it_is_read_or_its_time_is_over() -> None:
    store, _ = store_of()
    half = K_ROOM // K_ITEM // 2
    told, other = [f"t{at}" for at in range(half)], [f"o{at}" for at in range(half)]
    put(store, told)
    put(store, other)
    assert leading(store, told, keep_until_s=30.0) == half
    put(store, [f"a{at}" for at in range(half)], now_s=29.0)
    assert holds(store, "t0")
    assert not holds(store, "o0")
    assert leading(store, ["a0"], keep_until_s=30.0) == 1
    assert put(store, ["b"], now_s=29.0) is None
    with store.reading("pages", as_keys(told)):
        pass
    assert put(store, ["b"], now_s=29.0) is not None
    assert not holds(store, "t0")
    assert put(store, [f"c{at}" for at in range(half)], now_s=30.0) is not None


def test_what_is_being_read_is_not_evicted_nor_is_anything_kept_that_has_no_room() -> None:
    store, memory = store_of()
    all_of_it = [f"a{at}" for at in range(K_ROOM // K_ITEM)]
    put(store, all_of_it)
    with store.reading("pages", as_keys(all_of_it[:1])):
        assert put(store, ["b"], now_s=1e6) is None
        store.clear()
        assert not holds(store, "a0")
        assert memory.free_bytes == 0
    assert put(store, ["b"], now_s=1e6) is not None
    assert read(store, "pages", ["b"]) == ["pages/b"]


def test_more_than_the_store_holds_has_no_room_and_evicts_nothing() -> None:
    store, _ = store_of()
    put(store, ["a"])
    assert store.room("pages", as_keys([str(at) for at in range(K_ROOM // K_ITEM + 1)]), K_ITEM, 1e6) is None
    assert holds(store, "a")


def test_pools_have_keys_of_their_own() -> None:
    store, _ = store_of()
    put(store, ["k"], pool="pages")
    assert not holds(store, "k", "states")
    with pytest.raises(KeyError), store.reading("states", [b"k"]):
        pass
    put(store, ["k"], pool="states")
    assert read(store, "states", ["k"]) == ["states/k"]
    assert store.held == {"pages": 1, "states": 1}


def test_what_comes_in_part_is_found_in_part() -> None:
    store, _ = store_of()
    chunk = store.room("pages", [b"a", b"b", b"c"], K_ITEM, 0.0)
    assert chunk is not None
    store.keep(chunk, 2)
    assert leading(store, ["a", "b", "c"]) == 2


def test_items_that_lie_one_after_the_other_are_one_run() -> None:
    store, _ = store_of()
    rng = Random(1)
    put(store, ["a", "b", "c"])
    put(store, ["d"])
    with store.reading("pages", [b"a", b"b", b"c", b"d"]) as runs:
        assert sum(run.count for run in runs) == 4
        assert len(runs) <= 2
    shuffled = ["a", "b", "c", "d"]
    rng.shuffle(shuffled)
    assert read(store, "pages", shuffled) == [f"pages/{key}" for key in shuffled]
