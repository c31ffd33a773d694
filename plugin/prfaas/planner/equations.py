"""The report's throughput model, equation by equation: "Prefill-as-a-Service: KVCache of next-generation
models could go cross-datacenter" (2026). Each function is one equation; its symbol stands beside our name.

A PrfaaS cluster prefills prompts whose uncached length L exceeds a threshold t and sends their KV over
Ethernet; a local cluster of N_p prefill and N_d decode instances prefills the others and decodes all.
"""

from __future__ import annotations

import math


def kv_throughput_bps(kv_bytes: float, prefill_s: float) -> float:
    """Φ(l) = S_kv(l) / T_prefill(l): bits of KV an instance makes in a second of prefilling prompts of l."""
    return 8 * kv_bytes / prefill_s


def cluster_egress_bps(gpus: float, gpus_per_instance: float, kv_throughput: float) -> float:
    """B ≈ (N / P) · Φ(L_avg): what N GPUs, P an instance, send while all of them prefill."""
    return gpus / gpus_per_instance * kv_throughput


def prefill_rps(instances: float, prefill_s: float) -> float:
    """N / T_prefill(l): prompts a second; also Θ_pd-p = N_p / T_prefill(l_short)."""
    return instances / prefill_s


def link_rps(egress_bps: float, kv_bytes: float) -> float:
    """B_out / S_kv(l_long): prompts a second whose KV the link carries."""
    return egress_bps / (8 * kv_bytes)


def prfaas_rps(instances: float, prefill_s: float, egress_bps: float, kv_bytes: float) -> float:
    """Θ_prfaas = min(N_prfaas / T_prefill(l_long), B_out / S_kv(l_long))."""
    return min(prefill_rps(instances, prefill_s), link_rps(egress_bps, kv_bytes))


def decode_rps(instances: float, max_batch: float, step_s: float, output_tokens: float) -> float:
    """Θ_pd-d = N_d · BS_max / (T_decode · L_out)."""
    return instances * max_batch / (step_s * output_tokens)


def system_rps(prfaas: float, local_prefill: float, decode: float, offloaded_share: float) -> float:
    """Λ_max = min(Θ_prfaas / p, Θ_pd-p / (1 − p), Θ_pd-d); a path that nothing takes limits nothing."""
    p = offloaded_share
    return min(
        prfaas / p if p > 0 else math.inf,
        local_prefill / (1 - p) if p < 1 else math.inf,
        decode,
    )


def egress_bps(rate_rps: float, offloaded_share: float, kv_bytes: float) -> float:
    """Λ · p · S_kv(l_long): what the link carries at a rate Λ."""
    return 8 * rate_rps * offloaded_share * kv_bytes


def collocated_rps(
    instances: float,
    prefill_s: float,
    max_batch: float,
    step_s: float,
    output_tokens: float,
    slowdown: float,
) -> float:
    """Instances that prefill and decode in one engine, decode steps no slower than `slowdown` times.

    Not in the report. With a share s of an instance's time spent on prefill its decode steps take 1 / (1 − s)
    as long on average, so s ≤ 1 − 1/slowdown. Λ = N · s / T_prefill at the largest s that also leaves decode
    enough time: s / T_prefill ≤ (1 − s) · BS_max / (T_decode · L_out).
    """
    tokens_time_s = step_s * output_tokens / max_batch
    balanced = prefill_s / (prefill_s + tokens_time_s)
    share = min(balanced, 1 - 1 / slowdown)
    return instances * share / prefill_s
