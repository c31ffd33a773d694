"""One request under way: what has been decided of it, and where it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from prfaas.model.decisions import Decision
from prfaas.model.ids import LinkId, SiteId
from prfaas.model.observations import RequestView
from prfaas.model.values import value
from prfaas.simulator.engine import Engine
from prfaas.simulator.job import Job
from prfaas.simulator.pipes import Transfer
from prfaas.workload.requests import TimedRequest


@value
class Sent:
    """What is kept of a decision that was carried out. The paths that it weighed are most of a request's
    memory: given back at once, they are used again by the next decision, still in the processor's caches.
    """

    prefill_site: SiteId | None
    reason: str
    deadline_s: float | None
    tail_s: float = 0.0
    """From the end of prefill to the last byte's acknowledgement, as it was predicted."""
    predicted_ttft_s: float | None = None
    """From the decision on."""


@dataclass(slots=True, eq=False)
class Live:
    """The record is written from it at its end."""

    request: TimedRequest
    name: str = field(init=False)
    """As the policy knows it."""
    excluded: frozenset[SiteId] = frozenset()
    attempt: int = 0
    decision: Decision | Sent | None = None
    """The last one."""
    prefill: Engine | None = None
    decode: Engine | None = None
    prefill_job: Job | None = None
    decode_job: Job | None = None
    transfer: Transfer | None = None
    link: LinkId | None = None
    move: Transfer | None = None
    """A prefix that its prefill instance is being brought, over `move_link`."""
    move_link: LinkId | None = None
    moved_tokens: int = 0
    """What of its prompt was brought so."""
    moved_bytes: int = 0
    first_token_s: float | None = None
    cached_tokens: int = 0
    kv_bytes: int = 0
    asked_s: float = 0.0
    """When this attempt left the door."""
    request_wait_s: float = 0.0
    """What its way to another site takes beyond half a round trip."""
    opens: bool = False
    """Whether it opened a connection for that."""
    window_bytes: float = 0.0
    """Of the connection that it went by; 0 where it took none, or that is given back."""
    over: bool = False
    prefilled_s: float | None = None
    view: RequestView | None = None

    def __post_init__(self) -> None:
        self.name = str(self.request.index)
