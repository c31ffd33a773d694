"""The bounded prefix cache of a profiled instance; pure.

Full-attention KV is kept by whole blocks: any whole-block prefix can be reused. Recurrent state is kept by
exact length: a prefix can be reused only at a length where a state was saved. A hybrid model needs both at
once, and (as SGLang's `no_buffer` cache) the new prompt must be longer than what it reuses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from prfaas.routing import block_hashes


@dataclass
class _Block:
    hash: int
    parent: _Block | None
    tokens: tuple[int, ...]
    children: int = 0
    pins: int = 0
    states: OrderedDict[tuple[int, ...], None] = field(default_factory=OrderedDict)
    """Tails after this block at whose end a state was saved; () is the block's own end."""

    def weight_tokens(self) -> int:
        return len(self.tokens) + sum(len(tail) for tail in self.states)


Pins = list[_Block]


@dataclass(frozen=True)
class Stored:
    """Blocks that the cache now holds, in chain order; as SGLang's BlockStored event."""

    hashes: tuple[int, ...]
    parent: int | None
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Removed:
    hashes: tuple[int, ...]


@dataclass(frozen=True)
class Cleared:
    pass


Change = Stored | Removed | Cleared


class PrefixCache:
    """Blocks of `block_tokens`; with `exact`, a saved state is needed too. `changes` grows until drained."""

    def __init__(self, block_tokens: int, exact: bool) -> None:
        self.block_tokens, self.exact = block_tokens, exact
        self.changes: list[Change] = []
        self.used_tokens = 0
        self._blocks: dict[int, _Block] = {}
        self._root = _Block(0, None, ())
        # Unpinned leaves, the longest unused first.
        self._leaves: OrderedDict[int, _Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens a prompt can reuse; always fewer than it has."""
        chain = self._chain(tokens)
        if not self.exact:
            length = len(chain) * self.block_tokens
            return min(length, (len(tokens) - 1) // self.block_tokens * self.block_tokens)
        best = 0
        for depth, block in enumerate([self._root, *chain]):
            base = depth * self.block_tokens
            for tail in block.states:
                end = base + len(tail)
                if best < end < len(tokens) and tuple(tokens[base:end]) == tail:
                    best = end
        return best

    def pin(self, tokens: Sequence[int], length: int) -> Pins:
        """Keep what the first `length` tokens reuse from eviction; what `unpin` takes."""
        if length == 0:
            return []
        # A short prompt's state hangs on the root.
        blocks = [self._root, *self._chain(tokens)[: -(-length // self.block_tokens)]]
        for block in blocks:
            block.pins += 1
            self._leaves.pop(block.hash, None)
        return blocks

    def unpin(self, pinned: Pins) -> None:
        for block in reversed(pinned):
            block.pins -= 1
            self._maybe_leaf(block)

    def insert(self, tokens: Sequence[int]) -> int:
        """Hold all whole blocks of `tokens` (and a state at its end); tokens by which the cache grew."""
        before, size = self.used_tokens, self.block_tokens
        block, fresh = self._root, []
        whole = len(tokens) // size
        for i, value in enumerate(block_hashes(tokens, size)):
            piece = tuple(tokens[i * size : (i + 1) * size])
            found = self._blocks.get(value)
            if found is None:
                found = _Block(value, block if block is not self._root else None, piece)
                self._blocks[value] = found
                self.used_tokens += size
                block.children += 1
                self._leaves.pop(block.hash, None)
                fresh.append(found)
            block = found
            if block.hash in self._leaves:
                self._leaves.move_to_end(block.hash)
        if self.exact:
            tail = tuple(tokens[whole * size :])
            if tail not in block.states:
                block.states[tail] = None
                self.used_tokens += len(tail)
        if block is not self._root:
            self._maybe_leaf(block)
        if fresh:
            parent = fresh[0].parent
            self.changes.append(
                Stored(
                    tuple(item.hash for item in fresh),
                    parent.hash if parent else None,
                    tuple(token for item in fresh for token in item.tokens),
                )
            )
        return self.used_tokens - before

    def evict(self, wanted_tokens: int) -> int:
        """Drop the longest unused leaves until `wanted_tokens` are free or none is left; tokens freed."""
        freed, gone = 0, []
        while freed < wanted_tokens and self._leaves:
            value, block = self._leaves.popitem(last=False)
            freed += block.weight_tokens()
            gone.append(value)
            del self._blocks[value]
            parent = block.parent
            if parent is None:
                self._root.children -= 1
            else:
                parent.children -= 1
                self._maybe_leaf(parent, oldest=True)
        if freed < wanted_tokens and self._root.states and not self._root.pins:
            freed += self._root.weight_tokens()
            self._root.states.clear()
        self.used_tokens -= freed
        if gone:
            self.changes.append(Removed(tuple(gone)))
        return freed

    def clear(self) -> None:
        """Forget everything, pinned or not (a flush, a role switch)."""
        self._blocks.clear()
        self._leaves.clear()
        self._root = _Block(0, None, ())
        self.used_tokens = 0
        self.changes.append(Cleared())

    def drain(self) -> list[Change]:
        changes, self.changes = self.changes, []
        return changes

    def _chain(self, tokens: Sequence[int]) -> list[_Block]:
        chain: list[_Block] = []
        for value in block_hashes(tokens, self.block_tokens):
            block = self._blocks.get(value)
            if block is None:
                break
            chain.append(block)
        return chain

    def _maybe_leaf(self, block: _Block, oldest: bool = False) -> None:
        # By identity: a pin may outlive a flush.
        if block.pins == 0 and block.children == 0 and self._blocks.get(block.hash) is block:
            self._leaves[block.hash] = block
            self._leaves.move_to_end(block.hash, last=not oldest)
