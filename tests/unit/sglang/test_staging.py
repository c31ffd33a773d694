"""Host memory between a pump and pages it can't reach: no byte lost, none shared, all given back."""

from __future__ import annotations

import threading
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prfaas.model.errors import LocalProtocolError, RemoteProtocolError
from prfaas.sglang.planning import U64, Segments
from prfaas.sglang.staging import K_ALIGN_BYTES, HostMemory, Places, Staging, cut_long, runs

K_POOL_BYTES = 64 * K_ALIGN_BYTES


def u64(values: list[int]) -> U64:
    return np.array(values, dtype=np.uint64)


class PoolMachine(RuleBasedStateMachine):
    """Any taking and giving back."""

    def __init__(self) -> None:
        super().__init__()
        self.staging = Staging(K_POOL_BYTES, HostMemory())
        self.taken: dict[int, int] = {}

    @rule(size=st.integers(1, K_POOL_BYTES))
    def take(self, size: int) -> None:
        address = self.staging.take(size)
        if address is not None:
            self.taken[address] = size

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.taken)))
        del self.taken[address]
        self.staging.give(address)

    @invariant()
    def nobody_shares_and_nothing_is_outside(self) -> None:
        end = self.staging.address
        for address, size in sorted(self.taken.items()):
            assert address >= end
            end = address + size
        assert end <= self.staging.address + K_POOL_BYTES

    @invariant()
    def all_is_free_when_all_is_given_back(self) -> None:
        if not self.taken:
            assert self.staging.free_bytes == K_POOL_BYTES


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_what_was_not_taken_cannot_be_given_back() -> None:
    staging = Staging(K_POOL_BYTES, HostMemory())
    address = staging.take(10)
    assert address is not None
    staging.give(address)
    with pytest.raises(KeyError):
        staging.give(address)


def test_taking_waits_for_memory_and_says_when_there_never_is_so_much() -> None:
    staging = Staging(K_POOL_BYTES, HostMemory())
    address = staging.take(K_POOL_BYTES)
    assert address is not None
    assert staging.take(1) is None
    with pytest.raises(LocalProtocolError, match="are 16384"):
        staging.take(K_POOL_BYTES + 1)
    giving = threading.Timer(0.01, staging.give, (address,))
    giving.start()
    assert staging.take(1, timeout_s=10.0) == address
    giving.join()


def test_a_closed_region_is_unpinned_so_that_the_next_one_may_lie_there() -> None:
    class Pinned(HostMemory):
        """As CUDA: what is pinned already can't be pinned."""

        def __init__(self, at: set[int]) -> None:
            self.at = at

        def adopt(self, address: int, size_bytes: int) -> None:
            assert address not in self.at
            self.at.add(address)

        def abandon(self, address: int) -> None:
            self.at.remove(address)

    at: set[int] = set()
    for _ in range(3):
        staging = Staging(K_POOL_BYTES, Pinned(at))
        assert len(at) == 1
        staging.close()
        del staging
    assert at == set()


pieces_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths=pieces_strategy, order=st.randoms(use_true_random=False))
def test_bytes_go_through_staging_on_both_sides_to_where_they_belong(
    lengths: list[int], order: object
) -> None:
    # Pages of 64 bytes here and there, in another order on either side.
    n = len(lengths)
    source, target = (
        np.random.default_rng(n).integers(1, 256, 64 * n, dtype=np.uint8),
        np.zeros(64 * n, np.uint8),
    )
    at = list(range(n))
    order.shuffle(at)  # type: ignore[attr-defined]
    from_, to = int(source.ctypes.data), int(target.ctypes.data)
    plan = Segments(u64([from_ + 64 * i for i in range(n)]), u64([to + 64 * i for i in at]), u64(lengths))

    sender, receiver = Staging(K_POOL_BYTES, HostMemory()), Staging(K_POOL_BYTES, HostMemory())
    pages = np.stack((plan.destination, plan.length), axis=1)
    leased = receiver.take(int(pages[:, 1].sum()))
    assert leased is not None
    places = Places.from_bytes(Places.laid_out(pages, leased).to_bytes())
    staged = sender.take(plan.total_bytes)
    assert staged is not None
    out = sender.copy_out(plan, staged)
    onto = places.translate(out.destination, out.length)
    HostMemory().copy_out(out.source, out.length, onto)  # the network
    receiver.copy_in(places)
    for i, (j, length) in enumerate(zip(at, lengths, strict=True)):
        assert target[64 * j : 64 * j + length].tolist() == source[64 * i : 64 * i + length].tolist()
        assert not target[64 * j + length : 64 * j + 64].any()


