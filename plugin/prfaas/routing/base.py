"""The contract of a routing policy, the costs it reckons with, and its creation by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Decision
from prfaas.model.errors import UsageError
from prfaas.model.ids import ModelId, RequestId, SiteId
from prfaas.model.observations import RequestView, Snapshot


class CostProfile(Protocol):
    """What one instance of a site takes for a prompt. Both must not fall with tokens."""

    def prefill_s(self, tokens: float, /) -> float:
        """T_prefill(l), seconds for l uncached tokens on an idle instance."""
        ...

    def kv_bytes(self, tokens: float, /) -> float:
        """S_kv(l), bytes of KV and state of a prompt of l tokens; S_kv(0) is the constant state."""
        ...


@dataclass(frozen=True)
class Fleet:
    """What doesn't change from request to request."""

    profiles: Mapping[tuple[SiteId, ModelId], CostProfile]
    """By site and model; ("", model), (site, "") and ("", "") stand for any site or model."""
    local_sites: frozenset[SiteId] = field(default_factory=frozenset)
    """Sites that decode (local PD clusters); the others are PrfaaS clusters and only prefill."""
    movable: bool = False
    """Whether a cached prefix can be brought to another site's prefill cache."""

    def profile(self, site: SiteId, model: ModelId) -> CostProfile:
        """Raises UsageError when nothing was given for it."""
        for key in ((site, model), (site, ""), ("", model), ("", "")):
            found = self.profiles.get(key)
            if found is not None:
                return found
        raise UsageError(f"no profile for model {model!r} at site {site!r}")


class Policy(ABC):
    """Decides, for each request, where to prefill.

    Guarantees: `decide` always answers, never raises for anything a snapshot may hold, keeps no snapshot and
    changes nothing but its own smoothing and what was planned for this very request while it was held: only
    `on_dispatch` books work. `now` never goes back.
    Hooks are keyword-only; a shell that can't tell something leaves the hook uncalled.
    """

    name: str = ""
    names_instances = False
    """Whether it reckons with single instances where a snapshot lists them; its choice is then followed."""

    def __init__(self, config: PolicyConfig, fleet: Fleet) -> None:
        self.config = config
        self.fleet = fleet

    @abstractmethod
    def decide(self, request: RequestView, snapshot: Snapshot, now: float) -> Decision:
        """Where this request goes now. It may be asked for again (after HOLD, a refusal, a failure); what was
        planned for it while it was held is forgotten then.
        """
        ...

    def on_hold(self, *, request: RequestView, decision: Decision, now: float) -> None:
        """The shell keeps the request, as decided. It ends by another decision, or by on_finished."""
        return None

    def recalls(self, now: float) -> tuple[Sequence[RequestId], float]:
        """Held requests to be decided anew now, and when to ask again for others (inf: after the next event).
        They are named each time until that is done.
        """
        return (), math.inf

    def on_dispatch(self, *, request: RequestView, decision: Decision, now: float) -> None:
        """The shell has sent the request as decided."""
        return None

    def on_prefill_done(self, *, request: RequestId, now: float, ago_s: float = 0.0) -> None:
        """Its prefill has ended, ago_s before it was heard of; bytes may still be on their way."""
        return None

    def on_first_token(self, *, request: RequestId, now: float, cached_tokens: int | None = None) -> None:
        """The client has its first token; cached_tokens is what the server said it reused."""
        return None

    def on_refused(self, *, request: RequestId, reason: str, retry_after_s: float | None, now: float) -> None:
        """A ledger or a server refused it: what was booked for this attempt is void."""
        return None

    def on_failed(self, *, request: RequestId, site: SiteId, reason: str, now: float) -> None:
        """The attempt failed (dead link or server, deadline): what was booked for it is void."""
        return None

    def on_finished(self, *, request: RequestId, now: float) -> None:
        """It is answered or given up: forget it. Every one dispatched or held ends here, once."""
        return None

    def on_plan(self, *, home: SiteId, threshold_tokens: float, now: float) -> None:
        """The slow loop's threshold for requests that `home` decodes; policies without one ignore it."""
        return None

    def get_log_data(self) -> Mapping[str, float]:
        """The policy's inner figures (prices, backlogs, implied threshold), flat, for logs and figures."""
        return {}


class PolicyFactory(Protocol):
    def __call__(self, config: PolicyConfig, fleet: Fleet) -> Policy: ...


_REGISTRY: dict[str, PolicyFactory] = {}


def register_policy(name: str) -> Callable[[type[Policy]], type[Policy]]:
    """Class decorator. Raises UsageError when the name is taken."""

    def add(cls: type[Policy]) -> type[Policy]:
        if name in _REGISTRY:
            raise UsageError(f"policy {name!r} is registered already")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def policy_names() -> list[str]:
    return sorted(_REGISTRY)


def create_policy(config: PolicyConfig, fleet: Fleet) -> Policy:
    """The policy that `config.name` names. Raises UsageError for an unknown name, listing the known."""
    factory = _REGISTRY.get(config.name)
    if factory is None:
        raise UsageError(f"policy {config.name!r} is unknown; known: {', '.join(policy_names())}")
    return factory(config, fleet)
