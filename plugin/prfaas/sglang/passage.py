"""SGLang's own bootstrap and control between sites, by way of the pumps: encrypted, authenticated, one port.

SGLang 0.5.23 fetches a prefill server's layout by HTTP and sends rooms and aborts by ZMQ, in plaintext, to
ports of its own choice. With `control:` in the configuration its connections to the hosts named there go to
loopback instead, where this node's pump takes them to the pump beside that host (pump/forwarding.py):

* the decode side learns from the configuration which pump stands beside which host;
* the prefill side learns it from the decode side, whose session names its pump;
* a host that should be reached so and can't be is not reached at all.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

from prfaas.config.pump import split_address
from prfaas.model.errors import PrfaasError
from prfaas.pump_client import PumpClient
from prfaas.sglang import compat, touch_points

logger = logging.getLogger(__name__)

K_NOWHERE = "127.0.0.1:9"
"""Refuses at once: the discard service's port."""
K_SCHEME = "tcp://"
K_ANSWER_S = 2.0
"""For this node's own pump, once an address: SGLang's scheduler waits meanwhile."""
K_SILENT_S = 10.0
"""How long a pump that didn't answer isn't asked again: the scheduler would wait for each new request."""


class Passage:
    """Where to connect instead. Its methods may be called from any thread."""

    def __init__(self, pump: PumpClient, pumps: Mapping[str, str]) -> None:
        """`pumps`: the pump's host:port by the host that it stands beside."""
        self._pump = pump
        self._named, self._learnt = dict(pumps), dict[str, str]()
        self._behind: dict[str, str] = {}
        self._silent_until_s = -math.inf
        self._lock = threading.Lock()

    def learn(self, host: str, pump: str) -> None:
        """The peer at `host` says its pump is there. The configuration's word stands."""
        with self._lock:
            self._learnt[host] = pump

    def is_known(self, endpoint: str) -> bool:
        """Whether `endpoint` needn't ask the pump."""
        address = endpoint.removeprefix(K_SCHEME)
        with self._lock:
            return self._pump_of(address) is None or address in self._behind.values()

    def _pump_of(self, address: str) -> str | None:
        """The pump that leads to it; None: it is reached as it is."""
        if address in self._behind:
            return None
        try:
            host, _ = split_address(address)
        except ValueError:
            # A client's own words: SGLang says what is wrong with them, and goes on.
            return None
        return self._named.get(host) or self._learnt.get(host)

    def address(self, address: str) -> str:
        """host:port to connect to instead of `address`: itself, if its host isn't one to be reached by a
        pump.
        """
        began_s = time.monotonic()
        with self._lock:
            pump = self._pump_of(address)
            silent = began_s < self._silent_until_s and address not in self._behind.values()
        if pump is None:
            return address
        if silent:
            return K_NOWHERE
        try:
            # Without the lock: the thread that hears the answer may be about to want it.
            lead = self._pump.forward(pump, *split_address(address), timeout_s=K_ANSWER_S)
        except PrfaasError as error:
            logger.error("prfaas: no way to %s by the pump at %s: %s", address, pump, error)
            if (now_s := time.monotonic()) - began_s >= K_ANSWER_S:
                self._silent_until_s = now_s + K_SILENT_S
            return K_NOWHERE
        with self._lock:
            self._behind[lead] = address
        return lead

    def behind(self, lead: str) -> str:
        """The address that a loopback one stands for; any other is its own."""
        with self._lock:
            return self._behind.get(lead, lead)

    def endpoint(self, endpoint: str) -> str:
        """The same for ZMQ's "tcp://host:port"."""
        return K_SCHEME + self.address(endpoint.removeprefix(K_SCHEME))


_here: Passage | None = None
"""This process's, for hooks and class methods that know no manager."""


def use(passage: Passage | None) -> None:
    global _here
    _here = passage


def here(endpoint: str) -> str:
    """Where this process connects to instead of a ZMQ endpoint."""
    return endpoint if _here is None else _here.endpoint(endpoint)


def register_in_scheduler() -> None:
    compat.HookRegistry.register(touch_points.K_BOOTSTRAP_ADDRESS, bootstrap_address, compat.HookType.AROUND)


def bootstrap_address(original: Any, req: Any) -> str:
    """SGLang's address of a request's bootstrap server, and its key for all it knows of that server."""
    address = str(original(req))
    return address if _here is None else _here.address(address)
