"""KV that leaves layer by layer: a stand-in for SGLang's scheduler runs chunked prefills over real memory,
and a pump that copies at once shows what was in the pages when they were sent.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
from collections.abc import Iterator
from enum import IntEnum
from queue import Queue
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import FailureReason, LeaseGrant, Outcome, TransferKind
from prfaas.pump_client import Transfer
from prfaas.sglang import compat, layers, touch_points
from prfaas.sglang.ahead import Ahead, Forward, Piece, Written
from prfaas.sglang.planning import InlineExecutor, RecordingEngine, Segments
from prfaas.sglang.rooms import SendingRoom, SendingRooms

K_ROOM, K_SESSION = 7, "peer/1:4242"
K_LAYERS, K_TOKEN_BYTES, K_POOL_TOKENS = 3, 8, 512


class KVPoll(IntEnum):
    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class Mode(IntEnum):
    PREFILL = 1
    DECODE = 2


class Tensor(np.ndarray):
    """As much of torch's as is asked for."""

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> Any:
        return np.asarray(self)

    def data_ptr(self) -> int:
        return int(self.ctypes.data)


def tensor(array: Any) -> Tensor:
    return np.asarray(array).view(Tensor)


class StandInManager:
    """SGLang's mapping for equal parallelism: page i of a buffer to page j of the peer's."""

    def update_status(self, room: int, status: KVPoll) -> None:
        self.request_status[room] = status  # type: ignore[attr-defined]

    def conclude_transfer(self, *, bootstrap_room: int, status: KVPoll, targets: Any) -> None:
        self.request_status[bootstrap_room] = status  # type: ignore[attr-defined]

    def conclude_failure(self, *, bootstrap_room: int, failure_reason: str) -> None:
        raise AssertionError(failure_reason)

    def send_kvcache(
        self, session: str, have: Any, there: Any, wanted: Any, executor: Any, **more: Any
    ) -> int:
        page = self.kv_args.kv_item_lens[0]  # type: ignore[attr-defined]
        for ours, theirs in zip(self.kv_args.kv_data_ptrs, there, strict=True):  # type: ignore[attr-defined]
            rows = [ours + int(i) * page for i in have], [theirs + int(j) * page for j in wanted]
            self.engine.batch_transfer_sync(session, *rows, [page] * len(have))  # type: ignore[attr-defined]
        return 0

    def send_aux(self, request: Any, index: int, pointers: Any) -> int:
        ours = self.kv_args.aux_data_ptrs[0]  # type: ignore[attr-defined]
        return int(self.engine.batch_transfer_sync("s", [ours], [pointers[0]], [8]))  # type: ignore[attr-defined]

    def _get_dsa_cache_transfer_skip_flags(self, info: Any) -> tuple[bool, bool]:
        return False, False


class CopyingPump:
    """Reads the source when it is submitted, as a pump may."""

    def __init__(self) -> None:
        self.kinds: list[TransferKind] = []
        self.sent_bytes = 0
        self.transfers: list[Transfer] = []

    def submit(self, grant: Any, sources: Any, destinations: Any, lengths: Any, **how: Any) -> Transfer:
        for source, destination, length in zip(sources, destinations, lengths, strict=True):
            ctypes.memmove(int(destination), int(source), int(length))
        self.kinds.append(how["kind"])
        self.sent_bytes += int(np.sum(lengths)) if how["kind"] is TransferKind.KV else 0
        self.transfers.append(Transfer(len(self.transfers) + 1))
        return self.transfers[-1]

    def cancel(self, transfer: Transfer) -> None:
        transfer.end(Outcome(False, FailureReason.CANCELLED))


class Sender:
    bootstrap_room, curr_idx = K_ROOM, 0


