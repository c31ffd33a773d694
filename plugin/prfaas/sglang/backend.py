"""The classes that SGLang asks a disaggregation backend for.

The manager is Mooncake's with its engine, its transfer worker and its release of aborted pages replaced. From
SGLang come the bootstrap, the mapping of ranks, layers, slices and state kinds, role switch, and the status
of rooms. Ours are:

* what the decode side sends beside its page indices: a lease (`_grant`), made when the pages are allocated;
* the worker: it plans a chunk by SGLang's methods, hands the parts over and goes on; nothing waits for a
link;
* success: on the decode side the receiver's own word that every part has landed, on the prefill side its
  acknowledgement; a room that fails takes nothing else with it;
* the end of a lease: local, so that aborted pages are free at the scheduler's next turn.

Threads: the scheduler's, the bootstrap or decode thread that reads SGLang's control socket, the workers, and
the transport's, which runs the callbacks.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import numpy as np

from prfaas.config.backend import K_ENVIRONMENT, BackendConfig, load_backend_config
from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import LeaseGrant, TransferKind
from prfaas.pump_client import LocalPumpClient
from prfaas.sglang import compat, layout
from prfaas.sglang.planning import InlineExecutor, RecordingEngine, Segments
from prfaas.sglang.rooms import LeasedRoom, LeasedRooms, Part, Remembered, SendingRoom, SendingRooms, describe
from prfaas.sglang.staging import CudaMemory, HostMemory, Places, Staging
from prfaas.sglang.verification import Verification

logger = logging.getLogger(__name__)

K_GRANT_TAG = b"PRFAAS1"
K_NO_GRANT = b"none: "
"""In a grant's place: why there is none."""
K_METADATA_FRAMES = 10
"""Frames of SGLang's own metadata message; ours follow: tag, grant, places."""
K_REGISTRATION_FRAMES = 20
"""Frames of SGLang's own registration; ours follow: tag, layout."""


def load_config() -> BackendConfig:
    """The file that PRFAAS_CONFIG names, or loopback's defaults. Raises ConfigError, which ends the
    launch.
    """
    return load_backend_config(os.environ.get(K_ENVIRONMENT))


