"""The manager's work on a decode server: leases on pages, and what becomes of them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from prfaas.config.backend import BackendConfig
from prfaas.model.errors import PrfaasError
from prfaas.sglang import compat, layout
from prfaas.sglang.control import K_GRANT_TAG, K_NO_GRANT
from prfaas.sglang.near import NearTier, ReachedServers
from prfaas.sglang.refusal import K_RETRY_AFTER_S, Refusal
from prfaas.sglang.rooms import LeasedRoom, describe
from prfaas.sglang.staging import Places

logger = logging.getLogger(__name__)

K_NO_REASON = (
    "Aborted: the prefill server failed the transfer without a reason, as one does that doesn't run prfaas; "
    "if it is of this site, name its host in near.hosts"
)


def _nothing() -> None:
    pass


class DecodeSide(compat.MooncakeKVManager):  # type: ignore[misc]
    """Part of PrfaasKVManager, which has what it uses: pump, leased, staging, verification, deadline_s."""

    near: NearTier | None = None

    def _open_near(self, config: BackendConfig) -> None:
        """The second tier: prefill servers of this site."""
        if config.near is None or self.disaggregation_mode != compat.DisaggregationMode.DECODE:
            return
        if self.passage is None:
            self.near = NearTier.open(config.near, self)
        else:
            self.near = NearTier.open(config.near, self, self.passage.behind)
        self.prefill_info_table = ReachedServers(self.near)

    def near_receiver(self, bootstrap_addr: str, bootstrap_room: int | None) -> Any | None:
        """SGLang's own receiver, of a request whose prefill server is of this site."""
        if self.near is None or not self.near.holds(bootstrap_addr):
            return None
        return self.near.receiver(bootstrap_addr, bootstrap_room)

    def submit_prefill_recompute(self, kv_receiver: Any, payload: dict[str, Any]) -> None:
        if kv_receiver.kv_mgr is self:
            super().submit_prefill_recompute(kv_receiver, payload)
        else:
            kv_receiver.kv_mgr.submit_prefill_recompute(kv_receiver, payload)

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
            return [*message, K_GRANT_TAG, K_NO_GRANT + str(error).encode(), b"", b""]

    def _grant(self, room: int, arguments: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
        """The room's lease, where its pages are staged if they are, and how many bytes each of its senders
        has to bring; made at the first of its prefill ranks, the same for the others."""
        leased = self.leased.find(room)
        if leased is None:
            leased = self._lease(
                room, arguments["kv_indices"], arguments["aux_index"], arguments["state_indices"]
            )
        elif leased.aux_index != arguments["aux_index"]:
            raise PrfaasError(
                f"room {room} is another request's already; SGLang gives all samples of a request "
                "(n above 1) one room: ask for them one by one"
            )
        places = b"" if leased.places is None else leased.places.to_bytes()
        return leased.lease.grant.to_text().encode(), places, str(leased.share_bytes).encode()

    def _lease(
        self, room: int, kv_indices: Any, aux_index: int | None, state_indices: list[Any] | None
    ) -> LeasedRoom:
        pages = layout.leased_pieces(self.kv_args, kv_indices, None, state_indices)
        slot = layout.aux_pieces(self.kv_args, aux_index)
        size_bytes = pages[:, 1].sum() + slot[:, 1].sum()
        places, release = None, _nothing
        if self.staging is not None and len(pages):
            staging, total = self.staging, int(pages[:, 1].sum())
            address = staging.take(total)
            if address is None:
                # It comes free with the requests that hold it: to be asked again, as a link that is full.
                full = f"decode server: no {total} bytes of staging free, {staging.free_bytes} are"
                raise PrfaasError(Refusal(full, K_RETRY_AFTER_S).text)
            places, release = Places.laid_out(pages, address), lambda: staging.give(address)
            pages = np.array([[address, total]], dtype=np.uint64)
        senders = max(1, self.required_prefill_response_num_table.get(room, 1))
        share_bytes = int(size_bytes) // senders
        generation = self.leased.next_generation()
        try:
            self.verification.leased(room, generation, kv_indices, aux_index, state_indices)
            lease = self.pump.grant_lease(
                room,
                generation,
                [(int(address), int(length)) for address, length in np.concatenate((pages, slot))],
                self.deadline_s,
                expected_sources=senders,
            )
        except BaseException:
            release()
            raise
        leased = LeasedRoom(room, generation, lease, places, release, share_bytes, aux_index)
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
        elif leased.lease.complete:
            try:
                landed = self.leased.land(leased, lambda: self._settle(leased))
            except Exception as error:
                # A GPU that fails the copy, say: known now, and nobody else would tell the request.
                logger.exception("prfaas: room %s", room)
                self.record_failure(
                    room, f"KV transfer aborted: what landed can't be put into its pages: {error}"
                )
                self.update_status(room, compat.KVPoll.Failed)
                return
            if landed:
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
        manager, ensure = self, super().try_ensure_parallel_info
        if self.near is not None and self.near.holds(bootstrap_addr):
            manager, ensure = self.near.manager, self.near.manager.try_ensure_parallel_info
        try:
            return bool(ensure(bootstrap_addr))
        except RuntimeError as error:
            logger.error("prfaas: prefill server %s refused: %s", bootstrap_addr, error)
            for room in list(manager.addr_to_rooms_tracker[bootstrap_addr]):
                manager.record_failure(room, f"Aborted: prefill server {bootstrap_addr} refused: {error}")
                manager.update_status(room, compat.KVPoll.Failed)
            return False

    def apply_prefill_status(
        self, *, bootstrap_room: int, status: int, prefill_rank: int, failure_reason: str | None = None
    ) -> None:
        """The sender's word. That it failed counts; that it has sent doesn't: landed is what `_landed`
        says.
        """
        if status == compat.KVPoll.Success:
            return
        if not failure_reason:
            # SGLang's own backend says none, and ours always does.
            failure_reason = K_NO_REASON
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
