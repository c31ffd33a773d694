"""The classes that SGLang asks a disaggregation backend for.

The manager is Mooncake's with its engine, its transfer worker and its release of aborted pages replaced. From
SGLang come the bootstrap, the mapping of ranks, layers, slices and state kinds, role switch, and the status
of rooms. Ours are:

* what the decode side sends beside its page indices: a lease (`_grant`), made when the pages are allocated;
* the worker: it plans a chunk by SGLang's methods, hands the parts over and goes on; nothing waits for a
link; layers of a chunk leave as they are done (layer_side.py);
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
import threading
from typing import Any

from prfaas.config.backend import K_ENVIRONMENT, BackendConfig, load_backend_config
from prfaas.config.pump import split_address
from prfaas.model.errors import PrfaasError
from prfaas.pump_client import LocalPumpClient
from prfaas.sglang import compat, layout, passage, plugin
from prfaas.sglang.asking import AskedRooms
from prfaas.sglang.decode_side import DecodeSide
from prfaas.sglang.layer_side import LayerSide
from prfaas.sglang.passage import Passage
from prfaas.sglang.planning import RecordingEngine
from prfaas.sglang.refusal import Refusal
from prfaas.sglang.rooms import LeasedRooms, Remembered, SendingRooms
from prfaas.sglang.staging import CudaMemory, HostMemory, Staging
from prfaas.sglang.verification import Verification

logger = logging.getLogger(__name__)


def load_config() -> BackendConfig:
    """The file that PRFAAS_CONFIG names, or loopback's defaults. Raises ConfigError, which ends the
    launch.
    """
    return load_backend_config(os.environ.get(K_ENVIRONMENT))


class PrfaasKVManager(DecodeSide, LayerSide):
    """One a scheduler process: a rank of a prefill or of a decode server."""

    kv_status_msg_carries_reason = True

    def init_engine(self) -> None:
        """Called by the constructor, after the bootstrap and before memory is registered."""
        config = load_config()
        plugin.complete(config, self.disaggregation_mode == compat.DisaggregationMode.PREFILL)
        self.deadline_s = config.deadline_s
        self.pump = LocalPumpClient.open(
            config.pump, name=f"sglang {self.disaggregation_mode.value} {os.getpid()}"
        )
        # The last part must be a number to SGLang, and the whole unlike any other manager's.
        self.session_id = f"{self.pump.address}/{secrets.token_hex(8)}:{self.rank_port}"
        self.engine = RecordingEngine(self.pump, self.session_id)
        self.staging = self._make_staging(config)
        self._open_passage(config)
        self._open_near(config)
        self.verification = Verification(config, self.kv_args, self.disaggregation_mode.value)
        self.verification.prepare(self.pump.register)
        # By room. What is refused or aborted before the request itself arrives here is kept in `doomed`.
        self.doomed = Remembered()
        # What has failed on the prefill side before all its grants were here.
        self.ended = Remembered()
        self.refused_sessions = Remembered()
        self.leased = LeasedRooms()
        self.asked = AskedRooms(
            self.pump,
            config.admission.within_s or config.deadline_s,
            config.admission.may_queue,
            self._let_go,
            self._refuse_room,
        )
        source = f"rank {self._prefill_unique_rank()}"
        self.sending = SendingRooms(self.pump, source, self._sent, self.asked.offer_of)
        self._open_overlap(config.overlap, PrfaasKVSender)
        logger.info(
            "prfaas: %s rank at %s, session %s",
            self.disaggregation_mode.value,
            self.local_ip,
            self.session_id,
        )

    def _open_passage(self, config: BackendConfig) -> None:
        """Let SGLang's own control pass by the pumps, both ways."""
        self.passage = None if config.control is None else Passage(self.pump, config.control.pumps)
        passage.use(self.passage)
        if self.passage is None:
            return
        if self.disaggregation_mode == compat.DisaggregationMode.PREFILL:
            self.pump.expose(self.bootstrap_host, self.bootstrap_port)
            self.pump.expose(self.bootstrap_host, int(self.server_args.port))
        self.pump.expose(self.local_ip, self.rank_port)

    def _send_multipart_locked(self, endpoint: str, parts: list[bytes], is_ipv6: bool = False) -> None:
        """SGLang's, by the pumps. That a transfer has failed is told on the thread that hears the pump:
        another has to ask it for a way that isn't known yet.
        """
        if self.passage is None or self.passage.is_known(endpoint) or not self.pump.in_callback:
            super()._send_multipart_locked(passage.here(endpoint), parts, is_ipv6)
        else:
            again, what = self._send_multipart_locked, (endpoint, parts, is_ipv6)
            threading.Thread(target=again, args=what, name="prfaas-tell", daemon=True).start()

    def _resolve_rebootstrap_prefill_url(self, kv_receiver: Any) -> str | None:
        """SGLang's, whose host is that of the bootstrap server: of the real one, and reached as it is."""
        url: str | None = super()._resolve_rebootstrap_prefill_url(kv_receiver)
        if url is None or self.passage is None:
            return url
        host = split_address(self.passage.behind(kv_receiver.bootstrap_addr))[0]
        port = self.prefill_info_table[kv_receiver.bootstrap_addr].prefill_http_port
        return f"http://{self.passage.address(f'{host}:{port}')}"

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
        if self.disaggregation_mode == compat.DisaggregationMode.DECODE and (
            kinds := layout.whole_regions(self.kv_args)
        ):
            staging.close()
            raise PrfaasError(
                f"a decode server whose caches are staged can't take state of {', '.join(kinds)}"
            )
        self.pump.register([(staging.address, staging.size_bytes)])
        return staging

    def register_buffer_to_engine(self) -> None:
        """SGLang's; of staged pages only the auxiliary data's memory is the pump's to read and write."""
        if self.staging is None:
            super().register_buffer_to_engine()
        else:
            self.engine.batch_register(self.kv_args.aux_data_ptrs, self.kv_args.aux_data_lens)
        if self.near is not None:
            self.near.resume()

    def deregister_buffer_to_engine(self) -> None:
        if self.staging is None:
            super().deregister_buffer_to_engine()
        else:
            self.engine.batch_deregister(self.kv_args.aux_data_ptrs)
        if self.near is not None:
            self.near.release()

    # Both sides: status

    def update_status(self, bootstrap_room: int, status: Any) -> None:
        """SGLang's, and: prefill isn't scheduled before the links have places for its bytes; a room that
        fails stops sending, and its lease ends, now.
        """
        poll = compat.KVPoll
        if status == poll.WaitingForInput and (
            bootstrap_room in self.doomed or self.asked.hold(bootstrap_room)
        ):
            return
        super().update_status(bootstrap_room, status)
        if status == poll.Failed:
            if self.disaggregation_mode == compat.DisaggregationMode.PREFILL:
                self.asked.end(bootstrap_room)
                self.sending.cancel(bootstrap_room, "the room failed")
                self._forget_overlap(bootstrap_room)
            else:
                self.leased.end(bootstrap_room)
        elif status == poll.Bootstrapping:
            self.ended.take(bootstrap_room)  # an earlier life's
            if reason := self.doomed.take(bootstrap_room):
                self.conclude_failure(bootstrap_room=bootstrap_room, failure_reason=reason)

    def record_failure(self, bootstrap_room: int, failure_reason: str) -> None:
        """SGLang's, but a refusal stays the reason: the aborts on both sides follow from it."""
        if Refusal.found_in(self.failure_records.get(bootstrap_room, "")) is None:
            super().record_failure(bootstrap_room, failure_reason)

    def _make_worker_recv(self, socket: Any, timeout_ms: int = 500) -> Any:
        """SGLang's reader of the control socket, with our frames taken off what it reads."""
        receive = super()._make_worker_recv(socket, timeout_ms)
        if self.disaggregation_mode != compat.DisaggregationMode.PREFILL:
            return receive

        def read() -> Any:
            message = receive()
            if message is None:
                return None
            try:
                return self._take_frames(message)
            except Exception as error:
                # SGLang's thread that reads would end with it, and the server would hear nobody any more.
                words = "prfaas: a message that can't be read is dropped: %r: %r"
                logger.warning(words, error, message[:1], exc_info=True)
                return None

        return read

    def teardown(self) -> None:
        """SGLang's, at a role switch, then the transport's: the next role makes a new one."""
        if self.near is not None:
            self.near.close()
        super().teardown()
        self.pump.close()
        if self.staging is not None:
            self.staging.close()