class Rig:
    """A prefill server's scheduler, its pools, its worker, and a decode server's pools."""

    def __init__(self, module: ModuleType, page: int, overlap: str = "layer") -> None:
        self.page = page
        shape = (2 * K_LAYERS, K_POOL_TOKENS, K_TOKEN_BYTES)
        # Not written yet is 0, at the decode side 9.
        self.ours, self.theirs = np.zeros(shape, np.uint8), np.full(shape, 9, np.uint8)
        self.aux = np.arange(16, dtype=np.uint8)
        self.pool = SimpleNamespace(
            start_layer=0,
            k_buffer=[tensor(b) for b in self.ours[:K_LAYERS]],
            v_buffer=[tensor(b) for b in self.ours[K_LAYERS:]],
        )
        self.queue: Queue[Any] = Queue()
        self.ahead: list[int] = []
        """Of each chunk that was handed over, what of its room had left before."""
        self.pump = CopyingPump()
        m = module.LayerSide.__new__(module.LayerSide)
        m.kv_args = SimpleNamespace(
            kv_data_ptrs=[int(b.ctypes.data) for b in self.ours],
            kv_item_lens=[page * K_TOKEN_BYTES] * len(self.ours),
            aux_data_ptrs=[int(self.aux.ctypes.data)],
        )
        m.server_args = SimpleNamespace(device="cpu")
        m.disaggregation_mode, m.attn_tp_size, m.deadline_s = Mode.PREFILL, 1, 30.0
        m.is_mla_backend = m.is_hybrid_mla_backend = False
        m.request_status = {K_ROOM: KVPoll.WaitingForInput}
        m.transfer_queues, m.staging = [self.queue], None
        m.engine = RecordingEngine(self.pump, "s")  # type: ignore[arg-type]
        m.asked = SimpleNamespace(under_way=lambda room: None, end=lambda room: None)
        m.verification = SimpleNamespace(
            sending=lambda chunk, ahead_bytes: self.ahead.append(ahead_bytes),
            fault=lambda kind, segments, room: segments,
        )
        m.sending = SendingRooms(self.pump, "rank 0", m._sent)  # type: ignore[arg-type]
        m._open_overlap(overlap, Sender)
        self.manager = m
        self.grant = LeaseGrant("h:1", 1, b"t" * 16, K_ROOM, 1, 1 << 20)
        m.sending.granted(K_SESSION, self.grant)
        m.decode_kv_args_table = {
            K_SESSION: SimpleNamespace(
                requires_dcp_relayout=False,
                dst_attn_tp_size=1,
                dst_kv_ptrs=[int(b.ctypes.data) for b in self.theirs],
                dst_kv_layer_ids=[],
                dst_kv_item_len=0,
                dst_aux_ptrs=[int(self.aux.ctypes.data) + 8],
            )
        }

    def request(self, n_tokens: int, decode_has: int, cached: int) -> Any:
        """A request whose pages lie scattered on both sides; `cached`: what prefill has of it."""
        n_pages = -(-n_tokens // self.page)
        order = np.random.default_rng(1).permutation(K_POOL_TOKENS // self.page)
        self.pages = order[:n_pages]
        self.wanted = order[::-1][: n_pages - decode_has // self.page].astype(np.int32)
        tokens = (self.pages[:, None] * self.page + np.arange(self.page)).reshape(-1)[:n_tokens]
        self.tokens, self.decode_has = tokens, decode_has
        self.ours[:, tokens[:cached]] = 1
        self.manager.transfer_infos = {
            K_ROOM: {
                K_SESSION: SimpleNamespace(
                    room=K_ROOM, mooncake_session_id=K_SESSION, is_dummy=False, dst_kv_indices=self.wanted
                )
            }
        }
        self.sender = Sender()
        return SimpleNamespace(
            disagg_kv_sender=self.sender,
            pending_bootstrap=False,
            to_finish=None,
            origin_input_ids=[0] * n_tokens,
            prefix_len=cached,
            extend_end=None,
            start_send_idx=decode_has,
            kv=SimpleNamespace(req_pool_idx=0),
            mamba_branching_seqlen=None,
            swa_branching_seqlen=None,
        )

    def forward(self, req: Any, end: int, between: Any = lambda: None, halves: bool = False) -> None:
        """One pass over tokens up to `end`, layer by layer."""
        req.extend_end = end
        begin, table = req.prefix_len, tensor(self.tokens[None, :].astype(np.int32))
        scheduler = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(req_to_token=table),
            token_to_kv_pool_allocator=SimpleNamespace(
                page_size=self.page, translate_kv_indices_for_transfer=lambda raw: raw
            ),
        )
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(name="EXTEND"), reqs=[req], extend_num_tokens=end - begin
        )

        def run(scheduler: Any, batch: Any) -> None:
            for layer in range(K_LAYERS):
                for cut in (begin + (end - begin) // 2, end) if halves else (end,):
                    loc = self.tokens[begin:cut]
                    self.ours[[layer, K_LAYERS + layer], loc[:, None]] = 1
                    layers.mha_wrote(None, self.pool, SimpleNamespace(layer_id=layer), loc, None, None)
                between()

        layers.run_batch(run, scheduler, batch)
        req.prefix_len = end

    def hand_over(self, req: Any, end: int) -> None:
        """As SGLang sends a chunk."""
        last = end == len(req.origin_input_ids)
        upto = -(-end // self.page) if last else end // self.page
        first = req.start_send_idx // self.page
        pages = self.pages[first:upto].astype(np.int32)
        position = self.sender.curr_idx
        self.sender.curr_idx += len(pages)
        req.start_send_idx = end if last else upto * self.page
        self.queue.put(
            SimpleNamespace(
                room=K_ROOM,
                prefill_kv_indices=pages,
                index_slice=slice(position, position + len(pages)),
                is_last_chunk=last,
                prefill_aux_index=0,
                state_indices=None,
                wait_event=None,
                indices_event=None,
            )
        )

    def work(self, at_most: int = 1 << 30) -> None:
        """The worker, for a while."""
        inline = InlineExecutor()
        while at_most and not self.queue.empty():
            self.manager._hand_over(self.queue.get(), inline)
            at_most -= 1

    def landed(self) -> bool:
        """Whether the peer has what was computed, of the pages that it lacks."""
        there = (self.wanted[:, None] * self.page + np.arange(self.page)).reshape(-1)
        n_tokens = len(self.tokens) - self.decode_has
        return bool((self.theirs[:, there[:n_tokens]] == 1).all())

    def bytes_wanted(self) -> int:
        return len(self.wanted) * self.page * K_TOKEN_BYTES * 2 * K_LAYERS


def forget() -> None:
    for name in ("layer_side", "prefill_side"):
        sys.modules.pop(f"prfaas.sglang.{name}", None)


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        for name, thing in {
            "MooncakeKVManager": StandInManager,
            "KVPoll": KVPoll,
            "DisaggregationMode": Mode,
            "unwrap_write_loc": lambda loc: (loc, None, None),
        }.items():
            patch.setitem(vars(compat), name, thing)
        patch.setattr("prfaas.sglang.ahead.K_LEAST_BYTES", 1)
        forget()
        yield importlib.import_module("prfaas.sglang.layer_side")
        layers.use(None)
        forget()


@pytest.fixture
def rig(module: ModuleType) -> Rig:
    return Rig(module, page=1)


@given(data=st.data())
def test_the_peer_gets_each_byte_once_and_never_before_it_was_written(module: ModuleType, data: Any) -> None:
    """Whatever the page, the chunks, what either side has already, when the worker runs, and whether SGLang
    hands a chunk over after its pass or after the next one was begun."""
    page = data.draw(st.sampled_from([1, 4, 16]))
    rig = Rig(module, page)
    n_tokens = data.draw(st.integers(2, 200))
    decode_has = data.draw(st.integers(0, (n_tokens - 1) // page)) * page
    cached = data.draw(st.integers(0, n_tokens - 1))
    req = rig.request(n_tokens, decode_has, cached)
    lagging, some = data.draw(st.booleans()), st.integers(0, 5)
    owed: list[int] = []
    while req.prefix_len < n_tokens:
        end = data.draw(st.integers(req.prefix_len + 1, n_tokens))
        rig.forward(req, end, lambda: rig.work(data.draw(some)), halves=data.draw(st.booleans()))
        if end <= decode_has and end < n_tokens:
            continue
        owed.append(end)
        if not lagging or len(owed) > 1 or end == n_tokens:
            for one in owed if end == n_tokens or not lagging else owed[:-1]:
                rig.hand_over(req, one)
            del owed[: len(owed) if end == n_tokens or not lagging else -1]
        rig.work(data.draw(some))
    rig.work()
    assert rig.landed()
    assert rig.pump.sent_bytes == rig.bytes_wanted()
    assert rig.pump.kinds[-1] is TransferKind.AUX
    for transfer in rig.pump.transfers:
        transfer.end(Outcome(True))
    assert rig.manager.request_status[K_ROOM] is KVPoll.Success
    assert len(rig.manager.ahead) == len(rig.manager.sending) == 0


def test_layers_leave_before_their_chunk_is_handed_over(rig: Rig) -> None:
    req = rig.request(100, 0, 0)
    sent: list[int] = []

    def between() -> None:
        rig.work()
        sent.append(rig.pump.sent_bytes)

    rig.forward(req, 100, between)
    layer = 100 * K_TOKEN_BYTES * 2
    assert sent == [layer, 2 * layer, 3 * layer]
    rig.hand_over(req, 100)
    rig.work()
    assert rig.pump.sent_bytes == rig.ahead[0] == 3 * layer
    assert rig.landed()


@pytest.mark.parametrize(("overlap", "after_each"), [("chunk", [60, 100]), ("end", [0, 100])])
def test_by_chunk_and_at_the_end_nothing_leaves_earlier(
    module: ModuleType, overlap: str, after_each: list[int]
) -> None:
    rig = Rig(module, 1, overlap)
    req = rig.request(100, 0, 0)
    for end, tokens in zip((60, 100), after_each, strict=True):
        before = rig.pump.sent_bytes
        rig.forward(req, end, rig.work)
        assert rig.pump.sent_bytes == before
        rig.hand_over(req, end)
        rig.work()
        assert rig.pump.sent_bytes == tokens * K_TOKEN_BYTES * 2 * K_LAYERS
    assert rig.landed()


def test_nothing_of_an_aborted_room_is_sent_after(rig: Rig) -> None:
    req = rig.request(100, 0, 0)
    sent: list[int] = []

    def between() -> None:
        rig.work()
        sent.append(rig.pump.sent_bytes)
        rig.manager.request_status[K_ROOM] = KVPoll.Failed
        rig.manager.sending.cancel(K_ROOM, "aborted")
        rig.manager._forget_overlap(K_ROOM)

    rig.forward(req, 100, between)
    rig.hand_over(req, 100)
    rig.work()
    assert sent == [sent[0]] * K_LAYERS
    assert rig.pump.sent_bytes == sent[0]
    assert len(rig.manager.ahead) == 0


def test_layers_of_an_earlier_life_are_not_sent_under_a_newer_lease(rig: Rig) -> None:
    req = rig.request(100, 0, 0)
    newer = LeaseGrant("h:1", 2, b"u" * 16, K_ROOM, 2, 1 << 20)
    rig.forward(req, 100)
    rig.work(1)  # planned, nothing sent
    rig.manager.sending.granted(K_SESSION, newer)
    rig.work()
    assert rig.pump.sent_bytes == 0
    rig.hand_over(req, 100)  # the newer life's chunk goes whole
    rig.work()
    assert rig.pump.sent_bytes == rig.bytes_wanted()


def test_pages_that_were_not_foreseen_are_sent_whole(module: ModuleType) -> None:
    grant = object()
    row = np.array([1], dtype=np.uint64)
    ahead = Ahead([100])
    one = Segments(row + np.uint64(100), row, row)
    ahead.add(K_ROOM, Piece(K_SESSION, grant, 0, np.array([5]), one, ahead.buffers_of(one.source)))
    planned: list[tuple[int, int]] = []

    def plan(begin: int, end: int) -> Segments:
        planned.append((begin, end))
        return one

    segments, again = ahead.rest(K_ROOM, K_SESSION, grant, 0, np.array([6, 7]), plan)
    assert planned == [(0, 2)]
    assert not again
    assert len(segments) == 1
    assert len(ahead) == 0


class PromptPump(CopyingPump):
    """Reads the source and ends the transfer when it is submitted."""

    def submit(self, *arguments: Any, **how: Any) -> Transfer:
        transfer = super().submit(*arguments, **how)
        transfer.end(Outcome(True))
        return transfer


@given(data=st.data())
def test_whichever_pages_sglang_keeps_of_each_chunk_the_peer_has_what_was_computed(
    module: ModuleType, data: Any
) -> None:
    rig = Rig(module, data.draw(st.sampled_from([1, 4])))
    pump = PromptPump()
    rig.manager.engine._pump = rig.manager.sending._pump = pump
    n_tokens = data.draw(st.integers(2, 100))
    req, some = rig.request(n_tokens, 0, 0), st.integers(0, 5)
    while req.prefix_len < n_tokens:
        begin, end = req.prefix_len, data.draw(st.integers(req.prefix_len + 1, n_tokens))
        rig.forward(req, end, lambda: rig.work(data.draw(some)))
        if data.draw(st.booleans()):
            # What is whole of the chunk is in the tree: its pages are kept, and the filled ones given away.
            filled = slice(-(-begin // rig.page), end // rig.page)
            spare = np.setdiff1d(np.arange(K_POOL_TOKENS // rig.page), rig.pages)
            kept = spare[: len(rig.pages[filled])]
            at, to = (np.add.outer(p * rig.page, np.arange(rig.page)) for p in (rig.pages[filled], kept))
            rig.ours[:, to.reshape(-1)], rig.ours[:, at.reshape(-1)] = 1, 77
            rig.pages[filled] = kept
            rig.tokens[:] = np.add.outer(rig.pages * rig.page, np.arange(rig.page)).reshape(-1)[:n_tokens]
        rig.hand_over(req, end)
        rig.work(data.draw(some))
    rig.work()
    assert rig.landed()
    assert len(rig.manager.ahead) == len(rig.manager.sending) == 0


class LatePump(CopyingPump):
    """Reads the source, and ends the transfer, when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: Queue[Any] = Queue()

    def submit(self, *arguments: Any, **how: Any) -> Transfer:
        transfer = Transfer(self.waiting.qsize() + 100)
        self.waiting.put((transfer, arguments, how))
        return transfer

    def land(self) -> None:
        transfer, arguments, how = self.waiting.get(timeout=10)
        super().submit(*arguments, **how)
        transfer.end(Outcome(True))


def test_where_sglang_keeps_other_pages_than_were_filled_the_chunks_own_bytes_are_the_last_to_land(
    rig: Rig,
) -> None:
    """As it does where the prefix tree has the tokens already; those that were filled are anybody's then."""
    pump = LatePump()
    for user in (rig.manager.engine, rig.manager.sending):
        user._pump = pump
    req = rig.request(100, 0, 0)
    rig.forward(req, 100, rig.work)
    n_ahead = pump.waiting.qsize()
    assert n_ahead == K_LAYERS
    kept = np.setdiff1d(np.arange(K_POOL_TOKENS), rig.pages)[:100]
    rig.ours[:, kept], rig.ours[:, rig.pages] = 1, 77
    rig.pages = kept
    rig.hand_over(req, 100)
    worker = threading.Thread(target=rig.work)
    worker.start()
    for left in reversed(range(n_ahead)):
        assert pump.waiting.qsize() == left + 1
        pump.land()
    assert not rig.landed()
    pump.land()
    worker.join(timeout=10)
    assert rig.landed()
    assert pump.sent_bytes == 2 * rig.bytes_wanted()


def broken(*_: Any, **__: Any) -> Any:
    raise PrfaasError("no guard is free")


@pytest.mark.parametrize("what", ["the transfers", "the pass", "a part of the layer"])
def test_layers_that_left_before_a_trouble_are_waited_for_where_sglang_keeps_other_pages(
    rig: Rig, what: str
) -> None:
    pump, manager = LatePump(), rig.manager
    manager.sending._pump = pump
    manager.deadline_s = 0.0
    req = rig.request(100, 0, 0)
    staged = manager._staged

    def staged_in_part(*arguments: Any) -> Iterator[Any]:
        yield from staged(*arguments)
        broken()

    with pytest.MonkeyPatch.context() as patch:
        if what == "a part of the layer":
            patch.setattr(manager, "_staged", staged_in_part)

        def between() -> None:
            rig.work()
            if what == "the transfers":
                patch.setattr(pump, "submit", broken)
            elif what == "the pass":
                patch.setattr(manager.asked, "under_way", broken)

        rig.forward(req, 100, between)
    assert pump.waiting.qsize() == 1
    rig.pages = np.setdiff1d(np.arange(K_POOL_TOKENS), rig.pages)[:100]
    rig.hand_over(req, 100)
    with pytest.raises(PrfaasError, match="hasn't landed in time"):
        rig.work()
    assert pump.waiting.qsize() == 1


def test_after_a_trouble_what_has_not_left_goes_with_its_chunk_and_the_next_chunks_layers_leave_again(
    rig: Rig,
) -> None:
    req = rig.request(100, 0, 0)
    send, tried = rig.manager.sending.send, list[int]()

    def all_but_the_second(*arguments: Any) -> bool:
        tried.append(1)
        return bool(broken() if len(tried) == 2 else send(*arguments))

    rig.manager.sending.send = all_but_the_second
    layer = 2 * K_TOKEN_BYTES
    rig.forward(req, 60, rig.work)
    assert rig.pump.sent_bytes == 60 * layer
    rig.hand_over(req, 60)
    rig.work()
    assert rig.pump.sent_bytes == 60 * layer * K_LAYERS
    rig.forward(req, 100, rig.work)
    assert rig.pump.sent_bytes == rig.bytes_wanted()
    rig.hand_over(req, 100)
    rig.work()
    assert rig.landed()
    assert rig.pump.sent_bytes == rig.bytes_wanted()


@pytest.mark.parametrize("kind", ["mamba", "swa"])
def test_what_is_computed_again_for_want_of_a_state_leaves_with_its_chunk(rig: Rig, kind: str) -> None:
    req = rig.request(100, 0, 0)
    setattr(req, f"{kind}_branching_seqlen", 40)
    for end in (60, 100):
        rig.forward(req, end, rig.work)
        rig.hand_over(req, end)
        rig.work()
    assert rig.ahead == [0, 40 * K_TOKEN_BYTES * 2 * K_LAYERS]
    assert rig.landed()
    assert rig.pump.sent_bytes == rig.bytes_wanted()


def test_a_room_whose_layers_never_land_fails_rather_than_be_overwritten(rig: Rig) -> None:
    pump = LatePump()
    rig.manager.sending._pump = pump
    rig.manager.deadline_s = 0.0
    req = rig.request(100, 0, 0)
    rig.forward(req, 100, rig.work)
    rig.pages = np.setdiff1d(np.arange(K_POOL_TOKENS), rig.pages)[:100]
    rig.hand_over(req, 100)
    with pytest.raises(PrfaasError, match="hasn't landed in time"):
        rig.work()
    assert pump.waiting.qsize() == K_LAYERS


def test_what_fails_in_watching_costs_no_request(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    req = rig.request(100, 0, 0)
    del req.origin_input_ids
    ran: list[int] = []
    layers.run_batch(lambda scheduler, batch: ran.append(1), None, SimpleNamespace(
        forward_mode=SimpleNamespace(name="EXTEND"), reqs=[req], extend_num_tokens=1
    ))  # fmt: skip
    assert ran == [1]
    assert "KV leaves chunk by chunk" in caplog.text
    assert layers._here is None


def test_the_hooks_are_on_the_scheduler_and_on_both_kinds_of_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked: list[tuple[str, str]] = []
    registry = SimpleNamespace(register=lambda target, hook, kind: hooked.append((target, kind)))
    monkeypatch.setitem(vars(compat), "HookRegistry", registry)
    monkeypatch.setitem(vars(compat), "HookType", SimpleNamespace(AROUND="around", AFTER="after"))
    layers.register_in_scheduler()
    assert hooked == [
        (touch_points.K_RUN_BATCH, "around"),
        (touch_points.K_MHA_WRITE, "after"),
        (touch_points.K_MLA_WRITE, "after"),
        (touch_points.K_MLA_WRITE_PARTS, "after"),
    ]


def test_a_concluded_room_leaves_no_pieces(rig: Rig) -> None:
    req = rig.request(100, 0, 0)
    rig.forward(req, 50)
    rig.work()
    rig.manager._sent(SendingRoom(K_ROOM), None)
    assert len(rig.manager.ahead) == 0


def test_the_scheduler_only_notes(rig: Rig) -> None:
    """Planning and sending are the worker's: without it a pass leaves nothing but items on its queue."""
    req = rig.request(100, 0, 0)
    threads = threading.active_count()
    rig.forward(req, 100)
    assert rig.pump.transfers == []
    assert rig.queue.qsize() == 1 + K_LAYERS
    assert threading.active_count() == threads


def test_what_goes_wrong_with_layers_is_told_at_the_first_time_and_ever_more_rarely(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    req = rig.request(100, 0, 0)
    del rig.manager.decode_kv_args_table[K_SESSION].dst_kv_ptrs
    for end in (20, 40, 60):
        rig.forward(req, end)
        rig.work()
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        f"prfaas: room {K_ROOM}: its layers go with their chunk; times that this was so: {n}" for n in (1, 2)
    ]
    assert rig.pump.sent_bytes == 0


def test_of_a_room_that_is_forgotten_while_it_is_sent_nothing_stays(rig: Rig) -> None:
    req = rig.request(100, 0, 0)
    send = rig.manager.sending.send

    def aborted_meanwhile(*arguments: Any) -> bool:
        sent = bool(send(*arguments))
        rig.manager._forget_overlap(K_ROOM)
        return sent

    rig.manager.sending.send = aborted_meanwhile
    rig.forward(req, 100)
    rig.work()
    assert rig.pump.sent_bytes > 0
    assert len(rig.manager.ahead) == 0


def test_a_gpu_that_fails_while_layers_are_sent_costs_their_room_time_and_the_worker_lives(rig: Rig) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error")

    req = rig.request(100, 0, 0)
    rig.forward(req, 100)
    for item in list(rig.queue.queue):
        if isinstance(item, Forward):
            item.written[-1] = Written(item.written[-1].buffers, SimpleNamespace(synchronize=broken))
    rig.hand_over(req, 100)
    rig.queue.put(None)
    rig.manager.transfer_worker(rig.queue, None)
    assert rig.queue.empty()
    assert rig.landed()
    assert rig.ahead == [0]
