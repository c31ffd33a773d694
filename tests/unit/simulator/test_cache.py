import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.simulator.cache import BlockCache


def test_whole_blocks_are_found_and_the_last_token_is_always_prefilled() -> None:
    cache = BlockCache(64, None, exact=False)
    cache.insert((1, 2, 3), 64 * 3)
    assert cache.match((1, 2, 9), 192) == 128
    assert cache.match((1, 2, 3), 192) == 128  # equal prompts leave something to prefill
    assert cache.match((1, 2, 3, 4), 200) == 192


def test_a_state_is_reused_only_at_the_length_where_it_was_saved() -> None:
    cache = BlockCache(64, None, exact=True)
    cache.insert((1, 2, 3), 192)
    assert cache.match((1, 2, 9, 10), 256) == 0
    assert cache.match((1, 2, 3, 10), 256) == 192


def test_the_longest_unused_chain_goes_first_and_from_its_end() -> None:
    cache = BlockCache(10, 40, exact=False)
    cache.insert((1, 2), 20)
    cache.insert((3, 4), 20)
    cache.insert((5,), 10)
    assert cache.match((1, 2, 0), 30) == 10  # the end went, its beginning stays
    assert cache.match((3, 4, 0), 30) == 20


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6).map(tuple), max_size=30), st.booleans())
def test_it_never_holds_more_than_its_capacity_nor_finds_what_it_was_not_given(prompts, exact) -> None:
    cache = BlockCache(4, 24, exact=exact)
    given_prompts = set()
    for content in prompts:
        # An id stands for all that came before it, too.
        prompt = tuple(hash(content[: i + 1]) for i in range(len(content)))
        found = cache.match(prompt, len(prompt) * 4 + 1)
        blocks = found // 4
        assert found == 0 or any(one[:blocks] == prompt[:blocks] for one in given_prompts)
        cache.insert(prompt, len(prompt) * 4)
        given_prompts.add(prompt)
        assert cache.used_tokens <= 24


def test_blocks_are_of_the_prompts_size_and_one_cache_holds_one_size() -> None:
    cache = BlockCache(64, 2048, exact=False)
    cache.insert((1, 2, 3), 1200, 512)
    assert cache.match((1, 2, 9), 1300) == 1024  # the third block wasn't full
    assert cache.used_tokens == 1024
    with pytest.raises(ValueError, match="blocks of 64 tokens in a cache that holds blocks of 512"):
        cache.insert((4, 5), 128, 64)
