"""The manager's own decisions, on a stand-in for SGLang's classes that keeps rooms as they do."""

from __future__ import annotations

import importlib
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from enum import IntEnum
from functools import partial
from pathlib import Path
from queue import Queue
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from prfaas.model.decisions import Verdict
from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import FailureReason, LeaseGrant, Outcome
from prfaas.pump_client import Arrival, Offer, Transfer
from prfaas.sglang import compat, passage
from prfaas.sglang.refusal import Refusal
from prfaas.sglang.rooms import Remembered


class KVPoll(IntEnum):
    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class Mode(IntEnum):
    PREFILL = 1
    DECODE = 2

    @property
    def value(self) -> Any:
        return self.name.lower()


def kv_args(**changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "page_size": 1,
        "kv_cache_dtype_str": "bfloat16",
        "kv_data_ptrs": [1 << 20, 2 << 20],
        "kv_data_lens": [4096, 4096],
        "kv_item_lens": [16, 16],
        "aux_data_ptrs": [3 << 20],
        "aux_item_lens": [8],
        "state_types": [],
        "state_data_ptrs": [],
        "state_data_lens": [],
        "state_item_lens": [],
    }
    return SimpleNamespace(**{**fields, **changes})


class StandInManager:
    """What of Mooncake's manager ours leans on, with the same rules for rooms."""

    mode: ClassVar[Mode] = Mode.PREFILL

    def __init__(self, args: Any, mode: Mode, server_args: Any = None, is_mla_backend: bool = False) -> None:
        self.kv_args, self.disaggregation_mode = args, mode
        self.server_args = SimpleNamespace(served_model_name="m")
        self.attn_tp_size, self.rank_port, self.local_ip = 1, 4242, "127.0.0.1"
        self.is_mla_backend = self.is_hybrid_mla_backend = False
        self.request_status: dict[int, KVPoll] = {}
        self.failure_records: dict[int, str] = {}
        self.failure_lock = threading.Lock()
        self.required_prefill_response_num_table: dict[int, int] = {}
        self.prefill_info_table: dict[str, Any] = {}
        self.addr_to_rooms_tracker: defaultdict[str, set[int]] = defaultdict(set)
        self.recomputed: list[Any] = []
        self.transfer_infos: dict[int, dict[str, Any]] = {}
        self.decode_kv_args_table: dict[str, Any] = {}
        self.told: list[tuple[int, KVPoll, str | None]] = []
        self.inbox: list[list[bytes]] = []
        self.sent: Queue[tuple[str, str]] = Queue()
        self.init_engine()

    def init_engine(self) -> None: ...

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        if bootstrap_addr.endswith(":16"):
            raise RuntimeError("Page size mismatch")
        self.prefill_info_table[bootstrap_addr] = bootstrap_addr
        return True

    def submit_prefill_recompute(self, kv_receiver: Any, payload: dict[str, Any]) -> None:
        self.recomputed.append(payload)

    def teardown(self) -> None:
        self.recomputed.append("torn down")

    def _prefill_unique_rank(self) -> int:
        return 0

    def update_status(self, bootstrap_room: int, status: KVPoll) -> None:
        current = self.request_status.get(bootstrap_room)
        if current is None:
            if status in (KVPoll.Bootstrapping, KVPoll.WaitingForInput):
                self.request_status[bootstrap_room] = status
        elif status == KVPoll.Failed:
            self.request_status[bootstrap_room] = status
        elif current != KVPoll.Failed:
            self.request_status[bootstrap_room] = max(current, status)

    def record_failure(self, bootstrap_room: int, failure_reason: str) -> None:
        self.failure_records[bootstrap_room] = failure_reason

    def _room_notify_targets(self, bootstrap_room: int) -> list[str]:
        return ["decode"] if bootstrap_room in self.transfer_infos else []

    def send_kv_status_message(
        self, *, targets: Any, bootstrap_room: int, status: Any, failure_reason: Any = None
    ) -> None:
        self.told += [(bootstrap_room, status, failure_reason)] if targets else []

    def _send_multipart_locked(self, endpoint: str, parts: list[bytes], is_ipv6: bool = False) -> None:
        self.sent.put((endpoint, threading.current_thread().name))

    def conclude_transfer(
        self, *, bootstrap_room: int, status: Any, targets: Any = None, failure_reason: Any = None
    ) -> None:
        if bootstrap_room not in self.request_status:
            return
        if status == KVPoll.Failed:
            failure_reason = self.failure_records.setdefault(bootstrap_room, failure_reason)
        self.update_status(bootstrap_room, status)
        targets = ["decode"] if targets is None else targets
        self.send_kv_status_message(
            targets=targets, bootstrap_room=bootstrap_room, status=status, failure_reason=failure_reason
        )

    def conclude_failure(self, *, bootstrap_room: int, failure_reason: str, targets: Any = None) -> None:
        self.conclude_transfer(
            bootstrap_room=bootstrap_room,
            status=KVPoll.Failed,
            targets=targets,
            failure_reason=failure_reason,
        )

    def apply_prefill_status(
        self, *, bootstrap_room: int, status: int, prefill_rank: int, failure_reason: str | None = None
    ) -> None:
        if bootstrap_room in self.request_status:
            if status == KVPoll.Failed:
                self.record_failure(bootstrap_room, failure_reason or "no reason")
            self.update_status(bootstrap_room, KVPoll(status))

    def _make_worker_recv(self, socket: Any, timeout_ms: int = 500) -> Any:
        return lambda: self.inbox.pop(0)

    def build_receiver_registration_message(self) -> list[bytes]:
        return [b"None", b"127.0.0.1", b"1", b"session:1", *[b""] * 16]

    def build_receiver_metadata_message(self, **arguments: Any) -> list[bytes]:
        room = str(arguments["bootstrap_room"]).encode()
        return [room, b"127.0.0.1", b"1", b"session:1", b"indices", b"0", b"", b"1", b"0", b""]

    def _get_dsa_cache_transfer_skip_flags(self, info: Any) -> tuple[bool, bool]:
        return False, False

    def send_kvcache(
        self, session: str, have: Any, dst_ptrs: Any, wanted: Any, executor: Any, **more: Any
    ) -> int:
        if len(have) > 100:
            raise ValueError("more pages than a stand-in can map")
        return int(
            self.engine.batch_transfer_sync(session, list(1000 + have), list(2000 + wanted), [1] * len(have))
        )  # type: ignore[attr-defined]

    def send_aux(self, request: Any, index: int, pointers: Any) -> int:
        return int(self.engine.batch_transfer_sync("s", [1], [2], [8]))  # type: ignore[attr-defined]


