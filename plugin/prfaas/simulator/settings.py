"""How a simulated world behaves, beyond what an experiment file says."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prfaas.config.router import Retry
from prfaas.model.ids import SiteId
from prfaas.simulator.choosing import ServiceOrder


@dataclass(frozen=True)
class Settings:
    """The defaults are a real deployment's."""

    door_site: SiteId | None = None
    """Where the router is; None: at each request's decode site."""
    observe_every_s: float = 0.25
    """How old what the door knows of the sites' load may be (a router polls); 0: always exact."""
    index_delay_s: float = 0.05
    """How long the news of a prefix cache take to the door."""
    admission: bool = True
    """Whether the links' ledgers are asked before a transfer starts."""
    service_order: ServiceOrder = "fcfs"
    """Order in which prefill takes its queue."""
    homes: tuple[SiteId, ...] = ()
    """Sites whose users the requests are, in turn: each is decoded at home. Empty: where the policy says."""
    request_bytes_per_token: float = 0.0
    """What a prompt weighs on its way to a prefill server of another site, over a connection that starts
    slowly each time; 0: requests go by the pumps' streams, which are kept warm."""
    timeout_s: float = math.inf
    """A request without a first token by then is answered with an error."""
    retry: Retry | None = None
    """The door's patience with an attempt whose link is dead. None: there is no door, and who sends the
    requests neither gives an attempt up nor hears of links."""
