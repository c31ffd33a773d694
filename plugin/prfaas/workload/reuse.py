"""What a prefix cache leaves to prefill: uncached lengths of a sequence of requests, under either reuse rule.

`block`: full attention; any whole-block prefix that is still held can be used.
`exact`: linear or sliding-window layers too; a prefix can be used only at a length where the state was saved,
which is the last whole block of an earlier prompt, and only while all its blocks are held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prfaas.workload.requests import TimedRequest

Rule = Literal["block", "exact"]


class PrefixCacheModel:
    """One cache over block ids; least recently used blocks go first, a prompt's last ones before its first.

    `capacity_blocks` None: nothing is ever evicted.
    """

    def __init__(self, rule: Rule, capacity_blocks: int | None = None) -> None:
        if capacity_blocks is not None and capacity_blocks < 0:
            raise ValueError(f"capacity_blocks {capacity_blocks} must not be negative")
        self._rule, self._capacity = rule, capacity_blocks
        # Block id -> whether the state at its end was saved; oldest use first.
        self._blocks: OrderedDict[int, bool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match_blocks(self, full_blocks: tuple[int, ...]) -> int:
        """Leading blocks that can be used; changes nothing."""
        usable = 0
        for place, block in enumerate(full_blocks, 1):
            saved = self._blocks.get(block)
            if saved is None:
                break
            if saved or self._rule == "block":
                usable = place
        return usable

    def insert(self, full_blocks: tuple[int, ...]) -> None:
        """A prompt was prefilled: its whole blocks are held, and the state at their end."""
        for place in range(len(full_blocks) - 1, -1, -1):
            block = full_blocks[place]
            ends_here = place == len(full_blocks) - 1
            self._blocks[block] = self._blocks.get(block, False) or ends_here
            self._blocks.move_to_end(block)
        if self._capacity is not None:
            while len(self._blocks) > self._capacity:
                self._blocks.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a sequence of requests left to prefill."""

    rule: Rule
    uncached_tokens: tuple[int, ...]
    """A request each, in order; at least 1, as the last token is always computed."""
    prompt_tokens: int
    """Of all requests together."""

    @property
    def cached_share(self) -> float:
        """Share of all prompt tokens found in the cache."""
        return 1.0 - sum(self.uncached_tokens) / self.prompt_tokens


def reuse_of(requests: Iterable[TimedRequest], rule: Rule, capacity_blocks: int | None = None) -> Reuse:
    """Play `requests` in order through one cache that inserts each at once. Raises ValueError without any."""
    cache = PrefixCacheModel(rule, capacity_blocks)
    uncached: list[int] = []
    total = 0
    for request in requests:
        blocks = request.full_blocks
        found = cache.match_blocks(blocks) * request.block_tokens
        uncached.append(max(1, request.prompt_tokens - found))
        total += request.prompt_tokens
        cache.insert(blocks)
    if not uncached:
        raise ValueError("no request to play")
    return Reuse(rule, tuple(uncached), total)


def uncached_tokens(requests: Iterable[TimedRequest], rule: Rule) -> list[int]:
    """Uncached length of each request with a cache that never evicts."""
    return list(reuse_of(requests, rule).uncached_tokens)
