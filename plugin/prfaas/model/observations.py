"""What the shells saw, and what is believed of it: the whole input of the deciding code.

LinkObservation, InstanceObservation   raw: what a pump, a server or the simulator reports
LinkEstimate                           believed: what admission.estimator makes of link observations
SiteObservation                        instances of one site, summed up
RequestView                            one request, as far as routing needs to know it
Snapshot                               everything at one moment
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from enum import StrEnum
from typing import TypeAlias

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
    others_tokens: int | None = None
    """Of waiting_uncached_tokens, what others than this door have sent; None where that isn't told apart."""

    @property
    def takes_prefill(self) -> bool:
        return self.healthy and not self.draining and self.role is not Role.DECODE


_Takers: TypeAlias = tuple[Sequence[InstanceObservation], Sequence[InstanceObservation]]


def takers_of(instances: Iterable[InstanceObservation]) -> _Takers:
    """Those that take prefills, and those that decode."""
    prefills, decodes = [], []
    only_decodes, only_prefills = Role.DECODE, Role.PREFILL
    for one in instances:
        if one.healthy and not one.draining:
            if one.role is not only_decodes:
                prefills.append(one)
            if one.role is not only_prefills:
                decodes.append(one)
    return prefills, decodes


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

    _takers: _Takers | None = field(default=None, init=False, repr=False, compare=False)
    """Of `instances`, once somebody has looked."""

    @property
    def prefills(self) -> Sequence[InstanceObservation]:
        """Those listed that take prefills."""
        return (self._takers or self._sort_out())[0]

    @property
    def decodes(self) -> Sequence[InstanceObservation]:
        """Those listed that decode."""
        return (self._takers or self._sort_out())[1]

    def _sort_out(self) -> _Takers:
        found = takers_of(self.instances)
        object.__setattr__(self, "_takers", found)
        return found

    @classmethod
    def of(cls, site: SiteId, instances: Iterable[InstanceObservation], at_s: float) -> SiteObservation:
        """Sums of `instances`; unhealthy and draining ones count for nothing but stay listed."""
        listed = tuple(instances)
        prefills, decodes = takers = takers_of(listed)
        # Loops, as there is one of these a site and decision: sums of generators take three times as long.
        backlog_s, tokens, running, waiting, slots, limited = 0.0, 0, 0, 0, 0, True
        for one in prefills:
            if one.prefill_backlog_s is None:
                tokens += one.waiting_uncached_tokens
            else:
                backlog_s += one.prefill_backlog_s
        for one in decodes:
            running += one.running
            waiting += one.waiting
            if one.max_running is None:
                limited = False
            else:
                slots += one.max_running
        if not limited:
            slots = 0
        made = cls(
            site, at_s, len(prefills), len(decodes), backlog_s, tokens, running, waiting, slots, listed
        )
        object.__setattr__(made, "_takers", takers)
        return made


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