class FakeLease:
    def __init__(self, grant: LeaseGrant) -> None:
        self.grant, self.revoked = grant, 0
        self.failure: Arrival | None = None
        self.complete = False
        self.callbacks: list[Any] = []

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def revoke(self) -> None:
        self.revoked += 1

    def land(self) -> None:
        self.complete = True
        for callback in self.callbacks:
            callback(self)

    def break_off(self) -> None:
        self.failure = Arrival(1, "kv", 0, 0, "rank 0", 0, False, "source_gone", "prefill has gone")
        for callback in self.callbacks:
            callback(self)


class FakePump:
    address = "127.0.0.1:9"
    hearing: threading.Thread | None = None

    def __init__(self) -> None:
        self.leases: list[FakeLease] = []
        self.transfers: list[Transfer] = []
        self.offers: list[tuple[Offer, int]] = []
        self.released: list[Offer] = []
        self.used: list[Offer | None] = []
        self.verdict: str | None = "admitted"
        """What an offer is told at once."""

    @classmethod
    def open(cls, config: Any, *, name: str = "") -> FakePump:
        return cls()

    @property
    def in_callback(self) -> bool:
        return threading.current_thread() is self.hearing

    def register(self, regions: Any) -> None: ...

    def close(self) -> None: ...

    def grant_lease(
        self, room: int, generation: int, regions: Any, deadline_s: float, **more: Any
    ) -> FakeLease:
        self.leases.append(
            FakeLease(LeaseGrant(self.address, len(self.leases) + 1, b"t", room, generation, 1))
        )
        return self.leases[-1]

    def offer(self, site: str, size_bytes: int, deadline_s: float, *, may_queue: bool) -> Offer:
        offer = Offer(str(len(self.offers)), site)
        self.offers.append((offer, size_bytes))
        if self.verdict is not None:
            offer.hear(self.verdict, "queue-full" if self.verdict == "refused" else "", 2.5, None)
        return offer

    def release(self, offer: Offer) -> None:
        self.released.append(offer)

    def submit(self, *args: Any, **more: Any) -> Transfer:
        self.used.append(more["offer"])
        self.transfers.append(Transfer(len(self.transfers) + 1))
        return self.transfers[-1]

    def cancel(self, transfer: Transfer) -> None:
        transfer.end(Outcome(False, FailureReason.CANCELLED))

    def forward(self, peer: str, host: str, port: int, *, timeout_s: float) -> str:
        return f"127.0.0.1:{port + 1}"


class StandInRole:
    """Sender or receiver."""

    supports_host_tensor_indices = True

    def __init__(self, mgr: Any = None, bootstrap_addr: str = "", bootstrap_room: int | None = None) -> None:
        self.kv_mgr, self.bootstrap_addr, self.bootstrap_room = mgr, bootstrap_addr, bootstrap_room