class PrfaasKVManager(compat.MooncakeKVManager):  # type: ignore[misc]
    """One a scheduler process: a rank of a prefill or of a decode server."""

    kv_status_msg_carries_reason = True

    def init_engine(self) -> None:
        """Called by the constructor, after the bootstrap and before memory is registered."""
        config = load_config()
        self.deadline_s = config.deadline_s
        self.pump = LocalPumpClient.open(
            config.pump, name=f"sglang {self.disaggregation_mode.value} {os.getpid()}"
        )
        # The last part must be a number to SGLang, and the whole unlike any other manager's.
        self.session_id = f"{self.pump.address}/{secrets.token_hex(8)}:{self.rank_port}"
        self.engine = RecordingEngine(self.pump, self.session_id)
        self.staging = self._make_staging(config)
        # Of peers whose pages are staged: where, by session and room.
        self.places: dict[tuple[str, int], Places] = {}
        self.verification = Verification(config, self.kv_args, self.disaggregation_mode.value)
        self.verification.prepare(self.pump.register)
        # By room. What is refused or aborted before the request itself arrives here is kept in `doomed`.
        self.doomed = Remembered()
        self.refused_sessions: dict[str, str] = {}
        self.leased = LeasedRooms()
        self.sending = SendingRooms(self.pump, f"rank {self._prefill_unique_rank()}", self._sent)
        logger.info(
            "prfaas: %s rank at %s, session %s",
            self.disaggregation_mode.value,
            self.local_ip,
            self.session_id,
        )

    def _make_staging(self, config: BackendConfig) -> Staging | None:
        """Host memory beside pages on a GPU, or where the configuration asks for it."""
        device = str(getattr(self.server_args, "device", "cpu"))
        if device != "cpu" and (config.verify or config.faults):
            raise PrfaasError(f"verify and faults read caches in host memory; this server's are on {device}")
        if device.startswith("cuda"):
            staging = Staging(config.staging_bytes, CudaMemory(self.kv_args.gpu_id))
        elif device != "cpu":
            raise PrfaasError(f"KV caches on device {device!r} aren't supported; on cpu and cuda they are")
        elif config.staging == "always":
            staging = Staging(config.staging_bytes, HostMemory())
        else:
            return None
        self.pump.register([(staging.address, staging.size_bytes)])
        return staging

    def register_buffer_to_engine(self) -> None:
        """SGLang's; of staged pages only the auxiliary data's memory is the pump's to read and write."""
        if self.staging is None:
            super().register_buffer_to_engine()
        else:
            self.engine.batch_register(self.kv_args.aux_data_ptrs, self.kv_args.aux_data_lens)

    def deregister_buffer_to_engine(self) -> None:
        if self.staging is None:
            super().deregister_buffer_to_engine()
        else:
            self.engine.batch_deregister(self.kv_args.aux_data_ptrs)

    # Both sides: status

    def update_status(self, bootstrap_room: int, status: Any) -> None:
        """SGLang's, and: a room that fails stops sending, and its lease ends, now."""
        super().update_status(bootstrap_room, status)
        poll = compat.KVPoll
        if status == poll.Failed:
            if self.disaggregation_mode == compat.DisaggregationMode.PREFILL:
                self.sending.cancel(bootstrap_room, "the room failed")
                self._forget_places(bootstrap_room)
            else:
                self.leased.end(bootstrap_room)
        elif status == poll.Bootstrapping and (reason := self.doomed.take(bootstrap_room)):
            self.conclude_failure(bootstrap_room=bootstrap_room, failure_reason=reason)

    def _make_worker_recv(self, socket: Any, timeout_ms: int = 500) -> Any:
        """SGLang's reader of the control socket, with our frames taken off what it reads."""
        receive = super()._make_worker_recv(socket, timeout_ms)
        if self.disaggregation_mode != compat.DisaggregationMode.PREFILL:
            return receive

        def read() -> Any:
            message = receive()
            return message if message is None else self._take_frames(message)

        return read

    # Decode side

    def build_receiver_registration_message(self) -> list[bytes]:
        return [
            *super().build_receiver_registration_message(),
            K_GRANT_TAG,
            layout.describe(self).to_bytes(),
        ]

    def build_receiver_metadata_message(self, **arguments: Any) -> list[bytes]:
        """SGLang's message about a room's pages, with our lease on them."""
        message: list[bytes] = super().build_receiver_metadata_message(**arguments)
        if arguments["is_dummy"]:
            return message
        room = arguments["bootstrap_room"]
        try:
            return [*message, K_GRANT_TAG, *self._grant(room, arguments)]
        except PrfaasError as error:
            # SGLang sends the message whatever happens: the prefill side refuses it, with this reason, at
            # once.
            return [*message, K_GRANT_TAG, K_NO_GRANT + str(error).encode(), b""]

    def _grant(self, room: int, arguments: dict[str, Any]) -> tuple[bytes, bytes]:
        """The room's lease and, if its pages are staged, where; made at the first of its prefill ranks, the
        same for the others."""
        leased = self.leased.find(room)
        if leased is None:
            leased = self._lease(
                room, arguments["kv_indices"], arguments["aux_index"], arguments["state_indices"]
            )
        places = b"" if leased.places is None else leased.places.to_bytes()
        return leased.lease.grant.to_text().encode(), places

    def _lease(
        self, room: int, kv_indices: Any, aux_index: int | None, state_indices: list[Any] | None
    ) -> LeasedRoom:
        pages = layout.leased_pieces(self.kv_args, kv_indices, None, state_indices)
        slot = layout.aux_pieces(self.kv_args, aux_index)
        places, release = None, _nothing
        if self.staging is not None and len(pages):
            staging, total = self.staging, int(pages[:, 1].sum())
            address = staging.take(total)
            if address is None:
                raise PrfaasError(
                    f"decode server: no {total} bytes of staging free; {staging.free_bytes} are"
                )
            places, release = Places.laid_out(pages, address), lambda: staging.give(address)
            pages = np.array([[address, total]], dtype=np.uint64)
        generation = self.leased.next_generation()
        self.verification.leased(room, generation, kv_indices, aux_index, state_indices)
        try:
            lease = self.pump.grant_lease(
                room,
                generation,
                [(int(address), int(length)) for address, length in np.concatenate((pages, slot))],
                self.deadline_s,
                expected_sources=self.required_prefill_response_num_table.get(room, 1),
            )
        except PrfaasError:
            release()
            raise
        leased = LeasedRoom(room, generation, lease, places, release)
        self.leased.hold(leased)
        lease.add_callback(lambda lease: self._landed(leased))
        return leased

    def _landed(self, leased: LeasedRoom) -> None:
        """The pump's word on a lease: a part has arrived, or broken."""
        room, broken = leased.room, leased.lease.failure
        if broken is not None:
            if self.leased.find(room) is leased:
                self.record_failure(room, describe(broken.kind, broken.reason, broken.detail))
                self.update_status(room, compat.KVPoll.Failed)
        elif leased.lease.complete and self.leased.land(leased, lambda: self._settle(leased)):
            self.update_status(room, compat.KVPoll.Success)

    def _settle(self, leased: LeasedRoom) -> None:
        """The lease has ended and nobody uses the pages yet."""
        if leased.places is not None:
            assert self.staging is not None
            self.staging.copy_in(leased.places)
        self.verification.landed(leased.room, leased.generation)

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """SGLang's, but a prefill server that doesn't match costs its own requests, not the decode
        scheduler's life.
        """
        try:
            return bool(super().try_ensure_parallel_info(bootstrap_addr))
        except RuntimeError as error:
            logger.error("prfaas: prefill server %s refused: %s", bootstrap_addr, error)
            for room in list(self.addr_to_rooms_tracker[bootstrap_addr]):
                self.record_failure(room, f"Aborted: prefill server {bootstrap_addr} refused: {error}")
                self.update_status(room, compat.KVPoll.Failed)
            return False

    def apply_prefill_status(
        self, *, bootstrap_room: int, status: int, prefill_rank: int, failure_reason: str | None = None
    ) -> None:
        """The sender's word. That it failed counts; that it has sent doesn't: landed is what `_landed`
        says.
        """
        if status == compat.KVPoll.Success:
            return
        super().apply_prefill_status(
            bootstrap_room=bootstrap_room,
            status=status,
            prefill_rank=prefill_rank,
            failure_reason=failure_reason,
        )

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        """SGLang would wait for each sender's word, or 30 s. Ending the lease is enough, and ours alone to
        do.
        """
        self.leased.end(bootstrap_room)
        return True

    # Prefill side

    def _take_frames(self, message: list[bytes]) -> list[bytes]:
        """Note what our decode side added to a message; SGLang gets its own frames."""
        if message and message[0] == b"ABORT" and len(message) > 1:
            self._note_early_abort(message[1])
            return message
        for frames, take in (
            (K_REGISTRATION_FRAMES, self._take_layout),
            (K_METADATA_FRAMES, self._take_grant),
        ):
            if len(message) > frames + 1 and message[frames] == K_GRANT_TAG:
                take(message, *message[frames + 1 :])
                return message[:frames]
        if message and len(message) >= K_METADATA_FRAMES and message[4] != b"" and message[0].isdigit():
            self._refuse(message, "the decode server's backend is not prfaas, or another version of it")
        return message

    def _note_early_abort(self, room: bytes) -> None:
        """An abort that arrives before the request itself: SGLang would forget it, and wait out a
        time-out.
        """
        if room.isdigit() and int(room) not in self.request_status:
            self.sending.cancel(int(room), "aborted")
            self._forget_places(int(room))
            self.doomed.put(int(room), "Aborted by the decode server before prefill had the request")

    def _take_layout(self, message: list[bytes], data: bytes, *later: bytes) -> None:
        session = message[3].decode("ascii")
        try:
            theirs = layout.Layout.from_bytes(data)
            wrong = layout.differences(layout.describe(self), theirs)
        except (ValueError, msgspec.MsgspecError) as error:
            wrong = f"unreadable layout: {error}"
        if wrong:
            logger.error("prfaas: decode session %s refused: %s", session, wrong)
            self.refused_sessions[session] = wrong
        else:
            self.refused_sessions.pop(session, None)

    def _take_grant(self, message: list[bytes], data: bytes, where: bytes = b"", *later: bytes) -> None:
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
        except (ValueError, PrfaasError) as error:
            self._refuse(message, str(error))
            return
        if grant.room != int(message[0]):
            self._refuse(message, f"a lease for room {grant.room} in a message about room {int(message[0])}")
            return
        if places is not None:
            self.places[session, grant.room] = places
        self.sending.granted(session, grant)

    def _refuse(self, message: list[bytes], reason: str) -> None:
        """Tell both sides at once that this room can't be."""
        room, target = int(message[0]), (message[1].decode("ascii"), int(message[2]))
        if room in self.request_status:
            self.conclude_failure(bootstrap_room=room, failure_reason=reason, targets=[target])
            return
        self.doomed.put(room, reason)
        self.send_kv_status_message(
            targets=[target],
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
        self.update_status(chunk.room, compat.KVPoll.Transferring)
        self.verification.sending(chunk)
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
        places = self.places.get((session, room))
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
            yield Part(session, kind, staging.copy_out(some, address), partial(staging.give, address))

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
                        have,
                        peer.dst_kv_ptrs,
                        wanted,
                        peer.dst_tp_rank,
                        peer.dst_attn_tp_size,
                        peer.dst_kv_item_len,
                        executor,
                        peer.dst_kv_layer_ids,
                    )
            self._must_plan(failed, "KV")
            planned.append((TransferKind.KV, recorder.segments()))
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

    def _must_plan(self, failed: Any, what: str) -> None:
        if failed:
            raise PrfaasError(f"SGLang's mapping of {what} to this peer failed; its log says why")

    def _sent(self, room: SendingRoom, failure: str | None) -> None:
        """Every peer has acknowledged all of a room, or it failed."""
        self._forget_places(room.room)
        if failure is not None:
            self.conclude_failure(bootstrap_room=room.room, failure_reason=failure)
            return
        # The peers know by their own word; this is for the prefill scheduler.
        self.conclude_transfer(bootstrap_room=room.room, status=compat.KVPoll.Success, targets=[])

    def _forget_places(self, room: int) -> None:
        for key in [key for key in list(self.places) if key[1] == room]:
            self.places.pop(key, None)

    def teardown(self) -> None:
        """SGLang's, at a role switch, then the transport's: the next role makes a new one."""
        super().teardown()
        self.pump.close()


