"""The `policy:` section of a router's or an experiment's file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prfaas.config.loading import Strict


class SloClass(Strict):
    """How soon the first token is due: base_s + prefill_factor x an idle local instance's time."""

    base_s: float = Field(default=2.0, ge=0)
    """Seconds allowed whatever the prompt."""
    prefill_factor: float = Field(default=2.0, ge=0)
    """Times the local prefill time of what no site has of the prompt: a conversation's next turn is due as
    soon wherever the one before was prefilled."""
    weight: float = Field(default=1.0, gt=0)
    """What a second late costs, relative to other classes."""


class PolicyConfig(Strict):
    """Which policy, and its parameters. Fields that a policy doesn't use are ignored by it."""

    name: str = "prices"
    """collocated, homogeneous, naive, paper, prices, or one registered by an extension."""
    threshold_tokens: float = Field(default=19_400, ge=0)
    """`paper`: t, on the uncached length."""
    regime: Literal["auto", "scarce", "abundant"] = "auto"
    """`paper`: how caches count. auto: by the link's utilisation."""
    abundant_below: float = Field(default=0.5, gt=0, le=1)
    """`paper`, auto: bandwidth is abundant while the share of the link in use is below this."""
    raise_at: float = Field(default=0.9, gt=0, le=1)
    """`paper`: utilisation at which t is raised at once; 1 leaves the threshold fixed."""
    raise_factor: float = Field(default=1.0, ge=1)
    """`paper`: t is multiplied by up to this as egress nears its limit; 1 is the fixed threshold."""
    classes: dict[str, SloClass] = Field(default_factory=lambda: {"default": SloClass()})
    """By name: how soon first tokens are due."""
    default_class: str = "default"
    """Of requests that name none and whose key has none."""
    tenant_weights: dict[str, float] = Field(default_factory=dict)
    """`prices`: share of the system a tenant may take under overload, relative to 1 for those not named."""
    shed: bool = False
    """`prices`: refuse what can't meet its deadline on any path, rather than serve it late."""
    shed_slack: float = Field(default=1.0, ge=0.1)
    """`prices`: shed when the best path's TTFT exceeds this many times the time left."""
    price_gain: float = Field(default=3.0, gt=0)
    """`prices`: how strongly backlogs raise prices."""
    service: Literal["arrival", "deadline"] = "arrival"
    """In which order prefill instances take what waits. deadline: by the decision's order_s, which instances
    must be able to keep; `prices` then reckons with it, and puts what can't be in time behind the rest."""
    bind: Literal["arrival", "start"] = "start"
    """`prices` by deadline, where it knows a site's instances: when a request is bound to one. start: when
    its prefill is about to begin there; until then it is kept at the door, may go elsewhere, and gives its
    place to a shorter one that would be late. arrival: when it comes."""
    lead_s: float = Field(default=0.02, gt=0, le=10)
    """bind: start: so long before its prefill begins a request is sent, beyond a round trip to the site. What
    a prediction errs by, an instance waits or a request is bound too soon."""
    hold_above_s: float | None = Field(default=None, gt=0)
    """Keep a request at the door while the prefill queue of the site chosen for it is longer than this, and
    let it in by the decision's order_s: for servers that serve in order of arrival, as SGLang's do. None:
    all is sent on at once. What is held is in no queue that predictions and prices know: a limit below
    several prefill times costs more than the order gains."""

    @model_validator(mode="after")
    def _consistent(self) -> PolicyConfig:
        if self.default_class not in self.classes:
            raise ValueError(
                f"default_class {self.default_class!r} is not among classes {sorted(self.classes)}"
            )
        late_binding = self.bind == "start" and "bind" in self.model_fields_set and self.service == "deadline"
        if self.hold_above_s is not None and late_binding:
            raise ValueError(
                f"hold_above_s: found {self.hold_above_s:g}; with service: deadline and bind: start all that "
                "can't begin is held; leave hold_above_s out, or set bind: arrival"
            )
        bad = [name for name, weight in self.tenant_weights.items() if weight <= 0]
        if bad:
            raise ValueError(f"tenant_weights must be above 0: {bad}")
        return self


class LinkAdmission(Strict):
    """How one outgoing link is estimated and promised (`links:` of a pump's or router's file)."""

    nominal_bps: float = Field(gt=0)
    """Bits a second that the link is said to carry: believed until something was measured."""
    reserved_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the estimate kept free for other traffic."""
    reserved_bps: float = Field(default=0.0, ge=0)
    """The same in bits a second; the larger of both counts."""
    headroom: float = Field(default=0.05, ge=0, lt=1)
    """Share of the usable rate that is never promised: what estimates err by."""
    queue_limit: int = Field(default=64, ge=0)
    """Transfers that may wait for room; 0 refuses at once."""
    share_ttl_s: float = Field(default=1.0, gt=0)
    """A pump's share of the link expires after this unless renewed."""
    floor_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the link set aside for pumps that can't reach its ledger, divided among them."""
    max_pumps: int = Field(default=8, ge=1)
    """Pumps that may share the link; the floor is divided by this number."""
    outage_after_s: float = Field(default=0.8, gt=0, le=1)
    """Silence with bytes under way that means the link is down."""
    probe_every_s: float = Field(default=1.0, gt=0)
    """An idle link is probed this often; a dead one a quarter of it, backing off to it."""


class SlowLoopConfig(Strict):
    """When local instances change between prefill and decode (`slow_loop:`)."""

    dry_run: bool = True
    """Say what would be done, and do nothing."""
    look_every_s: float = Field(default=30.0, gt=0)
    """Between two looks at the traffic."""
    patience: int = Field(default=3, ge=1)
    """Looks in a row that must ask for the same change."""
    least_gain: float = Field(default=0.05, ge=0)
    """Share of throughput that a change must promise, over `holds_s`."""
    holds_s: float = Field(default=600.0, gt=0)
    """How long a change is expected to be of use. The seconds that conversions take (the profile's
    `role_switch`, then their last one's) are part of it."""
    settle_s: float = Field(default=60.0, ge=0)
    """Pause after a change, for its effect to be seen; twice as long after one that failed."""
    drain_limit_s: float = Field(default=300.0, gt=0)
    """An instance that drains goes back into service as it was when nothing on it has ended for so long."""
