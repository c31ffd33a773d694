"""The manager's work on a prefill server that the `overlap` option decides: what leaves before its chunk,
with it, or only at a request's end.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np

from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import TransferKind
from prfaas.sglang import compat, layers
from prfaas.sglang.ahead import Ahead, Forward, Piece, RoomAhead
from prfaas.sglang.planning import InlineExecutor, Segments
from prfaas.sglang.prefill_side import PrefillSide
from prfaas.sglang.rooms import SendingRoom

logger = logging.getLogger(__name__)


class LayerSide(PrefillSide):
    """Part of PrfaasKVManager. One worker at a time handles a room: SGLang gives each room one of its
    queues."""

    def _open_overlap(self, overlap: str, sender_class: type) -> None:
        self.overlap = overlap
        self.ahead = Ahead(self.kv_args.kv_data_ptrs)
        # With `end`: chunks that wait for the last, by room.
        self.kept: dict[int, list[Any]] = {}
        self._troubles, self._troubles_lock = 0, threading.Lock()
        watching = overlap == "layer" and self.disaggregation_mode == compat.DisaggregationMode.PREFILL
        on_gpu = str(getattr(self.server_args, "device", "cpu")).startswith("cuda")
        layers.use(
            layers.LayerWatch(self.kv_args, sender_class, self._queue_of, on_gpu) if watching else None
        )

    def _forget_overlap(self, room: int) -> None:
        """The room is over."""
        self.ahead.forget(room)
        self.kept.pop(room, None)

    def _queue_of(self, room: int) -> Any | None:
        """The queue that SGLang puts the room's chunks in."""
        sessions = self.transfer_infos.get(room)
        if not sessions or self.request_status.get(room) in (None, compat.KVPoll.Failed):
            return None
        total = sum(int(session.rsplit(":", 1)[1]) for session in sessions)
        return self.transfer_queues[total % len(self.transfer_queues)]

    def _hand_over(self, item: Any, executor: InlineExecutor) -> None:
        if isinstance(item, RoomAhead):
            self._plan_ahead(item, executor)
        elif isinstance(item, Forward):
            try:
                self._send_ahead(item)
            except Exception:
                for ahead in item.rooms:
                    self._not_ahead(ahead.room)
        elif self.overlap != "end":
            super()._hand_over(item, executor)
        elif not item.is_last_chunk:
            self.kept.setdefault(item.room, []).append(item)
            if self.request_status.get(item.room) in (None, compat.KVPoll.Failed):
                self.kept.pop(item.room, None)
        else:
            for chunk in (*self.kept.pop(item.room, ()), item):
                super()._hand_over(chunk, executor)

    def _plan_ahead(self, ahead: RoomAhead, executor: InlineExecutor) -> None:
        """Map a pass's pages of a room before they are filled."""
        try:
            if ahead.event is not None:
                ahead.event.synchronize()
                ahead.pages = ahead.pages.numpy()
            for request in self.transfer_infos.get(ahead.room, {}).values():
                if not request.is_dummy:
                    self._plan_ahead_for(ahead, request, executor)
            if self.request_status.get(ahead.room) in (None, compat.KVPoll.Failed):
                self._forget_overlap(ahead.room)
        except Exception:
            self._not_ahead(ahead.room)

    def _plan_ahead_for(self, ahead: RoomAhead, request: Any, executor: InlineExecutor) -> None:
        session = request.mooncake_session_id
        peer = self.decode_kv_args_table[session]
        grant = self.sending.grant_of(ahead.room, session)
        if grant is None or peer.requires_dcp_relayout or self._get_dsa_cache_transfer_skip_flags(peer)[0]:
            return
        wanted = request.dst_kv_indices[ahead.first : ahead.first + len(ahead.pages)]
        have = ahead.pages[: len(wanted)]
        if len(have):
            segments = self._map_kv(request, have, wanted, executor)
            buffers = self.ahead.buffers_of(segments.source)
            self.ahead.add(ahead.room, Piece(session, grant, ahead.first, have, segments, buffers))

    def _send_ahead(self, forward: Forward) -> None:
        """Send what a pass has written since this worker last looked."""
        seen, forward.seen = forward.seen, len(forward.written)
        written = forward.written[seen : forward.seen]
        if not written:
            return
        if written[-1].event is not None:
            written[-1].event.synchronize()
        buffers = [buffer for one in written for buffer in one.buffers]
        for ahead in forward.rooms:
            for piece in self.ahead.pieces(ahead.room):
                # Another pass's piece may still be here: with SGLang's overlap two are under way.
                if ahead.first <= piece.first < ahead.first + len(ahead.pages):
                    piece.note(buffers)
                    self._send_piece(ahead.room, piece)

    def _send_piece(self, room: int, piece: Piece) -> None:
        found = piece.ready()
        if found is None or self.request_status.get(room, compat.KVPoll.Failed) == compat.KVPoll.Failed:
            return
        segments, rows = found
        self.asked.under_way(room)
        try:
            segments = self.verification.fault(TransferKind.KV, segments, room)
            piece.begun = True
            for part in self._staged(piece.session, TransferKind.KV, segments, room):
                if not self.sending.send(room, [part], False, self.deadline_s, piece.grant):
                    self.ahead.forget(room)
                    return
        except Exception:
            self._not_ahead(room)
            return
        self.ahead.sent(room, piece, rows)

    def _not_ahead(self, room: int) -> None:
        """Something went wrong with a room's layers, which costs it time alone: told, but not each time."""
        self.ahead.give_up(room)
        with self._troubles_lock:
            self._troubles += 1
            troubles = self._troubles
        if troubles.bit_count() == 1:
            words = "prfaas: room %s: its layers go with their chunk; times that this was so: %d"
            logger.warning(words, room, troubles, exc_info=True)

    def _ahead_bytes(self, room: int) -> int:
        return self.ahead.sent_bytes(room)

    def _sent(self, room: SendingRoom, failure: str | None) -> None:
        self._forget_overlap(room.room)
        super()._sent(room, failure)

    def _plan_kv(
        self, chunk: Any, request: Any, have: Any, wanted: Any, executor: InlineExecutor
    ) -> Segments:
        """The chunk's, less what has been sent ahead.

        Its pages may be others than those that the pass filled: where the prefix tree has the same tokens
        already, which a hybrid model computes again for want of a state, SGLang keeps the tree's pages and
        frees the new ones, for anybody to fill. So what was sent from there counts for nothing, and the
        chunk's own bytes must be the last to land.
        """
        session = request.mooncake_session_id
        segments, again = self.ahead.rest(
            chunk.room,
            session,
            self.sending.grant_of(chunk.room, session),
            chunk.index_slice.start,
            np.asarray(have),
            lambda begin, end: self._map_kv(request, have[begin:end], wanted[begin:end], executor),
        )
        if again and not self.sending.drained(chunk.room, self.deadline_s):
            raise PrfaasError("what was sent of it by layers hasn't landed in time")
        return segments