def _aborted(room: int, reason: str | None) -> str:
    return reason or f"KV transfer of room {room} aborted: a poll of this rank or of another one failed"


class PrfaasKVSender(compat.MooncakeKVSender):  # type: ignore[misc]
    """Prefill side of a request."""

    supports_host_tensor_indices = compat.has_cuda()
    """Without CUDA there is no pinned memory to ask for."""

    def clear(self) -> None:
        self.kv_mgr.asked.end(self.bootstrap_room)
        self.kv_mgr.sending.cancel(self.bootstrap_room, "the request ended")
        self.kv_mgr._forget_overlap(self.bootstrap_room)
        super().clear()

    def failure_exception(self) -> None:
        with self.kv_mgr.failure_lock:
            known = self.kv_mgr.failure_records.get(self.bootstrap_room)
            reason = _aborted(self.bootstrap_room, known)
            self.kv_mgr.failure_records[self.bootstrap_room] = reason
        self.kv_mgr.tell_failed(self.bootstrap_room, reason)
        super().failure_exception()


class PrfaasKVReceiver(compat.MooncakeKVReceiver):  # type: ignore[misc]
    """Decode side of a request."""

    def __new__(cls, mgr: Any, bootstrap_addr: str, bootstrap_room: int | None = None) -> Any:
        """SGLang's own receiver instead, when prefill is in this site."""
        return mgr.near_receiver(bootstrap_addr, bootstrap_room) or super().__new__(cls)

    @classmethod
    def _connect(cls, endpoint: str, is_ipv6: bool = False) -> Any:
        return super()._connect(passage.here(endpoint), is_ipv6)

    @classmethod
    def disconnect_endpoint(cls, endpoint: str) -> None:
        super().disconnect_endpoint(passage.here(endpoint))

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
        # Prefill may not know, and would wait for us.
        self.ensure_abort_notified()
        super().failure_exception()


class PrfaasKVBootstrapServer(compat.MooncakeKVBootstrapServer):  # type: ignore[misc]
    """SGLang's own."""
