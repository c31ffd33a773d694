"""Published figures beside ours, each with its ratio, the reason for a gap, or why agreement says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prfaas.config.case import CaseConfig, Published
from prfaas.planner import equations
from prfaas.planner.system import System

K_SAME_POINT = 3e-4  # a local prefill time "is" N / Θ: equal to the digits the case gives
K_SAME_BATCH = 3e-3
K_CLOSE = 0.005  # a gap that rounding explains

# Published name -> ours.
K_NAMES = {
    "threshold_tokens": "threshold_tokens",
    "prefill": "prefill",
    "decode": "decode",
    "offloaded": "offloaded_share",
    "throughput_rps": "throughput_rps",
    "prfaas_rps": "prfaas_rps",
    "local_prefill_rps": "local_prefill_rps",
    "decode_rps": "decode_rps",
    "egress_gbps": "egress_gbps",
    "ttft_mean_s": "ttft_mean_s",
    "ttft_p90_s": "ttft_p90_s",
}


@dataclass(frozen=True)
class Comparison:
    """One figure."""

    system: str
    figure: str
    published: float
    ours: float | None
    ratio: float | None
    """Ours over the published."""
    circular: bool
    """An input was solved back from this figure: agreement says nothing."""
    note: str


def compare(
    case: CaseConfig, system: System, ours: Mapping[str, Mapping[str, object] | None]
) -> list[Comparison]:
    """A row for each published figure. `ours`: results under prfaas_pd, homogeneous and naive."""
    if case.published is None:
        return []
    rows = []
    for name in ("prfaas_pd", "homogeneous", "naive"):
        printed: Published = getattr(case.published, name)
        result = ours.get(name) or {}
        for figure, own in K_NAMES.items():
            value = getattr(printed, figure)
            if value is None:
                continue
            found = result.get(own)
            number = float(found) if isinstance(found, (int, float)) else None
            ratio = number / value if number is not None and value else None
            circle = _circular(case, system, name, figure, printed)
            if circle:
                note = circle
            elif number is None:
                note = "not computed: the case lacks what it needs (homogeneous_instances)"
            elif ratio is not None and abs(ratio - 1) <= K_CLOSE:
                note = ""
            else:
                note = _reason(system, name, figure, printed)
            rows.append(Comparison(name, figure, float(value), number, ratio, bool(circle), note))
    return rows


def _circular(case: CaseConfig, system: System, name: str, figure: str, printed: Published) -> str:
    """Why a figure's agreement says nothing; empty where it says something."""
    if figure == "decode_rps" and printed.decode and printed.decode_rps:
        slots = printed.decode_rps * system.decode.step_s() * system.output_tokens / printed.decode
        declared = "decode.max_batch" in case.solved_back
        if declared or abs(slots / system.decode.max_batch - 1) <= K_SAME_BATCH:
            return (
                f"decode.max_batch {system.decode.max_batch} is this figure solved back: "
                f"{printed.decode_rps:g} x {system.decode.step_s():g} s x {system.output_tokens:g} / "
                f"{printed.decode} = {slots:.2f}"
            )
    rate = {
        "homogeneous": printed.throughput_rps if figure == "throughput_rps" else None,
        "prfaas_pd": printed.local_prefill_rps if figure == "local_prefill_rps" else None,
    }.get(name)
    if rate and printed.prefill:
        seconds = printed.prefill / rate
        for tokens, given in zip(system.local_prefill.x, system.local_prefill.y, strict=True):
            if abs(seconds / given - 1) <= K_SAME_POINT:
                return (
                    f"local.profile's {given:g} s at {tokens:g} tokens is this figure solved back: "
                    f"{printed.prefill} / {rate:g} = {seconds:.3f}"
                )
        if "local.profile" in case.solved_back:
            return "local.profile was solved back from published rates"
    return ""


def _reason(system: System, name: str, figure: str, printed: Published) -> str:
    """Why ours differs from what is printed."""
    if figure == "egress_gbps":
        return _egress_reason(system, printed)
    if figure == "ttft_mean_s" or figure == "ttft_p90_s":
        return "mean prefill times, without queue or transfer; the profile between its points isn't published"
    if figure == "throughput_rps" and name == "prfaas_pd":
        return (
            "prefill times between published lengths are taken as straight lines; the report's aren't known"
        )
    if figure in ("prfaas_rps", "throughput_rps"):
        where = "l_long" if name == "prfaas_pd" else f"the mean length, {system.lengths.mean:.0f} tokens,"
        return f"T_prefill at {where} lies on a straight line between published points"
    if figure in ("threshold_tokens", "offloaded"):
        return "follows from the throughput's gap: both prefill paths are balanced at another length"
    return "differs by whole instances: another split is as good within the model's precision"


def _egress_reason(system: System, printed: Published) -> str:
    """The egress that the report's own rate, share and threshold give with its own profile."""
    text = "Λ · p · S_kv(l_long) with the published profile"
    if printed.throughput_rps and printed.offloaded and printed.threshold_tokens:
        long = system.lengths.mean_above(printed.threshold_tokens)
        if long is not None:
            own = equations.egress_bps(printed.throughput_rps, printed.offloaded, system.kv(long)) / 1e9
            text += (
                f"; the printed rate, share and threshold give {own:.1f} with it, so the printed figure "
                "holds more than that KV, or is rounded up"
            )
    return text