def forget_backend() -> None:
    """Their classes are made on whatever stood for SGLang's when they were imported."""
    for name in ("backend", "decode_side", "layer_side", "prefill_side"):
        sys.modules.pop(f"prfaas.sglang.{name}", None)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    names = {
        "MooncakeKVManager": StandInManager,
        "MooncakeKVSender": StandInRole,
        "MooncakeKVReceiver": StandInRole,
        "MooncakeKVBootstrapServer": StandInRole,
        "KVPoll": KVPoll,
        "DisaggregationMode": Mode,
        "has_cuda": lambda: False,
    }
    for name, thing in names.items():
        monkeypatch.setitem(vars(compat), name, thing)
    monkeypatch.delenv("PRFAAS_CONFIG", raising=False)
    forget_backend()
    module = importlib.import_module("prfaas.sglang.backend")
    monkeypatch.setattr(module, "LocalPumpClient", FakePump)
    monkeypatch.setattr("prfaas.sglang.plugin.complete", lambda config, prefills: None)
    yield module
    forget_backend()


@pytest.fixture
def prefill(backend: ModuleType) -> Any:
    return backend.PrfaasKVManager(kv_args(), Mode.PREFILL)


@pytest.fixture
def decode(backend: ModuleType) -> Any:
    return backend.PrfaasKVManager(kv_args(), Mode.DECODE)


def metadata(decode: Any, room: int, dummy: bool = False, aux_index: int = 0) -> list[bytes]:
    """What the decode side says of a room's pages."""
    message: list[bytes] = decode.build_receiver_metadata_message(
        bootstrap_room=room,
        kv_indices=np.array([1, 2], dtype=np.int32),
        aux_index=aux_index,
        state_indices=None,
        is_dummy=dummy,
    )
    return message


def hear(prefill: Any, message: list[bytes]) -> list[bytes]:
    prefill.inbox.append(message)
    heard: list[bytes] = prefill._make_worker_recv(None)()
    return heard


# What crosses the control channel


def test_grant_is_taken_off_the_message_and_sglang_reads_its_own_frames(prefill: Any, decode: Any) -> None:
    message = metadata(decode, 7)
    assert hear(prefill, message) == message[:10]
    assert len(prefill.sending) == 1


def test_lease_is_one_for_all_prefill_ranks_of_a_room_and_dummy_ranks_get_none(decode: Any) -> None:
    assert metadata(decode, 7)[11] == metadata(decode, 7)[11]
    assert len(metadata(decode, 8, dummy=True)) == 10
    assert len(decode.pump.leases) == 1


def test_second_request_with_a_room_is_refused_with_what_to_do(prefill: Any, decode: Any) -> None:
    """As all samples of one request have it."""
    hear(prefill, metadata(decode, 7))
    prefill.update_status(7, KVPoll.Bootstrapping)
    hear(prefill, metadata(decode, 7, aux_index=1))
    assert prefill.request_status[7] == KVPoll.Failed
    assert "room 7 is another request's already; SGLang gives all samples" in prefill.failure_records[7]
    assert len(decode.pump.leases) == 1


def test_peer_without_leases_is_told_at_once_even_before_the_request_arrives(
    prefill: Any, decode: Any
) -> None:
    hear(prefill, metadata(decode, 7)[:10])
    [(room, status, reason)] = prefill.told
    assert (room, status) == (7, KVPoll.Failed)
    assert "not prfaas" in reason
    prefill.update_status(7, KVPoll.Bootstrapping)
    assert prefill.request_status[7] == KVPoll.Failed


def test_peer_with_another_layout_is_refused_by_value_at_its_first_request(
    backend: ModuleType, prefill: Any
) -> None:
    other = backend.PrfaasKVManager(kv_args(page_size=64), Mode.DECODE)
    registration = other.build_receiver_registration_message()
    assert hear(prefill, registration) == registration[:20]
    prefill.update_status(7, KVPoll.Bootstrapping)
    hear(prefill, metadata(other, 7))
    assert prefill.request_status[7] == KVPoll.Failed
    assert prefill.failure_records[7] == "page size: prefill has 1, decode has 64"


def test_decode_servers_that_were_refused_are_remembered_up_to_a_bound_the_one_that_still_asks_among_them(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "Remembered", partial(Remembered, most=3))
    prefill = backend.PrfaasKVManager(kv_args(), Mode.PREFILL)
    other = backend.PrfaasKVManager(kv_args(page_size=64), Mode.DECODE)
    asks = other.build_receiver_registration_message()
    hear(prefill, asks)
    for n in range(10):
        prefill.update_status(n, KVPoll.Bootstrapping)
        hear(prefill, metadata(other, n))
        assert prefill.request_status[n] == KVPoll.Failed
        hear(prefill, [*asks[:3], b"restarted:%d" % n, *asks[4:]])
    assert sum(f"restarted:{n}" in prefill.refused_sessions for n in range(10)) == 2


