"""A bounded prefix cache over block ids, with both rules of reuse.

Full-attention KV is found by whole blocks; recurrent state only at exactly the length where a prompt ended
(`exact`), and the new prompt must be longer than what it reuses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

Key: TypeAlias = tuple[int, int]
"""A block: its place in the prompt, and the id that stands for it and all before it."""


class BlockCache:
    """Least recently used chains go first: a block is kept at least as long as any that extends it.

    Keys are the chain's own ids: two prompts with the same id at the same place agree on all before it.
    """

    def __init__(self, block_tokens: int, capacity_tokens: int | None, exact: bool) -> None:
        self.block_tokens, self.capacity_tokens, self.exact = block_tokens, capacity_tokens, exact
        self.on_change: Callable[[Sequence[Key], Sequence[Key], Key | None], None] | None = None
        """Called with what was stored, in chain order, what was evicted, and where a state was saved."""
        self.on_clear: Callable[[], None] | None = None
        self._blocks: OrderedDict[Key, None] = OrderedDict()
        self._ends: OrderedDict[Key, int] = OrderedDict()
        """Where a state was saved: the (place, id) of the last block, to its length in tokens."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def used_tokens(self) -> int:
        return len(self._blocks) * self.block_tokens

    def match(self, block_ids: Sequence[int], prompt_tokens: int) -> int:
        """How many of the prompt's first tokens can be reused: always fewer than it has."""
        depth, blocks = 0, self._blocks
        for place, block in enumerate(block_ids):
            if (place, block) not in blocks:
                break
            depth += 1
        if not self.exact:
            return min(
                depth * self.block_tokens, (prompt_tokens - 1) // self.block_tokens * self.block_tokens
            )
        for place in range(min(depth, len(block_ids)) - 1, -1, -1):
            length = self._ends.get((place, block_ids[place]))
            if length is not None and length < prompt_tokens:
                return length
        return 0

    def insert(self, block_ids: Sequence[int], prompt_tokens: int, block_tokens: int | None = None) -> None:
        """Hold the prompt's whole blocks, and the state at its end; the longest unused make room.

        `block_tokens` is the size of the prompt's blocks, which an empty cache takes over: prompts can't be
        told apart at a finer grain than theirs. Raises ValueError for a second size.
        """
        if block_tokens is not None and block_tokens != self.block_tokens:
            if self._blocks:
                raise ValueError(
                    f"blocks of {block_tokens} tokens in a cache that holds blocks of {self.block_tokens}"
                )
            self.block_tokens = block_tokens
        whole = block_ids[: prompt_tokens // self.block_tokens]
        if not whole:
            return
        blocks, new = self._blocks, []
        # From the end, so that a chain's beginning is always the younger part.
        for place in range(len(whole) - 1, -1, -1):
            key = (place, whole[place])
            if key in blocks:
                blocks.move_to_end(key)
            else:
                blocks[key] = None
                new.append(key)
        last = (len(whole) - 1, whole[-1])
        if self.exact:
            self._ends[last] = len(whole) * self.block_tokens
            self._ends.move_to_end(last)
        if self.on_change is not None:
            self.on_change(new[::-1], (), last if self.exact else None)
        self.fit(self.capacity_tokens)

    def fit(self, capacity_tokens: int | None) -> None:
        """Evict until no more than this is held."""
        if capacity_tokens is None:
            return
        most = max(0, capacity_tokens) // self.block_tokens
        gone = []
        while len(self._blocks) > most:
            key, _ = self._blocks.popitem(last=False)
            self._ends.pop(key, None)
            gone.append(key)
        if gone and self.on_change is not None:
            self.on_change((), gone, None)

    def clear(self) -> None:
        self._blocks.clear()
        self._ends.clear()
        if self.on_clear is not None:
            self.on_clear()
