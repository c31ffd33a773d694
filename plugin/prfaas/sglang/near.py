"""Prefill servers of a decode server's own site, by SGLang's stock engine, beside ours for all others.

SGLang knows one manager of a decode server. Ours keeps a second, SGLang's own for Mooncake, unchanged, with
its control socket, threads, rooms and engine: what is refused or fails in one tier is unknown to the other. A
request's receiver belongs to one of the two, by the host that the request names its prefill server by.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

from prfaas.config.backend import NearConfig
from prfaas.config.pump import split_address
from prfaas.model.errors import MachineError, PrfaasError
from prfaas.sglang import compat, touch_points

logger = logging.getLogger(__name__)

K_FORCE_TCP = "MC_FORCE_TCP"
"""How Mooncake, and SGLang's mooncake_tcp, are told."""


def check_installed() -> None:
    """Raises MachineError without Mooncake's package, SglangMoved where SGLang isn't as expected."""
    try:
        found = importlib.util.find_spec("mooncake.engine")
    except ImportError:
        found = None
    if found is None:
        raise MachineError(
            "near: Mooncake's package isn't installed: pip install mooncake-transfer-engine, "
            "or mooncake-transfer-engine-non-cuda on a machine without CUDA"
        )
    compat.check(touch_points.K_NEAR_POINTS)


class NearTier:
    """The site's own prefill servers. Its methods may be called from any thread."""

    def __init__(
        self, config: NearConfig, manager: Any, behind: Callable[[str], str] = lambda address: address
    ) -> None:
        """`manager`: SGLang's. `behind`: the real address for one that leads to it by a pump."""
        self._config, self._behind = config, behind
        self.manager = manager
        self._registered = True

    @classmethod
    def open(
        cls, config: NearConfig, ours: Any, behind: Callable[[str], str] = lambda address: address
    ) -> NearTier:
        """Beside `ours`, on the same memory. Raises PrfaasError when the engine doesn't start."""
        if config.transport == "tcp":
            os.environ.setdefault(K_FORCE_TCP, "1")
        args = ours.kv_args
        try:
            compat.init_mooncake_transfer_engine(
                hostname=compat.get_local_ip_auto(),
                gpu_id=getattr(args, "gpu_id", None),
                ib_device=getattr(args, "ib_device", None),
            )
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise PrfaasError(f"near: Mooncake's engine doesn't start: {error.__cause__ or error}") from error
        manager = compat.MooncakeKVManager(
            args, ours.disaggregation_mode, ours.server_args, ours.is_mla_backend
        )
        logger.info(
            "prfaas: prefill servers at %s by Mooncake over %s", ", ".join(config.hosts), config.transport
        )
        return cls(config, manager, behind)

    def holds(self, bootstrap_addr: str) -> bool:
        """Whether the prefill server whose bootstrap is at host:port is of this site."""
        try:
            host, _ = split_address(self._behind(bootstrap_addr))
        except ValueError:
            return False
        return self._config.holds(host)

    def receiver(self, bootstrap_addr: str, bootstrap_room: int | None) -> Any:
        """SGLang's own, of a request whose prefill is here."""
        return compat.MooncakeKVReceiver(
            mgr=self.manager, bootstrap_addr=bootstrap_addr, bootstrap_room=bootstrap_room
        )

    def release(self) -> None:
        """The caches' memory is going away: the engine lets go of it."""
        if self._registered:
            self._registered = False
            self.manager.deregister_buffer_to_engine()

    def resume(self) -> None:
        """It is back."""
        if not self._registered:
            self._registered = True
            self.manager.register_buffer_to_engine()

    def close(self) -> None:
        """At a role switch: SGLang's teardown, which lets go of the memory too. The engine stays, as SGLang's
        does.
        """
        self._registered = False
        self.manager.teardown()


class ReachedServers(dict[str, Any]):
    """Our manager's table of prefill servers. SGLang's scheduler asks it about all of them, by `get`; its
    heartbeats and all that iterates see ours alone.
    """

    def __init__(self, near: NearTier) -> None:
        super().__init__()
        self._near = near

    def get(self, key: str, default: Any = None) -> Any:
        found = super().get(key)
        return self._near.manager.prefill_info_table.get(key, default) if found is None else found