@pytest.mark.parametrize("grant", [b"nonsense", b"{}"])
def test_what_is_no_grant_is_refused(prefill: Any, decode: Any, grant: bytes) -> None:
    hear(prefill, [*metadata(decode, 7)[:11], grant])
    assert "not a lease grant" in prefill.told[0][2] or "Expecting" in prefill.told[0][2]


def test_grant_for_another_room_is_refused(prefill: Any, decode: Any) -> None:
    hear(prefill, [*metadata(decode, 7)[:11], metadata(decode, 8)[11]])
    assert "a lease for room 8" in prefill.told[0][2]


def test_abort_that_overtakes_its_request_is_kept_for_it(prefill: Any, decode: Any) -> None:
    hear(prefill, metadata(decode, 7))
    hear(prefill, [b"ABORT", b"7"])
    assert len(prefill.sending) == 0
    prefill.update_status(7, KVPoll.Bootstrapping)
    assert prefill.request_status[7] == KVPoll.Failed
    assert "before prefill had the request" in prefill.failure_records[7]
    prefill.request_status.clear()
    prefill.update_status(7, KVPoll.Bootstrapping)  # the room's next life is its own
    assert prefill.request_status[7] == KVPoll.Bootstrapping


# Admission


def granted(prefill: Any, decode: Any, room: int, verdict: str | None, *, early: bool = False) -> Offer:
    """A room's grant arrives, and SGLang wants its prefill scheduled; `early`: before the request itself."""
    prefill.pump.verdict = verdict
    if not early:
        prefill.update_status(room, KVPoll.Bootstrapping)
    hear(prefill, metadata(decode, room))
    prefill.transfer_infos[room] = {}
    prefill.update_status(room, KVPoll.WaitingForInput)
    offer: Offer = prefill.pump.offers[-1][0]
    return offer


K_REFUSED = "prfaas_refused: link to : queue-full; retry_after_s=2.50"


def test_ledger_is_asked_for_the_bytes_of_the_pages_and_the_slot(prefill: Any, decode: Any) -> None:
    granted(prefill, decode, 7, "admitted")
    # Two pages of two buffers of 16 bytes each, and a slot of 8.
    assert prefill.pump.offers[-1][1] == 2 * 2 * 16 + 8
    assert prefill.request_status[7] == KVPoll.WaitingForInput


def test_each_of_two_senders_asks_for_its_half(prefill: Any, decode: Any) -> None:
    decode.required_prefill_response_num_table[7] = 2
    granted(prefill, decode, 7, "admitted")
    assert prefill.pump.offers[-1][1] == 36


@pytest.mark.parametrize("early", [False, True])
def test_prefill_is_not_scheduled_before_the_ledger_has_admitted(
    prefill: Any, decode: Any, early: bool
) -> None:
    offer = granted(prefill, decode, 7, None, early=early)
    held = None if early else KVPoll.Bootstrapping
    assert prefill.request_status.get(7) == held
    offer.hear("queued", "", 1.0, None)
    assert prefill.request_status.get(7) == held
    offer.hear("admitted", "", None, 1.0)
    assert prefill.request_status[7] == KVPoll.WaitingForInput
    assert prefill.told == []


@pytest.mark.parametrize("before", [None, "queued"])
def test_refusal_fails_the_room_and_tells_decode_at_once(
    prefill: Any, decode: Any, before: str | None
) -> None:
    offer = granted(prefill, decode, 7, before)
    offer.hear("refused", "queue-full", 2.5, None)
    assert prefill.request_status[7] == KVPoll.Failed
    assert prefill.told == [(7, KVPoll.Failed, K_REFUSED)]
    assert len(prefill.sending) == len(prefill.asked) == 0


def test_refusal_that_overtakes_the_request_is_kept_for_it(prefill: Any, decode: Any) -> None:
    granted(prefill, decode, 7, "refused", early=True)
    assert prefill.told == [(7, KVPoll.Failed, K_REFUSED)]
    assert 7 not in prefill.request_status
    prefill.update_status(7, KVPoll.Bootstrapping)
    assert (prefill.request_status[7], prefill.failure_records[7]) == (KVPoll.Failed, K_REFUSED)


