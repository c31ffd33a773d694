"""What the deciding code answers: where a request goes, whether a transfer may use a link; and why."""

from __future__ import annotations

from enum import StrEnum

from prfaas.model.ids import InstanceId, LinkId, PolicyName, RequestId, SiteId
from prfaas.model.values import value

K_MOVE_LEAST_S, K_MOVE_FACTOR = 2.0, 4.0


class Action(StrEnum):
    """What to do with a request now."""

    DISPATCH = "dispatch"
    HOLD = "hold"  # ask again at `until_s`, or sooner when an instance or link frees up
    SHED = "shed"  # answer 429 with `retry_after_s`
    NO_PATH = "no-path"  # answer 503: nothing that could serve it is alive


@value
class CacheMove:
    """Bring a prefix to where it is needed before (and while) prefill runs there."""

    source: SiteId
    target: SiteId
    tokens: int
    transfer_bytes: int

    @property
    def link(self) -> LinkId:
        return LinkId(self.source, self.target)

    def patience_s(self, predicted_ttft_s: float) -> float:
        """How long it is waited for, before the prompt is sent without it: so many times as long as the whole
        way to the first token was predicted to take.
        """
        return max(K_MOVE_LEAST_S, K_MOVE_FACTOR * predicted_ttft_s)


@value
class PathPrediction:
    """One way to serve a request, with what it would take.

    ttft_s counts from `now` and is the sum of what can't overlap: queue_s + move_s + prefill_s + tail_s.
    """

    prefill_site: SiteId
    decode_site: SiteId
    ttft_s: float
    queue_s: float
    """Wait for a prefill instance (and for the decode side, where that is longer)."""
    prefill_s: float
    tail_s: float
    """End of prefill to the last byte at the decode side: link wait, wire time prefill didn't hide, RTT."""
    uncached_tokens: int
    """Prefilled there: prompt less the usable prefix."""
    transfer_bytes: int
    """Bytes over `link`; 0 inside a site."""
    move_s: float = 0.0
    cache_move: CacheMove | None = None
    price: float = 0.0
    """Cost of the resources it uses, in the policy's own unit (`prices`: seconds of delay to others)."""
    feasible: bool = True
    why_not: str = ""
    """Set when not feasible: link down, no instance, excluded, deadline."""

    @property
    def link(self) -> LinkId | None:
        """The link its KV crosses; None inside a site."""
        if self.prefill_site == self.decode_site:
            return None
        return LinkId(self.prefill_site, self.decode_site)

    @property
    def label(self) -> str:
        return self.prefill_site if self.cache_move is None else f"{self.prefill_site}+move"


@value
class Decision:
    """Where one request goes, and why. `chosen` is set for DISPATCH, and for HOLD where there is a plan."""

    request: RequestId
    policy: PolicyName
    at_s: float
    action: Action
    reason: str
    """One line for people: what won, and over what."""
    chosen: PathPrediction | None = None
    alternatives: tuple[PathPrediction, ...] = ()
    """Every other path looked at, infeasible ones with their why_not."""
    prefill_instance: InstanceId | None = None
    """None: any of the site's (the shell balances)."""
    decode_instance: InstanceId | None = None
    deadline_s: float | None = None
    """When the first token is due."""
    order_s: float | None = None
    """Order of service where a queue can be ordered: smaller first; None: the deadline."""
    threshold_tokens: float | None = None
    """Uncached length above which this request would have gone out, where the policy has one (inf: never)."""
    until_s: float | None = None
    gives_up: tuple[RequestId, ...] = ()
    """Held requests whose place it takes: they will be recalled."""
    retry_after_s: float | None = None

    @property
    def planned(self) -> bool:
        """Held for an instance: the policy recalls it, and is told that it is held."""
        return self.action is Action.HOLD and self.prefill_instance is not None

    @property
    def prefill_site(self) -> SiteId | None:
        return self.chosen.prefill_site if self.chosen else None

    @property
    def decode_site(self) -> SiteId | None:
        return self.chosen.decode_site if self.chosen else None

    @property
    def predicted_ttft_s(self) -> float | None:
        return self.chosen.ttft_s if self.chosen else None

    @property
    def offloaded(self) -> bool:
        return self.chosen is not None and self.chosen.link is not None

    @property
    def transfer_bytes(self) -> int:
        return self.chosen.transfer_bytes if self.chosen else 0

    @property
    def cache_move(self) -> CacheMove | None:
        return self.chosen.cache_move if self.chosen else None


class Verdict(StrEnum):
    """A ledger's answer to one transfer."""

    ADMITTED = "admitted"
    QUEUED = "queued"  # will be admitted by itself when room appears; may be cancelled by release
    REFUSED = "refused"  # left no trace


class RefusalReason(StrEnum):
    """Why a link's ledger refused. The text is part of the protocol and of /metrics: it doesn't change."""

    LINK_DOWN = "link-down"
    DEADLINE = "deadline-cannot-be-met"
    DEADLINE_PASSED = "deadline-passed"
    WOULD_BREAK_OTHERS = "would-break-admitted"
    QUEUE_FULL = "queue-full"
    DUPLICATE = "duplicate"
    BAD_REQUEST = "bad-request"


@value
class AdmissionDecision:
    """The ledger's answer."""

    verdict: Verdict
    link: LinkId
    at_s: float
    reason: RefusalReason | None = None
    """None unless refused."""
    retry_after_s: float | None = None
    """When asking again may help; None: not before something changes."""
    finish_by_s: float | None = None
    """Admitted: when it is predicted to be through at the estimated rate."""
