"""The `verify:` and `faults:` options at work on one server: what is digested when, and where the rows go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prfaas.config.backend import BackendConfig
from prfaas.model.transfer import TransferKind
from prfaas.sglang import layout
from prfaas.sglang.planning import Segments
from prfaas.sglang.rooms import K_REMEMBERED_ROOMS
from prfaas.sglang.verify import KvFault, Rows, digest_buffers, poison


@dataclass
class _Sent:
    """A room's digests so far, going on from chunk to chunk."""

    kv: list[int]
    pages: int = 0
    n_chunks: int = 0
    begun_s: float = field(default_factory=time.monotonic)


@dataclass
class _Leased:
    generation: int
    kv_indices: Any
    aux_index: int | None
    state_indices: list[Any] | None
    extra: dict[str, Any] = field(default_factory=dict)


def _keep(rooms: dict[int, Any], most: int) -> None:
    """The latest: of those that were aborted nobody asks any more."""
    while len(rooms) > most:
        del rooms[next(iter(rooms))]


class Verification:
    """Does nothing unless configured."""

    def __init__(self, config: BackendConfig, kv_args: Any, role: str) -> None:
        self._args = kv_args
        self._verify = config.verify
        self._rows = Rows(config.verify.directory, role) if config.verify else None
        self._fault = KvFault(config.faults.kv, config.faults.rooms) if config.faults else None
        self._lock = threading.Lock()
        self._sent: dict[int, _Sent] = {}
        self._leased: dict[int, _Leased] = {}

    def prepare(self, register: Callable[[Sequence[tuple[int, int]]], None]) -> None:
        if self._fault is not None and self._args.kv_data_lens:
            self._fault.prepare(max(self._args.kv_data_lens), register)

    # Prefill side

    def sending(self, chunk: Any, ahead_bytes: int = 0) -> None:
        """Digest a chunk's source before what is left of it goes; the last one writes the row, with how much
        of the room's KV had left before its chunks. One thread a room.
        """
        if self._rows is None:
            return
        args = self._args
        with self._lock:
            sent = self._sent.setdefault(chunk.room, _Sent([0] * len(args.kv_data_ptrs)))
            _keep(self._sent, K_REMEMBERED_ROOMS)
        sent.kv = digest_buffers(args.kv_data_ptrs, args.kv_item_lens, chunk.prefill_kv_indices, sent.kv)
        sent.pages += len(chunk.prefill_kv_indices)
        sent.n_chunks += 1
        if not chunk.is_last_chunk:
            return
        with self._lock:
            self._sent.pop(chunk.room, None)
        self._write(
            "sent",
            chunk.room,
            sent.kv,
            sent.pages,
            chunk.state_indices,
            chunk.prefill_aux_index,
            sent.n_chunks,
            begun_s=sent.begun_s,
            ahead_bytes=ahead_bytes,
        )

    def fault(self, kind: TransferKind, segments: Segments, room: int) -> Segments:
        if self._fault is None:
            return segments
        return self._fault.apply(
            kind, segments, room, self._args.kv_item_lens[0] if self._args.kv_item_lens else 0
        )

    # Decode side

    def leased(
        self,
        room: int,
        generation: int,
        kv_indices: Any,
        aux_index: int | None,
        state_indices: list[Any] | None,
    ) -> None:
        """Before the lease is made: poison what it covers, but the auxiliary slot, whose zero SGLang
        reads.
        """
        if self._verify is None:
            return
        if self._verify.poison:
            poison(layout.leased_pieces(self._args, kv_indices, None, state_indices))
        with self._lock:
            self._leased[room] = _Leased(generation, kv_indices, aux_index, state_indices)
            _keep(self._leased, K_REMEMBERED_ROOMS)

    def landed(self, room: int, generation: int) -> None:
        """After the lease has ended, before the pages are used: digest what is there."""
        if self._rows is None:
            return
        with self._lock:
            leased = self._leased.pop(room, None)
        if leased is None or leased.generation != generation:
            return
        args = self._args
        kv = digest_buffers(args.kv_data_ptrs, args.kv_item_lens, leased.kv_indices)
        self._write(
            "landed", room, kv, len(leased.kv_indices), leased.state_indices, leased.aux_index, 0, generation
        )

    def _write(
        self,
        side: str,
        room: int,
        kv: list[int],
        pages: int,
        state_indices: list[Any] | None,
        aux_index: int | None,
        n_chunks: int,
        generation: int = 0,
        begun_s: float | None = None,
        ahead_bytes: int = 0,
    ) -> None:
        assert self._rows is not None
        args = self._args
        states = {
            str(i): digest_buffers(args.state_data_ptrs[i], args.state_item_lens[i], indices)
            for i, indices in enumerate(state_indices or [])
            if indices is not None
        }
        state_bytes = sum(
            len(indices) * sum(args.state_item_lens[i])
            for i, indices in enumerate(state_indices or [])
            if indices is not None
        )
        aux = [] if aux_index is None else digest_buffers(args.aux_data_ptrs, args.aux_item_lens, [aux_index])
        self._rows.write(
            {
                "side": side,
                "room": room,
                "generation": generation,
                "n_chunks": n_chunks,
                "ahead_bytes": ahead_bytes,
                # CLOCK_MONOTONIC, which all processes of a machine share.
                "begun_s": begun_s,
                "at_s": time.monotonic(),
                "pages": pages,
                "kv": kv,
                "state": states,
                "aux": aux,
                "bytes": {
                    "kv": pages * sum(args.kv_item_lens),
                    "state": state_bytes,
                    "aux": sum(args.aux_item_lens) if aux_index is not None else 0,
                },
            }
        )
