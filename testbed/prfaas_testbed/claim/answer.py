"""What the records say of the report's claim, in a few lines: what whoever doubts it reads first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prfaas_testbed.claim import capacity, testbed
from prfaas_testbed.claim.capacity import K_RATIOS, K_WITHIN


def answer(records: Mapping[str, dict[str, Any]]) -> str:
    """Markdown; empty where the 1T case at capacity wasn't measured."""
    found = records.get("capacity")
    if found is None:
        return ""
    lines = [_simulated(found)]
    if "testbed" in records:
        lines.append(_on_testbed(records["testbed"]["rows"]))
    lines.append(
        "How far that goes: both rest on the report's own profile, whose local prefill and decode are solved "
        "back from its tables, so that agreement with its throughput is partly circular; no GPU and no model "
        "of that size ran." + (_by_link(records["bandwidth"], found) if "bandwidth" in records else "")
    )
    ours, within = (
        capacity.ratio_of(found, "prices", "paper", **wanted)
        for wanted in ({}, {"field": "rate_rps", "mode": "slo"})
    )
    lines.append(
        f"Ours, in the simulator: beyond capacity {ours.text()} of what the report's policy answers, and "
        f"{within.text()} of its rate with nine requests in ten in time."
    )
    return "## Does the 1.54 hold?\n\n" + "\n\n".join(line for line in lines if line) + "\n"


def _simulated(found: dict[str, Any]) -> str:
    ratio, naive = (capacity.ratio_of(found, "paper", below) for below in ("homogeneous", "naive"))
    within = capacity.ratio_of(found, "paper", "homogeneous", field="rate_rps", mode="slo")
    holds = abs(ratio.value / K_RATIOS["homogeneous"] - 1) <= K_WITHIN
    verdict = "Yes, as a throughput" if holds else "No"
    return (
        f"**{verdict}.** In the simulator, queues and all, the report's policy answers {ratio.text()} times "
        f"what homogeneous hardware of the same cost does (published {K_RATIOS['homogeneous']}), and "
        f"{naive.text()} times what sending every prompt does ({K_RATIOS['naive']}). Counted by the rate at "
        "which nine requests in ten have their first token in time, which the report doesn't say, it is "
        f"{within.text()} times homogeneous hardware's."
    )


def _on_testbed(rows: list[dict[str, Any]]) -> str:
    found = [testbed.ratio_of(rows, "paper", below, "answered_rps", "1.2") for below in K_RATIOS]
    if not all(one.count for one in found):
        return ""
    once = " Each of its parts ran once." if max(one.count for one in found) == 1 else ""
    return (
        f"On the testbed (the product's router and pumps, an emulated link, profiled instances in place of "
        f"GPUs, half the size) the two are {found[0].text()} and {found[1].text()}.{once}"
    )


def _by_link(bandwidth: dict[str, Any], found: dict[str, Any]) -> str:
    """What is left of it on a narrower link, with the split that is best there."""
    homogeneous_rps = capacity.plan_of(found, "homogeneous")["completion_rps"]
    known = {step["gbps"]: step["optimum_rps"] / homogeneous_rps for step in bandwidth["steps"]}
    told = ", ".join(f"{share:.2f} at {gbps:g}" for gbps, share in sorted(known.items(), reverse=True))
    return (
        " And it needs its link: by plan, with the split that is best for each bandwidth, it is "
        f"{told} Gbit/s; where that is below 1, homogeneous hardware carries more."
    )
