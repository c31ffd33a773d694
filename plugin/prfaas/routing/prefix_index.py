"""Who holds which prefix, over all servers of all sites.

Full attention   block-level: one table a model, from a block's hash to the set of its holders (a bit each).
A hash is chained, so that it stands for everything up to its block; a prefix is usable as far as each of
its blocks is there. State            linear attention and sliding windows: request-level. It can be reused
only at exactly the length where it was saved, which KV events don't say; `on_state` does. The rule
(SGLang's `no_buffer`): a state is left at the prompt's end and at the end of prompt and output less one
token; a server has so many slots for them, each request under way has one as well, and what is allocated
while none is free pushes out the least recently used.

A prefix is usable where every layer group has it, and always shorter than the prompt: the last token is
computed.

A million blocks take about 80 bytes each: masks are shared objects, and a server that is cleared gets a new
bit instead of a walk through the table; stale bits are swept when they have become many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

from prfaas.model.errors import UsageError
from prfaas.model.ids import InstanceId, ModelId
from prfaas.routing.kv_events import K_GPU, AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

K_STALE_BITS = 64  # cleared servers after which the table is swept
K_STALE_SHARE = 0.5  # or when so much of it may be of cleared servers
K_SMALL_TABLE = 10_000  # blocks below which the share doesn't matter


@dataclass(frozen=True, slots=True)
class IndexStatistics:
    """What the index holds and what it had to ignore."""

    blocks: int
    """Different blocks, all models."""
    holders: Mapping[InstanceId, int]
    """Blocks by server."""
    states: int
    odd_blocks: int
    """Blocks ignored for another size than the model's."""


@dataclass(slots=True)
class _Holder:
    model: ModelId
    bit: int
    hybrid: bool
    states_limit: int | None
    blocks: int = 0
    running: int = 0
    """Requests under way, each with a slot of its own."""
    states: OrderedDict[int, None] = field(default_factory=OrderedDict)