def test_refusal_stays_the_reason_whatever_aborts_follow_from_it(prefill: Any, decode: Any) -> None:
    granted(prefill, decode, 7, "refused", early=True)
    hear(prefill, [b"ABORT", b"7"])  # decode's, which the refusal has reached before the request came here
    prefill.update_status(7, KVPoll.Bootstrapping)
    assert prefill.failure_records[7] == K_REFUSED
    granted(prefill, decode, 8, "refused")
    prefill.record_failure(8, "Aborted by AbortReq.")
    assert prefill.failure_records[8] == K_REFUSED
    prefill.record_failure(9, "first")
    prefill.record_failure(9, "second")
    assert prefill.failure_records[9] == "second"


def test_promise_that_becomes_late_refuses_a_room_that_has_sent_nothing(prefill: Any, decode: Any) -> None:
    offer = granted(prefill, decode, 7, "admitted")
    offer.hear("late", "", None, 200.0)  # late by its promise, in time by the deadline of 300 s
    assert prefill.request_status[7] == KVPoll.WaitingForInput
    offer.hear("late", "", None, None)  # the link is down
    assert prefill.request_status[7] == KVPoll.Failed
    assert "the link's estimate fell; retry_after_s=5.00" in prefill.failure_records[7]


def test_promise_that_becomes_late_leaves_a_room_that_is_under_way(prefill: Any, decode: Any) -> None:
    ready(prefill, decode, 7)
    work(prefill, chunk(7, last=False))
    prefill.pump.offers[-1][0].hear("late", "", None, None)
    assert prefill.request_status[7] == KVPoll.Transferring


def test_transfers_use_the_rooms_place_and_its_end_gives_it_back(prefill: Any, decode: Any) -> None:
    ready(prefill, decode, 7)
    work(prefill, chunk(7))
    offer = prefill.pump.offers[-1][0]
    assert offer.verdict is Verdict.ADMITTED
    assert prefill.pump.used == [offer, offer]
    assert prefill.pump.released == []
    for transfer in prefill.pump.transfers:
        transfer.end(Outcome(True))
    assert prefill.pump.released == [offer]


def test_a_queued_rooms_abort_gives_its_place_back(prefill: Any, decode: Any) -> None:
    offer = granted(prefill, decode, 7, "queued")
    prefill.update_status(7, KVPoll.Failed)
    assert prefill.pump.released == [offer]
    early = granted(prefill, decode, 8, "queued", early=True)
    hear(prefill, [b"ABORT", b"8"])
    assert prefill.pump.released == [offer, early]
    early.hear("admitted", "", None, 1.0)  # too late: the room is over
    assert 8 not in prefill.request_status


def test_room_that_is_given_up_is_told_to_decode_and_to_whoever_grants_pages_later(
    prefill: Any, decode: Any
) -> None:
    ready(prefill, decode, 7)
    prefill.tell_failed(7, "aborted here")
    prefill.tell_failed(8, "aborted here")
    assert prefill.told == [(7, KVPoll.Failed, "aborted here")]  # nobody has granted pages for 8 yet
    hear(prefill, metadata(decode, 8))
    assert prefill.told[-1] == (8, KVPoll.Failed, "aborted here")
    assert [room for room, _, _ in prefill.told] == [7, 8]
    # The number's next life is its own.
    prefill.update_status(7, KVPoll.Bootstrapping)
    hear(prefill, metadata(decode, 7))
    assert len(prefill.told) == 2


# Decode side


def leased(decode: Any, room: int = 7) -> FakeLease:
    decode.update_status(room, KVPoll.Bootstrapping)
    metadata(decode, room)
    lease: FakeLease = decode.pump.leases[-1]
    return lease


def test_success_is_what_landed_and_the_lease_has_ended_before_anyone_hears_of_it(decode: Any) -> None:
    lease = leased(decode)
    decode.apply_prefill_status(bootstrap_room=7, status=KVPoll.Success, prefill_rank=0)
    assert decode.request_status[7] == KVPoll.Bootstrapping
    lease.land()
    assert (decode.request_status[7], lease.revoked) == (KVPoll.Success, 1)


def test_part_that_broke_fails_the_room_with_what_the_pump_said(decode: Any) -> None:
    lease = leased(decode)
    lease.break_off()
    assert (decode.request_status[7], lease.revoked) == (KVPoll.Failed, 1)
    assert decode.failure_records[7] == "KV transfer aborted: KV: source gone (prefill has gone)"


def test_failure_on_the_prefill_side_ends_the_lease_and_keeps_its_reason(decode: Any) -> None:
    lease = leased(decode)
    decode.apply_prefill_status(bootstrap_room=7, status=KVPoll.Failed, prefill_rank=0, failure_reason="why")
    assert (decode.request_status[7], lease.revoked, decode.failure_records[7]) == (KVPoll.Failed, 1, "why")
    lease.land()  # too late
    assert decode.request_status[7] == KVPoll.Failed


