"""The simulated door's knowledge of caches: the router's index, a little late, and otherwise the truth."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.profiles import Curve, Profile
from prfaas.routing.prefix_index import PrefixIndex
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.engine import Engine
from prfaas.simulator.prefixes import HeardPrefixes
from prfaas.workload.requests import TimedRequest

K_BLOCK = 16


def engines(exact: bool, pool_tokens: int | None = 96) -> list[Engine]:
    profile = Profile(
        "unit",
        Curve.of([100, 1000], [1, 10]),
        Curve.of([100, 1000], [1000, 10_000]),
        state_bytes=500 if exact else 0,
        pool_tokens=pool_tokens,
    )
    return [Engine(name, "here", "prefill", profile, Agenda()) for name in ("a", "b")]


def asked(content: Sequence[int], tokens: int | None = None) -> TimedRequest:
    """A prompt of these blocks: an id stands for all that came before it, too."""
    ids = tuple(hash(tuple(content[: i + 1])) & 0xFFFFFFFF for i in range(len(content)))
    return TimedRequest(0, 0.0, tokens or len(ids) * K_BLOCK, 10, ids, K_BLOCK)


contents = st.lists(st.integers(0, 2), min_size=1, max_size=8)
steps = st.one_of(
    st.tuples(st.just("insert"), st.integers(0, 1), contents),
    st.tuples(st.just("fit"), st.integers(0, 1), st.integers(0, 96)),
    st.tuples(st.just("kill"), st.integers(0, 1), st.none()),
)


@given(st.lists(steps, max_size=25), st.lists(contents, min_size=1, max_size=5), st.booleans())
def test_without_delay_the_index_says_what_each_cache_would_find(doings, prompts, exact) -> None:
    both = engines(exact)
    heard = HeardPrefixes(both, lambda: 0.0, 0.0)
    for what, which, detail in doings:
        cache = both[which].cache
        if what == "insert":
            request = asked(detail)
            cache.insert(request.block_ids, request.prompt_tokens, K_BLOCK)
        elif what == "fit":
            cache.fit(detail)
        else:
            cache.clear()
        for content in prompts:
            for tokens in (len(content) * K_BLOCK, len(content) * K_BLOCK - 3):
                request = asked(content, tokens)
                found = heard.usable(request, 0.0)
                for engine in both:
                    there = engine.cache.match(request.full_blocks, request.prompt_tokens)
                    assert found.get(engine.name, 0) == there


def test_news_arrive_late_and_what_has_gone_is_promised_until_then() -> None:
    now = 10.0
    one, _ = both = engines(exact=False)
    heard = HeardPrefixes(both, lambda: now, 0.5)
    request = asked([1, 1, 1])
    one.cache.insert(request.block_ids, request.prompt_tokens, K_BLOCK)
    longer = asked([1, 1, 1, 2])
    assert heard.usable(longer, 10.4) == {}
    assert heard.usable(longer, 10.5) == {"a": 3 * K_BLOCK}
    now = 20.0
    one.kill(now)
    assert heard.usable(longer, 20.4) == {"a": 3 * K_BLOCK}
    assert heard.usable(longer, 20.5) == {}


def test_a_request_like_no_other_asks_nothing() -> None:
    heard = HeardPrefixes(engines(exact=False), lambda: 0.0, 0.0)
    assert heard.usable(TimedRequest(0, 0.0, 100, 1), 0.0) == {}
    assert heard.index is None


@pytest.mark.parametrize("exact", [False, True])
def test_the_index_is_the_routers_and_another_fed_the_same_says_the_same(exact: bool) -> None:
    one, two = both = engines(exact, pool_tokens=None)
    heard = HeardPrefixes(both, lambda: 0.0, 0.0)
    told: list[tuple[object, ...]] = []
    for at_s, (engine, content) in enumerate([(one, [1, 2]), (two, [1, 2, 3]), (one, [1, 2, 3, 4])]):
        request = asked(content)
        engine.cache.insert(request.block_ids, request.prompt_tokens, K_BLOCK)
        told += heard._on_their_way
        heard.usable(request, float(at_s))
    assert isinstance(heard.index, PrefixIndex)
    fresh = PrefixIndex()
    fresh.add_model("", K_BLOCK)
    for engine in both:
        fresh.add_holder(engine.name, "", hybrid=exact)
    for _, name, event, state in told:
        fresh.apply(name, [event])
        if state is not None:
            fresh.on_state(name, state)
    assert fresh.statistics() == heard.index.statistics()
    for content in ([1, 2, 3, 4, 5], [1, 2, 3], [1, 9]):
        request = asked(content)
        hashes = [block << 24 | place for place, block in enumerate(request.full_blocks)]
        assert fresh.lookup("", hashes, request.prompt_tokens) == heard.usable(request, 9.0)
