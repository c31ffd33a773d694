"""The manager's work on a prefill server: what peers grant, and what is sent for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import numpy as np

from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import LeaseGrant, TransferKind
from prfaas.sglang import compat, layout
from prfaas.sglang.control import K_GRANT_TAG, K_METADATA_FRAMES, K_NO_GRANT, K_REGISTRATION_FRAMES
from prfaas.sglang.planning import Column, InlineExecutor, Segments
from prfaas.sglang.refusal import Refusal
from prfaas.sglang.rooms import Part, SendingRoom
from prfaas.sglang.staging import Places

logger = logging.getLogger(__name__)

Target = tuple[str, int]
"""Where a decode rank hears of its rooms: host and port."""


def _target(message: list[bytes]) -> Target:
    return message[1].decode("ascii"), int(message[2])


class PrefillSide(compat.MooncakeKVManager):  # type: ignore[misc]
    """Part of PrfaasKVManager, which has what it uses: engine, sending, asked, staging, verification, doomed,
    refused_sessions, deadline_s."""

    def _take_frames(self, message: list[bytes]) -> list[bytes]:
        """Note what our decode side added to a message; SGLang gets its own frames."""
        if message and message[0] == b"ABORT" and len(message) > 1:
            self._note_abort(message[1])
            return message
        for frames, take in (
            (K_REGISTRATION_FRAMES, self._take_layout),
            (K_METADATA_FRAMES, self._take_grant),
        ):
            if len(message) > frames + 1 and message[frames] == K_GRANT_TAG:
                take(message, *message[frames + 1 :])
                return message[:frames]
        if message and len(message) >= K_METADATA_FRAMES and message[4] != b"" and message[0].isdigit():
            self._refuse(
                message,
                "the decode server's backend is not prfaas, or another version of it, "
                "or its configuration names this server's host in near.hosts",
            )
        return message

    def _note_abort(self, room: bytes) -> None:
        """Why the room will have failed. An abort that arrives before the request itself SGLang would forget,
        and wait out a time-out.
        """
        if not room.isdigit():
            return
        status = self.request_status.get(int(room))
        if status is None:
            self.sending.cancel(int(room), "aborted")
            self.asked.end(int(room))
            self.doomed.put(int(room), "Aborted by the decode server before prefill had the request")
        elif status not in (compat.KVPoll.Success, compat.KVPoll.Failed):
            with self.failure_lock:
                self.failure_records.setdefault(int(room), "Aborted by the decode server")

    def _take_layout(self, message: list[bytes], data: bytes, *later: bytes) -> None:
        session = message[3].decode("ascii")
        if self.passage is not None:
            # Its session names its pump, which its own control is reached by.
            host, port = _target(message)
            self.passage.learn(host, session.partition("/")[0])
            # The way to it is found while there is time: what it will be told is mostly a failure.
            self.passage.address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        try:
            theirs = layout.Layout.from_bytes(data)
            wrong = layout.differences(layout.describe(self), theirs)
        except (ValueError, msgspec.MsgspecError) as error:
            wrong = f"unreadable layout: {error}"
        self.refused_sessions.take(session)
        if wrong:
            logger.error("prfaas: decode session %s refused: %s", session, wrong)
            self.refused_sessions.put(session, wrong)

    def _take_grant(
        self, message: list[bytes], data: bytes, where: bytes = b"", size: bytes = b"", *later: bytes
    ) -> None:
        session = message[3].decode("ascii")
        if wrong := self.refused_sessions.get(session):
            self._refuse(message, wrong)
            return
        if data.startswith(K_NO_GRANT):
            self._refuse(message, data.removeprefix(K_NO_GRANT).decode(errors="replace"))
            return
        try:
            grant = LeaseGrant.from_text(data)
            places = Places.from_bytes(where) if where else None
            size_bytes = int(size or 0)
        except (ValueError, PrfaasError) as error:
            self._refuse(message, str(error))
            return
        if grant.room != int(message[0]):
            self._refuse(message, f"a lease for room {grant.room} in a message about room {int(message[0])}")
            return
        if reason := self.ended.take(grant.room):
            self._refuse(message, reason)
            return
        self.sending.granted(session, grant, places)
        self.asked.ask(grant.room, session, grant.site, size_bytes, _target(message))

    def _refuse(self, message: list[bytes], reason: str) -> None:
        """A message about a room can't be followed."""
        self._end_room(int(message[0]), [_target(message)], reason)

    def _refuse_room(self, room: int, targets: list[Target], refusal: Refusal) -> None:
        """A link has no place for its bytes."""
        self.sending.cancel(room, refusal.text)
        self._end_room(room, targets, refusal.text)

    def _let_go(self, room: int) -> None:
        """The links have places for all its bytes: prefill may be scheduled."""
        if room in self.transfer_infos:
            super().update_status(room, compat.KVPoll.WaitingForInput)

    def tell_failed(self, room: int, reason: str) -> None:
        """A room is given up here: its decode ranks would wait for it, those that grant pages later too."""
        self.ended.put(room, reason)
        self.send_kv_status_message(
            targets=self._room_notify_targets(room),
            bootstrap_room=room,
            status=compat.KVPoll.Failed,
            failure_reason=reason,
        )

    def _end_room(self, room: int, targets: list[Target], reason: str) -> None:
        """Tell both sides at once that this room can't be."""
        # Kept before it is looked for: the scheduler may be making the room now, and takes the reason then.
        self.doomed.put(room, reason)
        if room in self.request_status:
            if self.doomed.take(room):
                self.conclude_failure(bootstrap_room=room, failure_reason=reason, targets=targets)
            return
        self.send_kv_status_message(
            targets=targets,
            bootstrap_room=room,
            status=compat.KVPoll.Failed,
            failure_reason=reason,
        )

    def transfer_worker(
        self, queue: Any, executor: Any, staging_buffer: Any = None, worker_index: int = 0
    ) -> None:
        """Chunks off SGLang's queue, planned and handed over; never waits for a link."""
        inline = InlineExecutor()
        while (chunk := queue.get()) is not None:
            try:
                self._hand_over(chunk, inline)
            except Exception as error:
                logger.exception("prfaas: room %s", chunk.room)
                self.conclude_failure(
                    bootstrap_room=chunk.room,
                    failure_reason=f"KV transfer aborted: can't be planned: {error}",
                )

    def _hand_over(self, chunk: Any, executor: InlineExecutor) -> None:
        if self.request_status.get(chunk.room, compat.KVPoll.Failed) != compat.KVPoll.Failed:
            for event in (chunk.wait_event, chunk.indices_event):
                if event is not None:
                    event.synchronize()
        # Again: it may have been aborted while the kernels that write its pages ended.
        if self.request_status.get(chunk.room, compat.KVPoll.Failed) == compat.KVPoll.Failed:
            return
        if not isinstance(chunk.prefill_kv_indices, np.ndarray):
            chunk.prefill_kv_indices = chunk.prefill_kv_indices.numpy()
        peers = [peer for peer in self.transfer_infos.get(chunk.room, {}).values() if not peer.is_dummy]
        if not peers:
            # This rank isn't needed by any of the room's decode ranks.
            if chunk.is_last_chunk and chunk.room in self.request_status:
                self.update_status(chunk.room, compat.KVPoll.Success)
            return
        self.asked.under_way(chunk.room)
        self.update_status(chunk.room, compat.KVPoll.Transferring)
        self.verification.sending(chunk, self._ahead_bytes(chunk.room))
        last: list[Part] = []
        for peer in peers:
            session = peer.mooncake_session_id
            for kind, planned in self._plan(chunk, peer, executor):
                segments = self.verification.fault(kind, planned, chunk.room)
                if kind is TransferKind.AUX:
                    last.append(Part(session, kind, segments))
                    continue
                for part in self._staged(session, kind, segments, chunk.room):
                    if not self.sending.send(chunk.room, [part], False, self.deadline_s):
                        return
        if chunk.is_last_chunk:
            self.sending.send(chunk.room, last, True, self.deadline_s)

    def _staged(self, session: str, kind: TransferKind, segments: Segments, room: int) -> Iterator[Part]:
        """What is sent for segments of pages: themselves, or copies in staging, a part at a time."""
        places = self.sending.places_of(room, session)
        if places is not None and len(segments):
            target = places.translate(segments.destination, segments.length)
            segments = Segments(segments.source, target, segments.length)
        if self.staging is None:
            yield Part(session, kind, segments)
            return
        staging = self.staging
        for some in staging.parts(segments):
            address = staging.take(some.total_bytes, self.deadline_s)
            if address is None:
                raise PrfaasError(f"prefill server: no {some.total_bytes} bytes of staging came free in time")
            try:
                copied = staging.copy_out(some, address)
            except BaseException:
                staging.give(address)
                raise
            yield Part(session, kind, copied, partial(staging.give, address))

    def _plan(
        self, chunk: Any, request: Any, executor: InlineExecutor
    ) -> list[tuple[TransferKind, Segments]]:
        """What one decode rank gets of a chunk, by SGLang's own mapping."""
        peer = self.decode_kv_args_table[request.mooncake_session_id]
        if peer.requires_dcp_relayout:
            raise PrfaasError("decode context parallelism isn't supported between sites")
        skip_kv, skip_state = self._get_dsa_cache_transfer_skip_flags(peer)
        planned: list[tuple[TransferKind, Segments]] = []
        wanted = request.dst_kv_indices[chunk.index_slice]
        have = chunk.prefill_kv_indices[: len(wanted)]
        if len(have) and self.kv_args.kv_data_ptrs and not skip_kv:
            planned.append((TransferKind.KV, self._plan_kv(chunk, request, have, wanted, executor)))
        if not chunk.is_last_chunk:
            return planned
        if chunk.state_indices and not skip_state:
            with self.engine.recording() as recorder:
                failed = self.maybe_send_extra(request, chunk.state_indices, executor, peer)
            self._must_plan(failed, "state")
            planned.append((TransferKind.STATE, recorder.segments()))
        with self.engine.recording() as recorder:
            failed = self.send_aux(request, chunk.prefill_aux_index, peer.dst_aux_ptrs)
        self._must_plan(failed, "auxiliary data")
        planned.append((TransferKind.AUX, recorder.segments()))
        return planned

    def _ahead_bytes(self, room: int) -> int:
        """What of a room's KV has left before its chunks were handed over."""
        return 0

    def _plan_kv(
        self, chunk: Any, request: Any, have: Any, wanted: Any, executor: InlineExecutor
    ) -> Segments:
        """What one decode rank gets of a chunk's KV: pages `have` of ours, to pages `wanted` of its own."""
        return self._map_kv(request, have, wanted, executor)

    def _map_kv(self, request: Any, have: Any, wanted: Any, executor: InlineExecutor) -> Segments:
        """SGLang's mapping of pages to a decode rank's."""
        peer = self.decode_kv_args_table[request.mooncake_session_id]
        with self.engine.recording() as recorder:
            if (
                self.is_mla_backend
                or self.is_hybrid_mla_backend
                or self.attn_tp_size == peer.dst_attn_tp_size
            ):
                failed = self.send_kvcache(
                    request.mooncake_session_id,
                    have,
                    peer.dst_kv_ptrs,
                    wanted,
                    executor,
                    dst_layer_ids=peer.dst_kv_layer_ids,
                    dst_kv_item_len=peer.dst_kv_item_len,
                    dst_attn_tp_size=peer.dst_attn_tp_size,
                )
            else:
                failed = self.send_kvcache_slice(
                    request.mooncake_session_id,
                    have.view(Column),
                    peer.dst_kv_ptrs,
                    wanted.view(Column),
                    peer.dst_tp_rank,
                    peer.dst_attn_tp_size,
                    peer.dst_kv_item_len,
                    executor,
                    peer.dst_kv_layer_ids,
                )
        self._must_plan(failed, "KV")
        segments: Segments = recorder.segments()
        return segments

    def _must_plan(self, failed: Any, what: str) -> None:
        if failed:
            raise PrfaasError(f"SGLang's mapping of {what} to this peer failed; its log says why")

    def _sent(self, room: SendingRoom, failure: str | None) -> None:
        """Every peer has acknowledged all of a room, or it failed."""
        self.asked.end(room.room)
        if failure is not None:
            self.conclude_failure(bootstrap_room=room.room, failure_reason=failure)
            return
        # The peers know by their own word; this is for the prefill scheduler.
        self.conclude_transfer(bootstrap_room=room.room, status=compat.KVPoll.Success, targets=[])