def test_landing_of_a_rooms_earlier_life_does_not_complete_the_next(decode: Any) -> None:
    first = leased(decode)
    decode.leased.end(7)
    second = leased(decode)
    first.land()
    assert decode.request_status[7] == KVPoll.Bootstrapping
    second.land()
    assert decode.request_status[7] == KVPoll.Success


def test_aborted_pages_are_free_without_a_word_from_prefill(decode: Any) -> None:
    lease = leased(decode)
    assert decode.is_abort_release_safe(7, required_acks=4)
    assert lease.revoked == 1


# Prefill side


def chunk(room: int, pages: int = 2, last: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        room=room,
        prefill_kv_indices=np.arange(pages, dtype=np.int32),
        index_slice=slice(0, pages),
        is_last_chunk=last,
        prefill_aux_index=0 if last else None,
        state_indices=None,
        wait_event=None,
        indices_event=None,
    )


def ready(prefill: Any, decode: Any, room: int, pages: int = 2) -> None:
    """A room whose decode side has granted its lease."""
    prefill.update_status(room, KVPoll.Bootstrapping)
    hear(prefill, metadata(decode, room))
    prefill.transfer_infos[room] = {
        "session:1": SimpleNamespace(
            is_dummy=False, mooncake_session_id="session:1", dst_kv_indices=np.arange(pages, dtype=np.int32)
        )
    }
    prefill.decode_kv_args_table["session:1"] = SimpleNamespace(
        requires_dcp_relayout=False,
        dst_attn_tp_size=1,
        dst_kv_ptrs=[],
        dst_kv_layer_ids=[],
        dst_kv_item_len=16,
        dst_aux_ptrs=[],
    )


def work(prefill: Any, *chunks: SimpleNamespace) -> None:
    """The worker's whole life, over these chunks."""
    queue: Queue[Any] = Queue()
    for item in (*chunks, None):
        queue.put(item)
    prefill.transfer_worker(queue, None)


def test_worker_hands_over_and_the_last_acknowledgement_concludes(prefill: Any, decode: Any) -> None:
    ready(prefill, decode, 7)
    work(prefill, chunk(7))
    assert prefill.request_status[7] == KVPoll.Transferring
    for transfer in prefill.pump.transfers:
        transfer.end(Outcome(True))
    assert len(prefill.pump.transfers) == 2
    assert prefill.request_status[7] == KVPoll.Success
    assert prefill.told == []  # decode has it from its own pump


def test_worker_never_waits_for_a_transfer(prefill: Any, decode: Any) -> None:
    ready(prefill, decode, 7)
    ready(prefill, decode, 8)
    work(prefill, chunk(7), chunk(8))  # returns though nothing has been acknowledged
    assert len(prefill.pump.transfers) == 4


