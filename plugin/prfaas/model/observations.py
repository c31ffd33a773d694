"""What the shells saw, and what is believed of it: the whole input of the deciding code.

LinkObservation, InstanceObservation   raw: what a pump, a server or the simulator reports
LinkEstimate                           believed: what admission.estimator makes of link observations
SiteObservation                        instances of one site, summed up
RequestView                            one request, as far as routing needs to know it
Snapshot                               everything at one moment
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import field
from enum import StrEnum

from prfaas.model.ids import (
    ClassId,
    InstanceId,
    LinkId,
    ModelId,
    PumpId,
    RequestId,
    SiteId,
    TenantId,
)
from prfaas.model.values import value


class Role(StrEnum):
    """What an instance does now."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLLOCATED = "collocated"  # both, in one engine


@value
class LinkObservation:
    """What was seen on one link during one interval, by one sender or summed over all of a pump's streams."""

    link: LinkId
    at_s: float
    """End of the interval."""
    interval_s: float
    delivered_bytes: int
    """Acknowledged by the receiver during the interval."""
    backlog_bytes: int = 0
    """Accepted for sending, not acknowledged at `at_s`; 0: the sender, not the link, was the limit."""
    rtt_s: float | None = None
    """Latest round trip (smoothed by the kernel); None when nothing was measured."""
    retransmits: int = 0
    """Segments sent again during the interval."""
    segments: int = 0
    """Segments sent during the interval, repeats included; 0 when unknown."""
    delivery_rate_bps: float | None = None
    """The kernel's own rate samples (tcpi_delivery_rate), summed over streams; None when not to be had."""
    app_limited: bool = False
    """The sender had too little to send for the interval to say what the link can do."""
    failures: int = 0
    """Connections lost or timed out during the interval."""
    sender: PumpId = ""
    """Who saw it; several senders on one link are summed by the estimator."""


@value
class LinkEstimate:
    """What is believed of one link at `at_s`."""

    link: LinkId
    at_s: float
    rate_bps: float
    """What may be promised: conservative after bad news, rises slowly; 0 while down."""
    low_bps: float
    high_bps: float
    """Band of uncertainty around the link's true capacity."""
    rtt_s: float
    loss: float = 0.0
    """Share of segments sent again, smoothed."""
    backlog_bytes: int = 0
    """Bytes in front of a new transfer."""
    up: bool = True
    reserved_bps: float = 0.0
    """Kept free for other traffic."""

    @property
    def usable_bps(self) -> float:
        """What transfers together may use."""
        usable_bps = self.rate_bps - self.reserved_bps
        return usable_bps if self.up and usable_bps > 0.0 else 0.0


@value
class InstanceObservation:
    """Load of one instance, as it last reported it (SGLang: /v1/loads)."""

    instance: InstanceId
    site: SiteId
    role: Role
    at_s: float
    model: ModelId = ""
    running: int = 0
    """Requests in the running batch."""
    waiting: int = 0
    waiting_uncached_tokens: int = 0
    """Prompt tokens queued that no cache covers."""
    prefill_backlog_s: float | None = None
    """Seconds of prefill queued or running, where the instance can tell (profiled, simulated); else None."""
    chunk_tokens: int | None = None
    """Most tokens of one of its prefill steps, where that is known."""
    prefill_requests: float = math.inf
    """Most prompts of one of its prefill steps; inf: as many as fit, or not known."""
    prefill_tokens_per_s: float | None = None
    """Measured while busy; None before anything was measured."""
    free_tokens: int | None = None
    """Room in its KV pool; None when unknown."""
    total_tokens: int | None = None
    max_running: int | None = None
    """Batch limit of a decode instance."""
    healthy: bool = True
    draining: bool = False
    """Takes nothing new (about to change role or leave)."""

    @property
    def takes_prefill(self) -> bool:
        return self.healthy and not self.draining and self.role is not Role.DECODE

    @property
    def takes_decode(self) -> bool:
        return self.healthy and not self.draining and self.role is not Role.PREFILL


@value
class SiteObservation:
    """One site (for one model), summed over its instances. Build it by `of`, or give the sums directly."""

    site: SiteId
    at_s: float
    prefill_instances: int = 0
    """Healthy, not draining, taking prefill."""
    decode_instances: int = 0
    prefill_backlog_s: float = 0.0
    """Instance-seconds of prefill queued or running, all together; mean wait: this / prefill_instances."""
    waiting_uncached_tokens: int = 0
    """Part of the backlog known only in tokens: not contained in prefill_backlog_s."""
    decode_running: int = 0
    decode_waiting: int = 0
    decode_slots: int = 0
    """Sum of batch limits; 0 when unknown (never a limit then)."""
    instances: tuple[InstanceObservation, ...] = ()
    """Empty when the shell picks instances itself."""

    @classmethod
    def of(cls, site: SiteId, instances: Iterable[InstanceObservation], at_s: float) -> SiteObservation:
        """Sums of `instances`; unhealthy and draining ones count for nothing but stay listed."""
        listed = tuple(instances)
        prefills = [one for one in listed if one.takes_prefill]
        decodes = [one for one in listed if one.takes_decode]
        limits = [one.max_running for one in decodes]
        return cls(
            site=site,
            at_s=at_s,
            prefill_instances=len(prefills),
            decode_instances=len(decodes),
            prefill_backlog_s=sum(one.prefill_backlog_s or 0.0 for one in prefills),
            waiting_uncached_tokens=sum(
                one.waiting_uncached_tokens for one in prefills if one.prefill_backlog_s is None
            ),
            decode_running=sum(one.running for one in decodes),
            decode_waiting=sum(one.waiting for one in decodes),
            decode_slots=0 if None in limits else sum(limit or 0 for limit in limits),
            instances=listed,
        )


@value
class RequestView:
    """One request, as far as routing needs to know it."""

    request: RequestId
    prompt_tokens: int
    arrived_s: float
    model: ModelId = ""
    home: SiteId | None = None
    """The site that must decode it; None: any site that decodes."""
    cached_tokens: Mapping[SiteId, int] = field(default_factory=dict)
    """Usable prefix at each site's prefill instances: what EVERY layer group has (routing.prefix_index)."""
    instance_cached_tokens: Mapping[InstanceId, int] = field(default_factory=dict)
    """The same by instance, where that is known: then the choice inside a site counts it too."""
    decode_cached_tokens: Mapping[SiteId, int] = field(default_factory=dict)
    """Prefix that the decode side already holds and need not be sent."""
    output_tokens: int | None = None
    """Most tokens it may generate, where the client said so."""
    tenant: TenantId = ""
    slo_class: ClassId = ""
    """Empty: the configuration's default class."""
    deadline_s: float | None = None
    """When the first token is due; None: from the class."""
    block_hashes: tuple[int, ...] = ()
    """Chained hashes of the prompt's full blocks, signed 64 bit, as in SGLang's KV events."""
    excluded: frozenset[SiteId] = frozenset()
    """Prefill sites that already failed or refused this request: not to be tried again."""
    attempt: int = 0


@value
class Snapshot:
    """All that is known at one moment. Mappings are read, never kept: a shell may reuse and update them."""

    now: float
    sites: Mapping[SiteId, SiteObservation]
    links: Mapping[LinkId, LinkEstimate]
