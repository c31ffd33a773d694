"""The prefix index against a plain model: many servers, evictions, restarts, both kinds of reuse."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prfaas.model.errors import UsageError
from prfaas.routing import AllBlocksCleared, BlockRemoved, BlockStored, PrefixIndex, block_hashes

BLOCK = 4


def index(*, hybrid: bool = False, states_limit: int | None = None) -> PrefixIndex:
    made = PrefixIndex()
    made.add_model("m", BLOCK)
    made.add_holder("a", "m", hybrid=hybrid, states_limit=states_limit)
    made.add_holder("b", "m")
    return made


def test_a_prefix_is_as_long_as_its_blocks_are_there() -> None:
    made = index()
    made.apply("a", [BlockStored([1, 2, 3], BLOCK)])
    made.apply("b", [BlockStored([1], BLOCK)])
    assert made.lookup("m", (1, 2, 3, 4), 100) == {"a": 12, "b": 4}
    assert made.lookup("m", (9, 8, 7), 100) == {}
    assert made.lookup("other", (1, 2), 100) == {}


def test_the_last_token_is_never_reused() -> None:
    made = index()
    made.apply("a", [BlockStored([1, 2, 3], BLOCK)])
    assert made.lookup("m", (1, 2, 3), 12) == {"a": 8}
    assert made.lookup("m", (1, 2, 3), 13) == {"a": 12}
    assert made.lookup("m", (1,), 4) == {}


def test_state_is_reused_only_where_it_was_saved() -> None:
    made = index(hybrid=True)
    made.apply("a", [BlockStored([1, 2, 3, 4], BLOCK)])
    assert made.lookup("m", (1, 2, 3, 4, 5), 21) == {}
    made.on_state("a", 2)
    assert made.lookup("m", (1, 2, 3, 4, 5), 21) == {"a": 8}
    made.on_state("a", 4)
    assert made.lookup("m", (1, 2, 3, 4, 5), 21) == {"a": 16}
    assert made.lookup("m", (1, 2, 3, 4), 16) == {"a": 8}  # the new prompt must be longer
    assert made.lookup("m", (1, 2, 3, 7), 21) == {"a": 8}
    made.apply("a", [BlockRemoved([4])])
    assert made.lookup("m", (1, 2, 3, 4, 5), 21) == {"a": 8}


def test_the_oldest_state_goes_first() -> None:
    made = index(hybrid=True, states_limit=2)
    made.apply("a", [BlockStored([1, 2, 3], BLOCK)])
    for block in (1, 2, 1, 3):
        made.on_state("a", block)
    assert made.lookup("m", (1, 2), 100) == {"a": 4}
    assert made.statistics().states == 2


def test_requests_under_way_take_slots_from_states() -> None:
    made = index(hybrid=True, states_limit=3)
    made.apply("a", [BlockStored([1, 2, 3], BLOCK)])
    for block in (1, 2):
        made.on_state("a", block)
    made.on_started("a", 1)  # which makes its state the younger one
    assert made.statistics().states == 2
    made.on_started("a", None)
    assert made.statistics().states == 1
    assert made.lookup("m", (1, 2), 100) == {"a": 4}
    for _ in range(3):
        made.on_ended("a")  # once too often
    for block in (2, 3):
        made.on_state("a", block)
    assert made.statistics().states == 3


def test_events_that_say_nothing_of_this_cache_are_ignored() -> None:
    made = index()
    made.apply("a", [BlockStored([1], BLOCK + 1), BlockStored([2], BLOCK, medium="CPU_PINNED")])
    made.apply("stranger", [BlockStored([1], BLOCK)])
    made.on_state("a", 1)
    assert made.lookup("m", (1,), 100) == {}
    assert made.lookup("m", (2,), 100) == {}
    assert made.statistics().odd_blocks == 1


def test_models_do_not_mix() -> None:
    made = index()
    made.add_model("n", 8)
    made.add_holder("c", "n")
    made.apply("a", [BlockStored([1], BLOCK)])
    made.apply("c", [BlockStored([1], 8)])
    assert made.lookup("m", (1,), 100) == {"a": 4}
    assert made.lookup("n", (1,), 100) == {"c": 8}
    made.remove_holder("c")
    made.remove_holder("c")
    assert made.lookup("n", (1,), 100) == {}


def test_wrong_use_is_refused() -> None:
    made = index()
    for wrong in (
        lambda: made.add_model("m", BLOCK + 1),
        lambda: made.add_model("x", 0),
        lambda: made.add_holder("a", "m"),
        lambda: made.add_holder("z", "unknown"),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_a_models_blocks_may_be_cut_otherwise_once_nobody_serves_it() -> None:
    made = index()
    made.apply("a", [BlockStored([1], BLOCK)])
    for holder in list(made.statistics().holders):
        made.remove_holder(holder)
    made.add_model("m", BLOCK + 1)
    made.add_holder("a", "m")
    assert made.lookup("m", (1,), 100) == {}
    made.apply("a", [BlockStored([1], BLOCK + 1)])
    assert made.lookup("m", (1,), 100) == {"a": BLOCK + 1}


def test_blocks_stay_small() -> None:
    """Bytes a block: the table's slot, the hash, and nothing else of its own."""
    made = index()
    count = 100_000
    made.apply("a", [BlockStored(list(range(2**62, 2**62 + count)), BLOCK)])
    table = made._tables["m"].masks
    own = sys.getsizeof(table) + sum(sys.getsizeof(block) for block in table)
    assert own / count < 120
    assert len({id(mask) for mask in table.values()}) == 1


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 9))
def test_hashes_name_the_whole_prefix(tokens: list[int], block_tokens: int) -> None:
    hashes = block_hashes(tokens, block_tokens)
    assert len(hashes) == len(tokens) // block_tokens
    for cut in range(0, len(tokens), 3):
        part = block_hashes(tokens[:cut], block_tokens)
        assert part == hashes[: len(part)]
    if hashes:
        other = block_hashes([tokens[0] ^ 1, *tokens[1:]], block_tokens)
        assert all(one != two for one, two in zip(hashes, other, strict=True))


