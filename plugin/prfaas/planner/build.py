"""Case files to what the planner computes with. Lengths come from the caller, who may have read a trace."""

from __future__ import annotations

from collections.abc import Sequence

from prfaas.config.case import CaseConfig, SitesCaseConfig, TableCaseConfig
from prfaas.config.lengths import lengths_of
from prfaas.model.lengths import Lengths
from prfaas.planner.cost import Prices
from prfaas.planner.kv_table import KvRow
from prfaas.planner.sites import Link, LocalCluster, PrfaasCluster
from prfaas.planner.system import System


def system_of(case: CaseConfig, lengths: Lengths) -> System:
    """The two clusters of a case; `lengths` are its uncached prompt lengths."""
    kv = case.prfaas.profile.kv_curve()
    assert kv is not None  # checked by PrfaasConfig
    return System(
        lengths=lengths,
        output_tokens=lengths_of(case.workload.output_tokens).mean,
        prfaas_instances=case.prfaas.instances,
        egress_bps=case.prfaas.egress_gbps * 1e9,
        prfaas_prefill=case.prfaas.profile.prefill_curve(),
        kv=kv,
        local_instances=case.local.instances,
        local_prefill=case.local.profile.prefill_curve(),
        decode=case.decode.profile(),
        homogeneous_instances=case.homogeneous_instances,
        rtt_s=case.prfaas.rtt_ms / 1e3,
        chunk_tokens=case.prfaas.chunk_tokens,
        state_bytes=case.prfaas.profile.state_bytes,
        decode_slowdown=case.decode_slowdown,
    )


def prices_of(case: CaseConfig) -> Prices:
    """The case's prices; else those implied by equal hardware; else every instance alike."""
    if case.prices is not None:
        given = case.prices
        return Prices(
            given.prfaas_instance_hour, given.local_instance_hour, given.egress_per_gb, given.currency
        )
    if case.homogeneous_instances is not None:
        try:
            return Prices.implied(case.prfaas.instances, case.local.instances, case.homogeneous_instances)
        except ValueError:
            pass
    return Prices(1.0, 1.0)


def clusters_of(
    case: SitesCaseConfig, lengths: Sequence[Lengths]
) -> tuple[list[PrfaasCluster], list[LocalCluster], list[Link]]:
    """The clusters of a case with several; `lengths` in the order of its local clusters."""
    prfaas = []
    for sender in case.prfaas:
        kv = sender.profile.kv_curve()
        assert kv is not None  # checked by SitesPrfaas
        egress = None if sender.egress_gbps is None else sender.egress_gbps * 1e9
        prfaas.append(
            PrfaasCluster(sender.name, sender.instances, sender.profile.prefill_curve(), kv, egress)
        )
    locals_ = [
        LocalCluster(
            name=one.name,
            instances=one.instances,
            prefill=one.profile.prefill_curve(),
            decode=one.decode.profile(),
            lengths=its_lengths,
            output_tokens=lengths_of(one.workload.output_tokens).mean,
            rate_share=one.rate_share,
            prefill_instances=one.prefill,
        )
        for one, its_lengths in zip(case.local, lengths, strict=True)
    ]
    return prfaas, locals_, [Link(link.source, link.target, link.gbps * 1e9) for link in case.links]


def rows_of(case: TableCaseConfig) -> dict[str, KvRow]:
    """The table's models."""
    return {
        name: KvRow(name, model.kind, case.tokens, tuple(g * 1e9 for g in model.gbps))
        for name, model in case.models.items()
    }
