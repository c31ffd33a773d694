"""One request's way through the scheduler, and what is kept of each decision on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prfaas.model.decisions import Decision
from prfaas.model.ids import LinkId, ModelId, SiteId, TenantId
from prfaas.router.attempt import Route
from prfaas.router.fleet import ServerHandle
from prfaas.router.tokens import Prompt
from prfaas.routing import Policy


@dataclass(slots=True)
class Ticket:
    """Alive from admission at the door to the end of the answer."""

    request_id: str
    model: ModelId
    tenant: TenantId
    slo_class: str
    prompt: Prompt
    output_tokens: int | None
    arrived_s: float
    deadline_s: float | None = None
    held_s: float = 0.0
    """What it was kept at the door before its last dispatch."""
    cached: Mapping[str, int] = field(default_factory=dict)
    """Usable prefix by server."""
    attempt: int = 0
    failed_sites: set[SiteId] = field(default_factory=set)
    failed_servers: set[str] = field(default_factory=set)
    blame: dict[str, int] = field(default_factory=dict)
    """Failed attempts by server that had part in them."""
    suspects: dict[str, ServerHandle] = field(default_factory=dict)
    """Servers that answered it with an error of their own, until it is known whose fault that was."""
    decision: Decision | None = None
    route: Route | None = None
    """The running attempt's, or the last one's."""
    policy: Policy | None = None
    """The policy that was told of its dispatch, and is told of its end, even if a reload has replaced it."""
    link: LinkId | None = None
    """What the running attempt's KV crosses."""
    link_sent_s: float = 0.0
    """When that attempt began."""
    probe: bool = False
    """Whether it is the one that tries a link which had failed."""


@dataclass(frozen=True, slots=True)
class Record:
    """One decision, as /decisions and the event log show it."""

    at_s: float
    """Wall clock."""
    request: str
    model: str
    tenant: str
    slo_class: str
    attempt: int
    prompt_tokens: int
    cached_tokens: dict[str, int]
    decision: Decision
    prefill: str | None
    decode: str | None

    @property
    def site(self) -> str | None:
        return self.decision.prefill_site