def test_room_that_cannot_be_planned_fails_alone(
    prefill: Any, decode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ready(prefill, decode, 7, pages=200)
    ready(prefill, decode, 8)
    work(prefill, chunk(7, pages=200), chunk(8))
    assert prefill.request_status[7] == KVPoll.Failed
    assert "can't be planned: more pages than a stand-in can map" in prefill.failure_records[7]
    assert prefill.request_status[8] == KVPoll.Transferring


def test_failed_transfer_fails_its_room_tells_decode_and_no_other(prefill: Any, decode: Any) -> None:
    ready(prefill, decode, 7)
    ready(prefill, decode, 8)
    work(prefill, chunk(7), chunk(8))
    prefill.pump.transfers[0].end(Outcome(False, FailureReason.PEER_UNREACHABLE, "link down"))
    reason = "KV transfer aborted: KV: peer unreachable (link down)"
    assert prefill.told == [(7, KVPoll.Failed, reason)]
    assert prefill.request_status[8] == KVPoll.Transferring


def test_aborted_room_stops_sending_and_takes_no_later_chunk(prefill: Any, decode: Any) -> None:
    ready(prefill, decode, 7)
    work(prefill, chunk(7, last=False))
    prefill.update_status(7, KVPoll.Failed)
    assert prefill.pump.transfers[0].outcome is not None
    work(prefill, chunk(7))
    assert len(prefill.pump.transfers) == 1


def test_what_is_told_on_the_pumps_own_thread_waits_there_for_no_way(
    prefill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = passage.Passage(prefill.pump, {"10.1.0.5": "10.1.0.5:7600"})
    monkeypatch.setattr(passage, "_here", way)
    prefill.passage, mine = way, threading.current_thread().name
    prefill.pump.hearing = threading.current_thread()
    prefill._send_multipart_locked("tcp://10.1.0.5:5000", [b"failed"])
    first = prefill.sent.get(timeout=10)
    prefill._send_multipart_locked("tcp://10.1.0.5:5000", [b"failed"])
    assert first == ("tcp://127.0.0.1:5001", "prfaas-tell")
    assert prefill.sent.get(timeout=10) == ("tcp://127.0.0.1:5001", mine)
    prefill.pump.hearing = None
    prefill._send_multipart_locked("tcp://10.1.0.5:6000", [b"failed"])
    assert prefill.sent.get(timeout=10) == ("tcp://127.0.0.1:6001", mine)


def test_a_room_that_the_decode_server_gave_up_fails_with_that_reason_unless_it_had_one(prefill: Any) -> None:
    for room, known in ((7, None), (8, "its own")):
        prefill.update_status(room, KVPoll.Bootstrapping)
        if known:
            prefill.record_failure(room, known)
        hear(prefill, [b"ABORT", str(room).encode()])
    prefill.update_status(9, KVPoll.Bootstrapping)
    prefill.update_status(9, KVPoll.Success)
    hear(prefill, [b"ABORT", b"9"])
    assert prefill.failure_records == {7: "Aborted by the decode server", 8: "its own"}


def test_a_failure_without_a_reason_is_told_as_what_it_most_likely_is(decode: Any) -> None:
    decode.update_status(7, KVPoll.Bootstrapping)
    decode.apply_prefill_status(bootstrap_room=7, status=KVPoll.Failed, prefill_rank=0)
    assert decode.request_status[7] == KVPoll.Failed
    assert "doesn't run prfaas" in decode.failure_records[7]


@pytest.mark.parametrize(
    "garbage",
    [
        [b"7", b"127.0.0.1", b"port", b"s:1", b"indices", b"0", b"", b"1", b"0", b""],
        [b"7", b"\xff", b"1", b"s:1", b"indices", b"0", b"", b"1", b"0", b""],
        [*[b"7"] * 3, b"\xff\xfe", *[b""] * 6, b"PRFAAS1", b"x"],
        [b"None", *[b""] * 2, b"\xff", *[b""] * 16, b"PRFAAS1", b"layout"],
    ],
    ids=["port", "host", "session", "registration"],
)
def test_a_message_that_cannot_be_read_is_dropped_and_the_next_one_is_heard(
    prefill: Any, decode: Any, garbage: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    assert hear(prefill, garbage) is None
    assert "can't be read is dropped" in caplog.text
    assert "in _take_frames" in caplog.text, "where: it may be a fault of ours"
    message = metadata(decode, 8)
    assert hear(prefill, message) == message[:10]
    assert len(prefill.sending) == 1


# Staged pages, as on a GPU


K_STAGED_BYTES = 1 << 20


@pytest.fixture
def staged(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes managers whose pages are staged."""
    file = tmp_path / "staged.yaml"
    file.write_text(f"pump: {{site: west}}\nstaging: always\nstaging_bytes: {K_STAGED_BYTES}\n")
    monkeypatch.setenv("PRFAAS_CONFIG", str(file))
    return lambda mode, **changes: backend.PrfaasKVManager(kv_args(**changes), mode)


def test_what_landed_and_cannot_be_put_into_its_pages_fails_its_request_at_once(
    staged: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode = staged(Mode.DECODE)
    decode.update_status(7, KVPoll.Bootstrapping)
    metadata(decode, 7)

    def fail(places: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(decode.staging, "copy_in", fail)
    decode.pump.leases[0].land()
    assert decode.request_status[7] == KVPoll.Failed
    assert "can't be put into its pages: CUDA error" in decode.failure_records[7]
    assert (len(decode.leased), decode.staging.free_bytes) == (0, K_STAGED_BYTES)


def test_a_decode_server_whose_staging_is_full_refuses_as_a_link_does(prefill: Any, staged: Any) -> None:
    decode = staged(Mode.DECODE)
    taken = decode.staging.take(K_STAGED_BYTES)
    prefill.update_status(7, KVPoll.Bootstrapping)
    hear(prefill, metadata(decode, 7))
    assert prefill.request_status[7] == KVPoll.Failed
    refusal = Refusal.found_in(prefill.failure_records[7])
    assert refusal is not None
    assert refusal.reason == "decode server: no 64 bytes of staging free, 0 are"
    decode.staging.give(taken)
    prefill.update_status(8, KVPoll.Bootstrapping)
    hear(prefill, metadata(decode, 8))
    assert (prefill.request_status[8], len(prefill.sending)) == (KVPoll.Bootstrapping, 1)


def test_a_lease_that_cannot_be_made_gives_its_staging_back(
    staged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = staged(Mode.DECODE)

    def fail(*args: Any, **more: Any) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(decode.pump, "grant_lease", fail)
    with pytest.raises(OSError, match="too many"):
        metadata(decode, 7)
    assert decode.staging.free_bytes == K_STAGED_BYTES


def test_a_chunk_that_cannot_be_copied_out_gives_its_staging_back(
    decode: Any, staged: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = staged(Mode.PREFILL)
    ready(prefill, decode, 7)

    def fail(*args: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(prefill.staging, "copy_out", fail)
    work(prefill, chunk(7))
    assert "out of memory" in prefill.failure_records[7]
    assert prefill.staging.free_bytes == K_STAGED_BYTES


def test_state_whose_lease_is_everybodys_memory_is_not_staged_by_a_decode_server(staged: Any) -> None:
    """Copied in, it would take other requests' state back to what staging held."""
    with pytest.raises(PrfaasError, match="can't take state of dsa_tail, swa_ring"):
        staged(Mode.DECODE, state_types=["swa_ring", "mamba", "dsa_tail"])
    assert staged(Mode.DECODE, state_types=["mamba"]).staging is not None
    assert staged(Mode.PREFILL, state_types=["swa_ring"]).staging is not None


def test_a_change_of_roles_closes_pump_and_staging(staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = staged(Mode.PREFILL)
    order: list[str] = []
    monkeypatch.setattr(prefill.pump, "close", lambda: order.append("pump"))
    monkeypatch.setattr(prefill.staging.memory, "abandon", lambda address: order.append("staging"))
    prefill.teardown()
    assert (prefill.recomputed, order) == (["torn down"], ["pump", "staging"])


# Two tiers


@pytest.fixture
def tiers(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A decode server whose own site is 10.2.0.0/16."""
    file = tmp_path / "west.yaml"
    file.write_text("pump: {site: west}\nnear: {hosts: [10.2.0.0/16]}\n")
    monkeypatch.setenv("PRFAAS_CONFIG", str(file))
    monkeypatch.setitem(vars(compat), "init_mooncake_transfer_engine", lambda **asked: None)
    monkeypatch.setitem(vars(compat), "get_local_ip_auto", lambda: "10.2.0.9")
    return backend.PrfaasKVManager(kv_args(), Mode.DECODE)


K_HERE, K_FAR = "10.2.0.1:8998", "10.1.0.5:8998"


def test_a_requests_receiver_and_manager_follow_from_its_prefill_servers_site(
    backend: ModuleType, tiers: Any
) -> None:
    make = backend.PrfaasKVReceiver
    here, far = (make(mgr=tiers, bootstrap_addr=a, bootstrap_room=7) for a in (K_HERE, K_FAR))
    assert (type(here), here.kv_mgr, here.bootstrap_room) == (StandInRole, tiers.near.manager, 7)
    assert (type(far), far.kv_mgr, far.bootstrap_room) == (make, tiers, 7)
    assert type(tiers.near.manager) is StandInManager
    for receiver in (here, far):
        tiers.submit_prefill_recompute(receiver, {"for": receiver.bootstrap_addr})
    assert tiers.near.manager.recomputed == [{"for": K_HERE}]
    assert tiers.recomputed == [{"for": K_FAR}]


def test_each_tier_learns_its_own_servers_and_the_scheduler_sees_both(tiers: Any) -> None:
    assert tiers.try_ensure_parallel_info(K_HERE)
    assert tiers.try_ensure_parallel_info(K_FAR)
    assert list(tiers.prefill_info_table) == [K_FAR]
    assert list(tiers.near.manager.prefill_info_table) == [K_HERE]
    assert tiers.prefill_info_table.get(K_HERE) == K_HERE


def test_a_server_that_does_not_match_costs_its_own_rooms_in_either_tier(tiers: Any) -> None:
    for manager, other in ((tiers, tiers.near.manager), (tiers.near.manager, tiers)):
        address = "10.2.0.1:16" if manager is not tiers else "10.1.0.5:16"
        manager.addr_to_rooms_tracker[address].add(7)
        for one in (manager, other):
            one.update_status(7, KVPoll.Bootstrapping)
        assert not tiers.try_ensure_parallel_info(address)
        assert manager.request_status.pop(7) == KVPoll.Failed
        assert "Page size mismatch" in manager.failure_records[7]
        assert other.request_status.pop(7) == KVPoll.Bootstrapping


def test_a_prefill_server_has_one_tier_whatever_the_file_says(backend: ModuleType, tiers: Any) -> None:
    assert backend.PrfaasKVManager(kv_args(), Mode.PREFILL).near is None