def _nothing() -> None:
    pass


def _aborted(room: int, reason: str | None) -> str:
    return reason or f"KV transfer of room {room} aborted: a poll of this rank or of another one failed"


class PrfaasKVSender(compat.MooncakeKVSender):  # type: ignore[misc]
    """Prefill side of a request."""

    supports_host_tensor_indices = compat.has_cuda()
    """Without CUDA there is no pinned memory to ask for."""

    def clear(self) -> None:
        self.kv_mgr.sending.cancel(self.bootstrap_room, "the request ended")
        super().clear()

    def failure_exception(self) -> None:
        with self.kv_mgr.failure_lock:
            known = self.kv_mgr.failure_records.get(self.bootstrap_room)
            self.kv_mgr.failure_records[self.bootstrap_room] = _aborted(self.bootstrap_room, known)
        super().failure_exception()


class PrfaasKVReceiver(compat.MooncakeKVReceiver):  # type: ignore[misc]
    """Decode side of a request."""

    def abort(self) -> None:
        self.kv_mgr.leased.end(self.bootstrap_room)
        super().abort()
        if self.bootstrap_addr not in self.kv_mgr.prefill_info_table:
            self.kv_mgr.record_failure(
                self.bootstrap_room,
                f"Aborted: no answer from the prefill server's bootstrap at {self.bootstrap_addr}",
            )

    def clear(self) -> None:
        self.kv_mgr.leased.end(self.bootstrap_room)
        super().clear()

    def failure_exception(self) -> None:
        self.kv_mgr.leased.end(self.bootstrap_room)
        with self.kv_mgr.failure_lock:
            known = self.kv_mgr.failure_records.get(self.bootstrap_room)
            self.kv_mgr.failure_records[self.bootstrap_room] = _aborted(self.bootstrap_room, known)
        super().failure_exception()


class PrfaasKVBootstrapServer(compat.MooncakeKVBootstrapServer):  # type: ignore[misc]
    """SGLang's own."""