def test_hashes_are_sglangs() -> None:
    """SHA-256 of the token ids as 32-bit little-endian words, chained; recorded from SGLang's own rule."""
    import hashlib

    first = hashlib.sha256(b"\x01\0\0\0\x02\0\0\0").digest()
    second = hashlib.sha256(first + b"\x03\0\0\0\x04\0\0\0").digest()
    wanted = tuple(int.from_bytes(digest[:8], "big", signed=True) for digest in (first, second))
    assert block_hashes([1, 2, 3, 4, 5], 2) == wanted


@pytest.mark.parametrize(("tokens", "block_tokens"), [([1], 0), ([-1], 1), ([2**32], 1)])
def test_impossible_tokens_are_refused(tokens: list[int], block_tokens: int) -> None:
    with pytest.raises(ValueError):
        block_hashes(tokens, block_tokens)


CHAINS = [tuple(chain * 100 + place for place in range(6)) for chain in range(3)]
# two chains share a beginning
CHAINS.append((*CHAINS[0][:3], 901, 902, 903))
SERVERS = ["a", "b", "c"]
chains = st.sampled_from(CHAINS)
servers = st.sampled_from(SERVERS)


class IndexMachine(RuleBasedStateMachine):
    """Servers that store chains from the front and evict from the back, as a radix tree does."""

    @initialize(stale_bits=st.sampled_from([1, 3, 64]))
    def start(self, stale_bits: int) -> None:
        import prfaas.routing.prefix_index as module

        module.K_STALE_BITS, self.before = stale_bits, module.K_STALE_BITS
        self.module = module
        self.index = PrefixIndex()
        self.index.add_model("m", BLOCK)
        self.held: dict[str, set[int]] = {}
        self.states: dict[str, set[int]] = {}
        for name in SERVERS:
            self.join(name)

    def join(self, name: str) -> None:
        self.index.add_holder(name, "m", hybrid=name == "c")
        self.held[name], self.states[name] = set(), set()

    @rule(name=servers, chain=chains, depth=st.integers(1, 6))
    def store(self, name: str, chain: tuple[int, ...], depth: int) -> None:
        if name in self.held:
            self.index.apply(name, [BlockStored(list(chain[:depth]), BLOCK)])
            self.held[name] |= set(chain[:depth])

    @rule(name=servers, chain=chains, depth=st.integers(0, 5))
    def evict(self, name: str, chain: tuple[int, ...], depth: int) -> None:
        gone = set(chain[depth:])
        for other in CHAINS:  # what extends an evicted block went before it
            for place, block in enumerate(other):
                if block in gone:
                    gone |= set(other[place:])
        if name in self.held:
            self.index.apply(name, [BlockRemoved(sorted(gone, reverse=True))])
            self.held[name] -= gone
            self.states[name] -= gone

    @rule(chain=chains, place=st.integers(0, 5))
    def state(self, chain: tuple[int, ...], place: int) -> None:
        if chain[place] in self.held.get("c", ()):
            self.index.on_state("c", chain[place])
            self.states["c"].add(chain[place])

    @rule(name=servers, how=st.sampled_from(["event", "clear", "leave"]))
    def restart(self, name: str, how: str) -> None:
        if name not in self.held:
            self.join(name)
            return
        if how == "leave":
            self.index.remove_holder(name)
            del self.held[name], self.states[name]
            return
        if how == "event":
            self.index.apply(name, [AllBlocksCleared()])
        else:
            self.index.clear(name)
        self.held[name], self.states[name] = set(), set()

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "index"):
            return
        for chain in CHAINS:
            for tokens in (len(chain) * BLOCK, len(chain) * BLOCK + 1):
                wanted = {}
                for name, held in self.held.items():
                    usable = 0
                    for place, block in enumerate(chain):
                        length = (place + 1) * BLOCK
                        if block not in held or length >= tokens:
                            break
                        if name != "c" or block in self.states[name]:
                            usable = length
                    if usable:
                        wanted[name] = usable
                assert self.index.lookup("m", chain, tokens) == wanted
        told = self.index.statistics()
        assert told.holders == {name: len(held) for name, held in self.held.items()}

    def teardown(self) -> None:
        if hasattr(self, "module"):
            self.module.K_STALE_BITS = self.before


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