class _Table:
    """One model's blocks."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.masks: dict[int, int] = {}
        self.states: dict[int, int] = {}
        self.by_bit: dict[int, InstanceId] = {}
        self.live = 0
        """Bits of servers as they are now; others are stale."""
        self.hybrid = 0
        """Those among them that need a state."""
        self._next_bit = 1
        self._stale_bits = 0
        self._stale_blocks = 0
        self._shared: dict[int, int] = {}

    def take_bit(self, holder: InstanceId, hybrid: bool) -> int:
        bit, self._next_bit = self._next_bit, self._next_bit << 1
        self.by_bit[bit] = holder
        self.live |= bit
        self.hybrid |= bit if hybrid else 0
        return bit

    def retire_bit(self, bit: int, blocks: int) -> None:
        """Its holder had so many blocks; they stay as stale entries until the next sweep."""
        del self.by_bit[bit]
        self.live &= ~bit
        self.hybrid &= ~bit
        self._stale_bits += 1
        self._stale_blocks += blocks

    def share(self, mask: int) -> int:
        """The one object that stands for this mask."""
        return self._shared.setdefault(mask, mask)

    def sweep_due(self) -> bool:
        limit = max(K_SMALL_TABLE, K_STALE_SHARE * len(self.masks))
        return self._stale_bits >= K_STALE_BITS or self._stale_blocks > limit

    def sweep(self, holders: Iterable[_Holder]) -> None:
        """Numbers the bits anew from 0 and drops what only stale bits held."""
        moves: dict[int, int] = {}
        self.hybrid = 0
        for place, holder in enumerate(holders):
            moves[holder.bit] = holder.bit = 1 << place
            self.hybrid |= holder.bit if holder.hybrid else 0
        old, self._shared = self._shared, {}
        translate = {
            mask: self.share(sum(new for before, new in _moved(mask & self.live, moves))) for mask in old
        }
        self.masks = {block: translate[mask] for block, mask in self.masks.items() if translate[mask]}
        self.states = {
            block: moved
            for block, mask in self.states.items()
            if (moved := sum(new for _, new in _moved(mask & self.live, moves)))
        }
        self.by_bit = {moves[bit]: name for bit, name in self.by_bit.items()}
        self.live = sum(self.by_bit)
        self._stale_bits, self._stale_blocks, self._next_bit = 0, 0, 1 << len(self.by_bit)


def _moved(mask: int, moves: Mapping[int, int]) -> Iterable[tuple[int, int]]:
    return [(before, new) for before, new in moves.items() if mask & before]


class PrefixIndex:
    """Fed by `apply` and `on_state`, asked by `lookup`. Models are independent of one another."""

    def __init__(self) -> None:
        self._tables: dict[ModelId, _Table] = {}
        self._holders: dict[InstanceId, _Holder] = {}
        self._odd_blocks = 0

    def add_model(self, model: ModelId, block_tokens: int) -> None:
        """A model whose servers cache in blocks of this many tokens.

        Raises UsageError while there are servers of it with blocks of another size.
        """
        if block_tokens < 1:
            raise UsageError(f"model {model!r}: block_tokens is {block_tokens}; must be at least 1")
        known = self._tables.get(model)
        if known is None or (known.block_tokens != block_tokens and not known.live):
            self._tables[model] = _Table(block_tokens)
        elif known.block_tokens != block_tokens:
            raise UsageError(
                f"model {model!r}: block_tokens is {block_tokens}, but {known.block_tokens} elsewhere"
            )

    def add_holder(
        self, holder: InstanceId, model: ModelId, *, hybrid: bool = False, states_limit: int | None = None
    ) -> None:
        """A server that holds nothing yet. states_limit: its slots for states, those of requests under way
        included. Raises UsageError.
        """
        table = self._tables.get(model)
        if table is None:
            raise UsageError(f"server {holder!r}: model {model!r} is unknown to the index")
        if holder in self._holders:
            raise UsageError(f"server {holder!r} is in the index already")
        self._holders[holder] = _Holder(model, table.take_bit(holder, hybrid), hybrid, states_limit)

    def remove_holder(self, holder: InstanceId) -> None:
        """It left. Unknown servers are ignored."""
        known = self._holders.pop(holder, None)
        if known is not None:
            self._retire(known)

    def clear(self, holder: InstanceId) -> None:
        """It holds nothing: restarted, flushed, or not known any more."""
        known = self._holders.get(holder)
        if known is None or (known.blocks == 0 and not known.states):
            return
        self._retire(known)
        known.bit = self._tables[known.model].take_bit(holder, known.hybrid)

    def apply(self, holder: InstanceId, events: Iterable[KvEvent]) -> None:
        """A server's events, in order. Those of servers that aren't in the index are ignored."""
        known = self._holders.get(holder)
        if known is None:
            return
        table = self._tables[known.model]
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.clear(holder)
            elif event.medium not in K_GPU:
                continue  # a slower tier: not counted on
            elif isinstance(event, BlockStored):
                if event.block_size != table.block_tokens:
                    self._odd_blocks += len(event.block_hashes)
                    continue
                self._store(table, known, event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self._remove(table, known, event.block_hashes)

    def blocks(self, holder: InstanceId) -> int:
        """That it has, by its events; 0 for servers that aren't in the index."""
        known = self._holders.get(holder)
        return 0 if known is None else known.blocks

    def on_started(self, holder: InstanceId, block_hash: int | None) -> None:
        """`holder` takes up a request, which reuses the state at the end of this block."""
        known = self._holders.get(holder)
        if known is None or not known.hybrid:
            return
        known.running += 1
        if block_hash is not None and block_hash in known.states:
            known.states.move_to_end(block_hash)
        self._make_room(known, 0)

    def on_ended(self, holder: InstanceId) -> None:
        """A request that was told by on_started has left its slot."""
        known = self._holders.get(holder)
        if known is not None and known.running:
            known.running -= 1

    def on_state(self, holder: InstanceId, block_hash: int) -> None:
        """`holder` saved a state at the end of this block; or used it, which makes it the youngest again."""
        known = self._holders.get(holder)
        if known is None or not known.hybrid:
            return
        if block_hash in known.states:
            known.states.move_to_end(block_hash)
            return
        self._make_room(known, 1)
        known.states[block_hash] = None
        states = self._tables[known.model].states
        states[block_hash] = states.get(block_hash, 0) | known.bit

    def _make_room(self, known: _Holder, wanted: int) -> None:
        if known.states_limit is None:
            return
        states = self._tables[known.model].states
        while known.states and len(known.states) + known.running + wanted > known.states_limit:
            oldest, _ = known.states.popitem(last=False)
            _drop_bit(states, oldest, known.bit)

    def lookup(self, model: ModelId, hashes: Sequence[int], prompt_tokens: int) -> dict[InstanceId, int]:
        """Usable prefix in tokens by server; servers without any aren't listed."""
        table = self._tables.get(model)
        if table is None or not hashes:
            return {}
        # The last token is always computed, so that the block it ends isn't reused.
        most = min(len(hashes), (prompt_tokens - 1) // table.block_tokens)
        # Most holders of a table have nothing of a given prompt: its first block sorts them out.
        there = table.masks.get(hashes[0], 0) & table.live if most > 0 else 0
        if not there:
            return {}
        block_tokens, by_bit = table.block_tokens, table.by_bit
        usable: dict[InstanceId, int] = {}
        if there & table.hybrid:
            for bit, length in self._state_lengths(table, hashes, most, there & table.hybrid):
                usable[by_bit[bit]] = length * block_tokens
        if there & ~table.hybrid:
            for bit, depth in self._depths(table, hashes, most, there & ~table.hybrid):
                usable[by_bit[bit]] = depth * block_tokens
        return usable

    def statistics(self) -> IndexStatistics:
        return IndexStatistics(
            blocks=sum(len(table.masks) for table in self._tables.values()),
            holders={name: holder.blocks for name, holder in self._holders.items()},
            states=sum(len(holder.states) for holder in self._holders.values()),
            odd_blocks=self._odd_blocks,
        )

    @staticmethod
    def _depths(table: _Table, hashes: Sequence[int], most: int, bits: int) -> list[tuple[int, int]]:
        """(bit, blocks) for each of `bits`, which are holders of the first block, by bisection.

        A server evicts a block after all that extend it, so that what it holds of a chain is a beginning of
        it: log2(blocks) steps for each different depth.
        """
        depths: list[tuple[int, int]] = []
        get = table.masks.get
        todo = [(1, most, bits)]  # holders of these bits have between low and high blocks
        while todo:
            low, high, bits = todo.pop()
            if low < high:
                middle = (low + high + 1) // 2
                there = get(hashes[middle - 1], 0) & bits
                if there:
                    todo.append((middle, high, there))
                if there != bits:
                    todo.append((low, middle - 1, bits & ~there))
            else:
                while bits:
                    bit = bits & -bits
                    bits ^= bit
                    depths.append((bit, low))
        return depths

    @staticmethod
    def _state_lengths(table: _Table, hashes: Sequence[int], most: int, bits: int) -> list[tuple[int, int]]:
        """(bit, blocks) for each of `bits` that has a state along the chain: its longest.

        Whoever has the block of a state has all before it.
        """
        states, masks = table.states, table.masks
        found: list[tuple[int, int]] = []
        # All in C: of hundreds of blocks hardly any has a state.
        saved = list(compress(range(most), map(states.__contains__, hashes)))
        for place in reversed(saved):
            block = hashes[place]
            there = states[block] & masks.get(block, 0) & bits
            while there:
                bit = there & -there
                there ^= bit
                bits ^= bit
                found.append((bit, place + 1))
            if not bits:
                break
        return found

    def _store(self, table: _Table, known: _Holder, hashes: list[int]) -> None:
        masks, bit, share = table.masks, known.bit, table.share
        for block in hashes:
            mask = masks.get(block, 0)
            if not mask & bit:
                masks[block] = share(mask | bit)
                known.blocks += 1

    def _remove(self, table: _Table, known: _Holder, hashes: list[int]) -> None:
        masks, bit = table.masks, known.bit
        for block in hashes:
            mask = masks.get(block, 0)
            if mask & bit:
                known.blocks -= 1
                if mask == bit:
                    del masks[block]
                else:
                    masks[block] = table.share(mask & ~bit)
            if block in known.states:
                del known.states[block]
                _drop_bit(table.states, block, bit)

    def _retire(self, known: _Holder) -> None:
        table = self._tables[known.model]
        for block in known.states:
            _drop_bit(table.states, block, known.bit)
        known.states.clear()
        table.retire_bit(known.bit, known.blocks)
        known.blocks = 0
        if table.sweep_due():
            holders = [
                holder
                for holder in self._holders.values()
                if holder.model == known.model and holder.bit in table.by_bit
            ]
            table.sweep(holders)


def _drop_bit(masks: dict[int, int], block: int, bit: int) -> None:
    mask = masks.get(block, 0) & ~bit
    if mask:
        masks[block] = mask
    else:
        masks.pop(block, None)
