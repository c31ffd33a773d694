"""A bounded prefix cache over block ids, with both rules of reuse.

Full-attention KV is found by whole blocks; recurrent state only at exactly the length where a prompt ended
(`exact`), and the new prompt must be longer than what it reuses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockCache:
    """Least recently used chains go first: a block is kept at least as long as any that extends it.

    Keys are the chain's own ids: two prompts with the same id at the same place agree on all before it.
    """

    def __init__(self, block_tokens: int, capacity_tokens: int | None, exact: bool) -> None:
        self.block_tokens, self.capacity_tokens, self.exact = block_tokens, capacity_tokens, exact
        self._blocks: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._ends: OrderedDict[tuple[int, int], int] = OrderedDict()
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

    def insert(self, block_ids: Sequence[int], prompt_tokens: int) -> None:
        """Hold the prompt's whole blocks, and the state at its end; the longest unused make room."""
        whole = block_ids[: prompt_tokens // self.block_tokens]
        if not whole:
            return
        blocks = self._blocks
        # From the end, so that a chain's beginning is always the younger part.
        for place in range(len(whole) - 1, -1, -1):
            key = (place, whole[place])
            if key in blocks:
                blocks.move_to_end(key)
            else:
                blocks[key] = None
        if self.exact:
            last = (len(whole) - 1, whole[-1])
            self._ends[last] = len(whole) * self.block_tokens
            self._ends.move_to_end(last)
        self.fit(self.capacity_tokens)

    def fit(self, capacity_tokens: int | None) -> None:
        """Evict until no more than this is held."""
        if capacity_tokens is None:
            return
        most = max(0, capacity_tokens) // self.block_tokens
        while len(self._blocks) > most:
            key, _ = self._blocks.popitem(last=False)
            self._ends.pop(key, None)

    def clear(self) -> None:
        self._blocks.clear()
        self._ends.clear()