steps = st.integers(-3, 5)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), steps, steps), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_pieces_are_the_same_ones_in_the_same_order_whatever_runs_they_make(
    groups: list[tuple[int, int, int, int]], jumps: Random
) -> None:
    wanted: list[tuple[int, int, int]] = []
    for length, count, page_step, host_step in groups:
        page, host = jumps.randrange(1000, 2000), jumps.choice((wanted[-1][2] + 3 if wanted else 50, 5000))
        wanted += [(page + i * page_step, length, host + i * host_step) for i in range(count)]
    found = [
        (run.page + i * run.page_step, run.length, run.host + i * run.host_step)
        for run in runs(*(u64(list(column)) for column in zip(*wanted, strict=True)))
        for i in range(run.count)
    ]
    assert found == wanted


def test_slices_are_gathered_out_of_their_slots_and_scattered_into_others() -> None:
    slots, other = np.random.default_rng(1).integers(0, 256, (2, 300, 256), dtype=np.uint8)
    wanted, staging, memory = other.copy(), np.zeros((300, 64), np.uint8), HostMemory()
    wanted[::-1, 128:192] = slots[:, 64:128]
    token = np.arange(300, dtype=np.uint64)
    host, length = token * 64 + staging.ctypes.data, u64([64] * 300)
    memory.copy_out(token * 256 + (slots.ctypes.data + 64), length, host)
    assert (staging == slots[:, 64:128]).all()
    memory.copy_in(host, length, token[::-1] * 256 + (other.ctypes.data + 128))
    assert (other == wanted).all()


def test_slices_of_a_page_are_one_run_and_what_goes_backwards_or_over_another_is_none() -> None:
    tokens, pages = 64, [7, 3, 12, 11]
    slots = [(p * tokens + t) * 256 + 64 for p in pages for t in range(tokens)]
    host = [64 * i for i in range(len(slots))]
    found = list(runs(u64(slots), u64([64] * len(slots)), u64(host)))
    assert [run.count for run in found] == [tokens] * len(pages)
    for step in (63, -64):
        slots = [4096 + step * i for i in range(9)]
        assert [run.count for run in runs(u64(slots), u64([64] * 9), u64(host[:9]))] == [1] * 9


@pytest.mark.parametrize(("address", "length"), [(99, 1), (100, 11), (110, 1), (0, 1), (210, 1), (205, 6)])
def test_destination_that_no_piece_holds_is_refused(address: int, length: int) -> None:
    places = Places.laid_out(np.array([[100, 10], [200, 10]], dtype=np.uint64), 5000)
    assert places.translate(u64([205]), u64([5])).tolist() == [5015]
    with pytest.raises(LocalProtocolError, match="outside"):
        places.translate(u64([address]), u64([length]))


@pytest.mark.parametrize("data", [b"", b"x" * 23])
def test_table_of_places_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Places.from_bytes(data)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=8), most=st.integers(1, 50))
def test_cut_segments_are_the_same_bytes_in_the_same_order(lengths: list[int], most: int) -> None:
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    plan = Segments(u64(starts), u64([s + 10_000 for s in starts]), u64(lengths))
    cut = cut_long(plan, most)
    assert int(cut.length.max()) <= most
    assert [
        b for s, n in zip(cut.source.tolist(), cut.length.tolist(), strict=True) for b in range(s, s + n)
    ] == list(range(sum(lengths)))
    assert (cut.destination - cut.source == 10_000).all()


@given(lengths=st.lists(st.integers(1, 3 * K_POOL_BYTES), min_size=1, max_size=8))
def test_parts_each_fit_a_share_of_the_pool_and_together_are_all_of_it(lengths: list[int]) -> None:
    staging = Staging(K_POOL_BYTES, HostMemory())
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    parts = list(staging.parts(Segments(u64(starts), u64(starts), u64(lengths))))
    assert all(0 < part.total_bytes <= K_POOL_BYTES // 4 for part in parts)
    assert sum(part.total_bytes for part in parts) == sum(lengths)
