"""A system to plan for, and what a threshold and a split of its local cluster give."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from prfaas.model.lengths import Lengths
from prfaas.model.profiles import Curve, DecodeProfile
from prfaas.planner import equations


@dataclass(frozen=True)
class System:
    """One PrfaaS cluster, one local cluster, the link from the one to the other, and the load."""

    lengths: Lengths
    """Of uncached prompt tokens, L."""
    output_tokens: float
    """L_out, mean."""
    prfaas_instances: int
    """N_prfaas."""
    egress_bps: float
    """B_out."""
    prfaas_prefill: Curve
    """T_prefill of a PrfaaS instance."""
    kv: Curve
    """S_kv, bytes."""
    local_instances: int
    """N_p + N_d."""
    local_prefill: Curve
    """T_prefill of a local instance."""
    decode: DecodeProfile
    """Of a local instance."""
    homogeneous_instances: int | None = None
    """Local instances that cost as much as both clusters: the baseline's hardware."""
    rtt_s: float = 0.0
    """Of the link."""
    chunk_tokens: int = 8192
    """Tokens of a prefill step: KV leaves after each, so the last one's can't overlap with prefill."""
    state_bytes: int = 0
    """Part of S_kv that leaves with the last step."""
    decode_slowdown: float = 2.0
    """How much slower a collocated engine may decode for its prefills, against a decode instance."""

    def changed(self, **fields: object) -> System:
        return replace(self, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """What one threshold and split give; None where nothing takes that path."""

    threshold_tokens: float
    """t."""
    prefill: int
    """N_p."""
    decode: int
    """N_d."""
    offloaded_share: float
    """p = P(L > t)."""
    l_long_tokens: float | None
    l_short_tokens: float | None
    prfaas_rps: float | None
    """Θ_prfaas; None where p = 0."""
    local_prefill_rps: float | None
    """Θ_pd-p; None where p = 1."""
    decode_rps: float
    """Θ_pd-d."""
    throughput_rps: float
    """Λ_max."""
    egress_bps: float
    """At Λ_max."""
    limited_by: str
    """`prfaas prefill`, `link`, `local prefill` or `decode`: what Λ_max equals."""


def decode_limit_rps(system: System, instances: int) -> float:
    """Θ_pd-d with so many decode instances."""
    batch = system.decode.max_batch
    return equations.decode_rps(instances, batch, system.decode.step_s(), system.output_tokens)


@dataclass(frozen=True, slots=True)
class Cut:
    """What a threshold makes of the lengths; independent of the split."""

    threshold_tokens: float
    share: float
    """p."""
    long: float | None
    short: float | None
    prfaas_prefill_rps: float | None
    link_rps: float | None
    short_prefill_s: float | None
    prfaas_limit_rps: float
    """Θ_prfaas / p; infinite where nothing goes out."""
    local_s: float
    """(1 − p) · T_prefill(l_short): local prefill an average request needs; 0 where everything goes out."""

    def worth(self, prefill: int, decode_rps: float) -> tuple[float, float]:
        """What is maximised: Λ_max; where that is equal (decode limits), the room that prefill leaves."""
        room = min(self.prfaas_limit_rps, prefill / self.local_s if self.local_s > 0 else math.inf)
        return min(room, decode_rps), room


def cut_at(system: System, threshold_tokens: float) -> Cut:
    """p, l_long and l_short of a threshold, and the rates that follow from times and sizes at those means."""
    lengths = system.lengths
    share = lengths.share_above(threshold_tokens)
    mass = lengths.mass_above(threshold_tokens)
    long = short = of_prfaas = of_link = short_s = None
    limit, local_s = math.inf, 0.0
    if share > 0:
        long = mass / share
        of_prfaas = equations.prefill_rps(system.prfaas_instances, system.prfaas_prefill(long))
        of_link = equations.link_rps(system.egress_bps, system.kv(long))
        limit = min(of_prfaas, of_link) / share
    if share < 1:
        short = (lengths.mean - mass) / (1 - share)
        short_s = system.local_prefill(short)
        local_s = (1 - share) * short_s
    return Cut(threshold_tokens, share, long, short, of_prfaas, of_link, short_s, limit, local_s)


def plan_of(system: System, cut: Cut, prefill: int) -> Plan:
    """The plan of a cut and N_p prefill instances; the other local instances decode."""
    decode = system.local_instances - prefill
    prfaas = None
    if cut.prfaas_prefill_rps is not None and cut.link_rps is not None:
        prfaas = min(cut.prfaas_prefill_rps, cut.link_rps)
    local = None if cut.short_prefill_s is None else equations.prefill_rps(prefill, cut.short_prefill_s)
    decode_rps = decode_limit_rps(system, decode)
    rate = equations.system_rps(prfaas or 0.0, local or 0.0, decode_rps, cut.share)
    if rate == decode_rps:
        limit = "decode"
    elif prfaas is not None and cut.share > 0 and rate == prfaas / cut.share:
        limit = "link" if prfaas == cut.link_rps else "prfaas prefill"
    else:
        limit = "local prefill"
    sent = 0.0 if cut.long is None else equations.egress_bps(rate, cut.share, system.kv(cut.long))
    return Plan(
        threshold_tokens=cut.threshold_tokens,
        prefill=prefill,
        decode=decode,
        offloaded_share=cut.share,
        l_long_tokens=cut.long,
        l_short_tokens=cut.short,
        prfaas_rps=prfaas,
        local_prefill_rps=local,
        decode_rps=decode_rps,
        throughput_rps=rate,
        egress_bps=sent,
        limited_by=limit,
    )


def evaluate(system: System, threshold_tokens: float, prefill: int) -> Plan:
    """What a given threshold and N_p yield. Raises ValueError for a split that leaves no decode instance."""
    if not 0 <= prefill < system.local_instances:
        raise ValueError(f"prefill {prefill} must lie between 0 and {system.local_instances - 1}")
    return plan_of(system, cut_at(system, threshold_tokens), prefill)
