from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.workload import TimedRequest, prompt_token_ids, reuse_of, uncached_tokens


def request(tokens: int, ids: tuple[int, ...], index: int = 0) -> TimedRequest:
    return TimedRequest(index, 0.0, tokens, 1, ids, block_tokens=10)


K_PLAY = [
    request(35, (1, 2, 3, 4)),  # fills blocks 1 2 3, state saved at 30
    request(40, (1, 2, 5, 6)),  # shares 20 tokens; no state was saved there
    request(52, (1, 2, 3, 7, 8, 9)),  # shares 30, where the state was saved
    request(30, (1, 2, 3)),  # all of it, but the last token is always computed
]


def test_full_attention_reuses_any_whole_block_prefix() -> None:
    assert uncached_tokens(K_PLAY, "block") == [35, 20, 22, 1]


def test_recurrent_state_is_reused_only_where_it_was_saved() -> None:
    assert uncached_tokens(K_PLAY, "exact") == [35, 40, 22, 1]


def test_the_cached_share_counts_tokens() -> None:
    assert reuse_of(K_PLAY, "block").cached_share == pytest.approx(1 - 78 / 157)


def test_a_full_cache_lets_go_of_the_least_recent_last_blocks_first() -> None:
    play = [request(30, (1, 2, 3)), request(20, (8, 9)), request(30, (1, 2, 3))]
    assert list(reuse_of(play, "block", capacity_blocks=4).uncached_tokens) == [30, 20, 10]
    assert list(reuse_of(play, "exact", capacity_blocks=4).uncached_tokens) == [30, 20, 30]
    assert list(reuse_of(play, "block", capacity_blocks=0).uncached_tokens) == [30, 20, 30]


def test_nothing_to_play_and_negative_room_are_refused() -> None:
    with pytest.raises(ValueError, match="no request"):
        reuse_of([], "block")
    with pytest.raises(ValueError, match="negative"):
        reuse_of(K_PLAY, "block", capacity_blocks=-1)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=20))
def test_the_exact_rule_never_finds_more_and_prompts_agree_where_blocks_do(shapes: list[list[int]]) -> None:
    # Ids that stand for a block with all before it, as traces have them.
    requests = []
    for index, shape in enumerate(shapes):
        ids = tuple(hash(tuple(shape[: i + 1])) for i in range(len(shape)))
        requests.append(request(10 * len(shape) - 3, ids, index))
    block, exact = uncached_tokens(requests, "block"), uncached_tokens(requests, "exact")
    assert all(a <= b for a, b in zip(block, exact, strict=True))
    tokens = [prompt_token_ids(r, 1000, seed=3, low=10) for r in requests]
    for i, left in enumerate(block):
        cached = requests[i].prompt_tokens - left
        assert len(tokens[i]) == requests[i].prompt_tokens
        assert all(10 <= token < 1000 for token in tokens[i])
        if cached >= 10:
            assert any(tokens[j][:cached] == tokens[i][:cached] for j in range(i))


def test_prompts_without_blocks_differ_from_one_another_and_repeat_by_seed() -> None:
    one, two = request(50, (), 1), request(50, (), 2)
    assert prompt_token_ids(one, 1000, seed=1) == prompt_token_ids(one, 1000, seed=1)
    assert prompt_token_ids(one, 1000, seed=1) != prompt_token_ids(two, 1000, seed=1)
    assert prompt_token_ids(one, 1000, seed=1) != prompt_token_ids(one, 1000, seed=2)
    with pytest.raises(ValueError, match="no token id"):
        prompt_token_ids(one, 5, low=5)
