"""What the router keeps of servers' caches stays within what their pools can hold, whatever they tell."""

from __future__ import annotations

from typing import Any, cast

import pytest

from prfaas.config.loading import check
from prfaas.config.router import RouterConfig
from prfaas.router.fleet import Reported, ServerHandle
from prfaas.router.prefixes import K_SPARE_BLOCKS, PrefixBook
from prfaas.routing import BlockRemoved, BlockStored

K_POOL_TOKENS = 64_000
K_PAGE_TOKENS = 64
K_SERVERS: list[dict[str, Any]] = [
    {
        "name": name, "role": "prefill", "url": f"http://{name}:1", "bootstrap_port": 1,
        "kv_events": {"endpoint": f"tcp://{name}:2"},
    }
    for name in ("a", "b")
]  # fmt: skip


def book(told: list[str]) -> PrefixBook:
    config = check(
        {
            "models": [{"name": "m", "page_tokens": K_PAGE_TOKENS}],
            "sites": [{"name": "west", "servers": K_SERVERS}],
        },
        RouterConfig,
        "test.yaml",
    )
    made = PrefixBook(config, told.append)
    for site, server in config.servers():
        nothing = cast(Any, None)
        reported = Reported(total_tokens=K_POOL_TOKENS if server.name == "a" else None)
        made.add_server(ServerHandle(site, server, nothing, nothing, reported))
    return made


def test_a_server_that_tells_of_more_than_its_pool_can_hold_is_forgotten_and_counted() -> None:
    told: list[str] = []
    made = book(told)
    made.on_events("b", [BlockStored([1, 2, 3], K_PAGE_TOKENS)])
    most = 2 * K_POOL_TOKENS // K_PAGE_TOKENS + K_SPARE_BLOCKS
    for start in range(0, 20 * most, 1000):
        made.on_events("a", [BlockStored(list(range(start, start + 1000)), K_PAGE_TOKENS)])
        assert made.index.blocks("a") <= most
    assert set(told) == {"more than its pool"}
    assert made.index.blocks("b") == 3, "no harm to others"


def test_a_full_pool_that_turns_over_is_no_lie() -> None:
    told: list[str] = []
    made, size = book(told), K_POOL_TOKENS // K_PAGE_TOKENS
    for turn in range(20):
        made.on_events("a", [BlockStored(list(range(turn * size, (turn + 1) * size)), K_PAGE_TOKENS)])
        made.on_events("a", [BlockRemoved(list(range((turn - 1) * size, turn * size)))])
    assert (told, made.index.blocks("a")) == ([], size)


def test_blocks_of_another_size_than_prompts_are_cut_into_count_as_nothing_and_are_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[str] = []
    made = book(told)
    for start in range(3):
        made.on_events("a", [BlockStored([start], 16)])
    made.on_events("b", [BlockStored([7], K_PAGE_TOKENS)])
    assert (made.index.blocks("a"), made.index.blocks("b")) == (0, 1)
    assert told == ["block size"]
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("a: ")
    assert "16 tokens" in said
    assert "page_tokens of model m is 64" in said
