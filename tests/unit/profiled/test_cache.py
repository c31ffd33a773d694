"""Both kinds of reuse, eviction, and what is told of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prfaas_testbed.instances.profiled.cache import Cleared, PrefixCache, Removed, Stored


def test_full_attention_reuses_whole_blocks_and_never_the_whole_prompt() -> None:
    cache = PrefixCache(4, exact=False)
    cache.insert(range(10))
    assert cache.match(range(12)) == 8
    assert cache.match(range(8)) == 4
    assert cache.match([*range(6), 99, 98, 97]) == 4
    assert cache.match([99, *range(1, 10)]) == 0


def test_a_state_is_reused_at_exactly_its_length() -> None:
    cache = PrefixCache(4, exact=True)
    cache.insert(range(10))
    assert cache.match(range(12)) == 10
    assert cache.match(range(10)) == 0
    assert cache.match([*range(9), 99, 98]) == 0
    cache.insert(range(8))
    assert cache.match([*range(9), 99, 98]) == 8


def test_the_longest_unused_goes_first_and_pinned_blocks_stay() -> None:
    cache = PrefixCache(4, exact=False)
    cache.insert([1] * 4)
    cache.insert([2] * 4)
    cache.insert([3] * 4)
    cache.insert([1] * 4)  # used again
    pins = cache.pin([2] * 5, 4)
    assert cache.evict(4) == 4
    assert (cache.match([1] * 5), cache.match([2] * 5), cache.match([3] * 5)) == (4, 4, 0)
    assert cache.evict(100) == 4
    assert cache.match([2] * 5) == 4
    cache.unpin(pins)
    assert cache.evict(100) == 4
    assert cache.used_tokens == 0


def test_changes_are_told_in_order_and_once() -> None:
    cache = PrefixCache(2, exact=False)
    cache.insert([1, 2, 3, 4])
    cache.insert([1, 2, 9, 9])
    first, second = cache.drain()
    assert isinstance(first, Stored)
    assert isinstance(second, Stored)
    assert first.parent is None
    assert second.parent == first.hashes[0]
    assert second.tokens == (9, 9)
    cache.evict(2)
    assert cache.drain() == [Removed((first.hashes[1],))]
    cache.clear()
    assert cache.drain() == [Cleared()]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=20), st.booleans())
def test_the_count_of_tokens_is_that_of_what_is_held(prompts: list[list[int]], exact: bool) -> None:
    cache = PrefixCache(3, exact)
    for prompt in prompts:
        cache.insert(prompt)
    held = {tuple(p[: 3 * (i + 1)]) for p in prompts for i in range(len(p) // 3)}
    tails = {tuple(p) for p in prompts if len(p) % 3} if exact else set()
    assert cache.used_tokens == 3 * len(held) + sum(len(p) % 3 for p in tails)
    assert cache.evict(10**6) == 3 * len(held) + sum(len(p) % 3 for p in tails)
    assert cache.used_tokens == 0
