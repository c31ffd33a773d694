"""Piece `capacity`: the report's 1T case at capacity, the chain of systems at equal hardware."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prfaas.config.case import CaseConfig, TraceLengths, load_case
from prfaas.config.experiment import Experiment
from prfaas.config.lengths import lengths_of
from prfaas.figures import new_figure, save, series
from prfaas.planner import report as plan_report
from prfaas.simulator.scale import highest_rate
from prfaas_testbed.claim.judge import Goal, Mean, Piece, column, mean, ratios, table
from prfaas_testbed.claim.runs import K_SLO_SHARE, K_TOPOLOGIES, at_rate, parts, play

K_SYSTEMS = ("collocated", "homogeneous", "naive", "paper", "prices-arrival", "prices")
K_COMMON_RPS = (1.2, 1.8, 2.4, 2.8)  # rates at which TTFTs of all that can carry them stand side by side
K_PLAN_FIELDS = (
    "throughput_rps",
    "offloaded_share",
    "egress_gbps",
    "ttft_mean_s",
    "ttft_p90_s",
    "homogeneous",
    "naive",
    "collocated",
)
K_LEAST_SHARE = 0.1  # of the capacity: where the search for the rate within the SLO begins
K_TPOT_S = 0.05  # a token, after the first: twice what a decode instance takes
K_RATIOS = {"homogeneous": 1.54, "naive": 1.32}  # of the report's policy to these, as published
K_WITHIN = 0.05  # of a published ratio counts as reproduced
K_SAME = 0.01  # of the report's policy is taken as equal: what five repetitions can tell apart


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Saturation, the highest rate within the SLO, and TTFTs at common rates, of each system and seed."""
    rows: list[dict[str, Any]] = []
    for system, experiment in parts("claim-capacity"):
        for repetition in range(repetitions):
            label = {"system": system, "repetition": repetition, "seed": experiment.seed}
            beyond = play(experiment, repetition).figures()
            rows.append({**label, "mode": "saturated", **beyond})
            most_rps = beyond["completion_rps"]
            rate_rps = _slo_rate(experiment, repetition, most_rps)
            found = _at(experiment, repetition, rate_rps) if rate_rps else {}
            rows.append({**label, "mode": "slo", **found, "rate_rps": rate_rps})
            for common_rps in K_COMMON_RPS:
                if common_rps < 0.97 * most_rps:
                    found = _at(experiment, repetition, common_rps)
                    rows.append({**label, "mode": "common", **found, "rate_rps": common_rps})
            say(f"{system} #{repetition}: {most_rps:.2f} req/s at most, {rate_rps:.2f} within the SLO")
    case = load_case(K_TOPOLOGIES / "cases" / "case_1t_hybrid.yaml")
    assert isinstance(case, CaseConfig)  # the file's form
    lengths = case.workload.input_tokens
    assert not isinstance(lengths, TraceLengths)
    plan = plan_report(case, lengths_of(lengths))
    return {"rows": rows, "plan": {name: plan[name] for name in K_PLAN_FIELDS}}


def _at(experiment: Experiment, repetition: int, rate_rps: float) -> dict[str, Any]:
    return play(at_rate(experiment, rate_rps), repetition).figures()


def _slo_rate(experiment: Experiment, repetition: int, most_rps: float) -> float:
    """0 where even the least share of the capacity breaks it."""

    def keeps(rate_rps: float) -> bool:
        outcome = play(at_rate(experiment, rate_rps), repetition)
        soon = outcome.in_time & (outcome.tpot_s <= K_TPOT_S)
        return bool(soon.sum() >= K_SLO_SHARE * len(outcome.requests))

    low_rps = K_LEAST_SHARE * most_rps
    return highest_rate(keeps, low_rps, 1.05 * most_rps).rate_rps if keeps(low_rps) else 0.0


# What the report prints of its three systems (its tables 5 and 6); nothing of a collocated one, nor of ours.
K_PUBLISHED: dict[str, dict[str, float]] = {
    "homogeneous": {"completion_rps": 2.11, "ttft_mean_s": 4.44, "ttft_p90_s": 9.73},
    "naive": {"completion_rps": 2.45, "ttft_mean_s": 1.74, "ttft_p90_s": 3.51},
    "paper": {
        "completion_rps": 3.24, "offloaded_share": 0.496, "egress_gbps": 13.0,
        "ttft_mean_s": 2.22, "ttft_p90_s": 3.51,
    },
}  # fmt: skip


def plan_of(data: dict[str, Any], system: str) -> dict[str, float]:
    """The planner's figures of a system; TTFTs are bare prefill times."""
    found = data["plan"] if system.startswith(("paper", "prices")) else data["plan"][system]
    return {**found, "completion_rps": found["throughput_rps"]}


def ratio_of(
    data: dict[str, Any], above: str, below: str, field: str = "completion_rps", **mode: str
) -> Mean:
    """Of two systems' figures, repetition by repetition; beyond capacity where no mode is said."""
    wanted = mode or {"mode": "saturated"}
    rows = data["rows"]
    return ratios(column(rows, field, system=above, **wanted), column(rows, field, system=below, **wanted))


def goals(data: dict[str, Any]) -> list[Goal]:
    """The published ratios within 5%, the chain's order, and ours at least the report's policy."""
    found = []
    for below, published in K_RATIOS.items():
        ratio = ratio_of(data, "paper", below)
        off = ratio.value / published - 1
        planned = plan_of(data, "paper")["completion_rps"] / plan_of(data, below)["completion_rps"]
        found.append(
            Goal(
                f"the published ratio {published:g} to {below} within 5%",
                f"{ratio.text(3)} ({off:+.1%}; plan {planned:.3f})",
                abs(off) <= K_WITHIN,
            )
        )
    chain = [mean(column(data["rows"], "rate_rps", system=one, mode="slo")) for one in K_SYSTEMS[:4]]
    found.append(
        Goal(
            "the chain's order within the SLO: collocated < homogeneous < naive < the report's policy",
            " < ".join(one.text() for one in chain) + " req/s",
            all(a.value + a.half < b.value - b.half for a, b in itertools.pairwise(chain)),
        )
    )
    ours = ratio_of(data, "prices", "paper")
    found.append(
        Goal(
            "beyond capacity, ours answers at least as much as the report's policy (within 1%)",
            f"{ours.text(3)} of it",
            ours.value >= 1 - K_SAME,
        )
    )
    within = ratio_of(data, "prices", "paper", "rate_rps", mode="slo")
    found.append(
        Goal(
            "ours carries at least the report's policy's rate within the SLO",
            f"{within.text(3)} of it",
            within.value >= 1,
        )
    )
    return found


K_COLLOCATED = (
    "Collocated instances answer as much as homogeneous PD beyond capacity, because nobody there is asked "
    "how fast tokens come: prefill steps stand in the way of decode, and a token takes "
    "{tpot:.0f} ms at the 90th percentile ({disaggregated:.0f} ms where the two are apart). The plan's "
    "figure holds decode to twice its undisturbed time.\n"
)


def tell(data: dict[str, Any]) -> str:
    """Tables of plan, simulator and report; TTFTs at common rates."""
    rows = data["rows"]
    lines = []
    for system in K_SYSTEMS:
        wanted = {"system": system, "mode": "saturated"}
        planned, published = plan_of(data, system), K_PUBLISHED.get(system, {})
        share = mean(column(rows, "offloaded_share", **wanted))
        egress = mean(column(rows, "egress_gbps", **wanted))
        lines.append(
            [
                series(system).label,
                mean(column(rows, "completion_rps", **wanted)).text(),
                f"{planned['completion_rps']:.2f}",
                _or_dash(published.get("completion_rps")),
                mean(column(rows, "rate_rps", system=system, mode="slo")).text(),
                share.text(1, percent=True),
                egress.text(1),
            ]
        )
    text = table(
        [
            "system",
            "answered, req/s",
            "plan",
            "published",
            "within SLO, req/s",
            "offloaded",
            "egress, Gbit/s",
        ],
        lines,
    )
    text += (
        "\n*answered*: beyond capacity, between the first and last fifth of all arrivals. *within SLO*: the "
        f"highest rate at which {K_SLO_SHARE:.0%} of the requests have their first token in 2 s + twice the "
        f"local prefill time, and each further one within {K_TPOT_S * 1e3:.0f} ms on average, twice a decode "
        "instance's time. It may lie above what is answered: the tenth that may be late waits behind all "
        "else, and without end where more comes than can be answered. The published egress at capacity is 13 "
        "Gbit/s, the offloaded share 49.6 %; the "
        f"plan from the published profile gives {data['plan']['egress_gbps']:.1f} Gbit/s and "
        f"{data['plan']['offloaded_share']:.1%}.\n\n"
    )
    common = [
        [
            series(system).label,
            *(_ttfts(data, system, rate_rps) for rate_rps in K_COMMON_RPS),
            _bare(data, system),
        ]
        for system in K_SYSTEMS
    ]
    head = ["TTFT mean / P90, s", *(f"at {rate_rps:g} req/s" for rate_rps in K_COMMON_RPS), "published"]
    text += table(head, common)
    text += (
        "\nThe published TTFTs are bare prefill times, without a queue; with queues all are above them. A "
        "dash is a rate beyond 97 % of what the system answers at most, at which its queue only grows.\n\n"
        + K_COLLOCATED.format(
            tpot=1e3 * mean(column(rows, "tpot_p90_s", system="collocated", mode="saturated")).value,
            disaggregated=1e3
            * mean(column(rows, "tpot_p90_s", system="homogeneous", mode="saturated")).value,
        )
    )
    return text


def _ttfts(data: dict[str, Any], system: str, rate_rps: float) -> str:
    wanted = {"system": system, "mode": "common", "rate_rps": rate_rps}
    average, late = (mean(column(data["rows"], f"ttft_{name}_s", **wanted)) for name in ("mean", "p90"))
    return f"{average.value:.2f} / {late.value:.2f}" if average.count else "–"


def _bare(data: dict[str, Any], system: str) -> str:
    published = K_PUBLISHED.get(system)
    return f"{published['ttft_mean_s']:.2f} / {published['ttft_p90_s']:.2f}" if published else "–"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """Capacity and rate within the SLO as bars; TTFT P90 over rate."""
    figure, (bars, late) = new_figure(1, 2, width=4.8, height=3.4)
    place = np.arange(len(K_SYSTEMS))
    drawn: list[list[Any]] = []
    for shift, (mode, field, label) in enumerate(
        (("saturated", "completion_rps", "answered at most"), ("slo", "rate_rps", "within the SLO"))
    ):
        means = [mean(column(data["rows"], field, system=one, mode=mode)) for one in K_SYSTEMS]
        colour = ("#56B4E9", "#0072B2")[shift]
        bars.bar(
            place + 0.38 * (shift - 0.5), [one.value for one in means], 0.36, label=label, color=colour,
            yerr=[one.half for one in means], error_kw={"linewidth": 1.0},
        )  # fmt: skip
        drawn += [[system, label, one.value, one.half] for system, one in zip(K_SYSTEMS, means, strict=True)]
    planned = [plan_of(data, one)["completion_rps"] for one in K_SYSTEMS]
    bars.plot(place - 0.19, planned, "P", color="#009E73", label="plan", markersize=6)
    shown = [
        (spot, K_PUBLISHED[one]["completion_rps"]) for spot, one in enumerate(K_SYSTEMS) if one in K_PUBLISHED
    ]
    bars.plot(
        [spot - 0.19 for spot, _ in shown], [v for _, v in shown], "x", color="black", label="published"
    )
    bars.set_xticks(place, [series(one).label for one in K_SYSTEMS], rotation=25, ha="right")
    bars.set(ylabel="req/s", title="What each system carries", ylim=(0, 1.3 * max(planned)))
    bars.legend(loc="upper left", ncols=2)
    for system in K_SYSTEMS:
        known = [
            (
                rate_rps,
                mean(column(data["rows"], "ttft_p90_s", system=system, mode="common", rate_rps=rate_rps)),
            )
            for rate_rps in K_COMMON_RPS
        ]
        known = [(rate_rps, one) for rate_rps, one in known if one.count]
        late.errorbar(
            [rate_rps for rate_rps, _ in known],
            [one.value for _, one in known],
            [one.half for _, one in known],
            **series(system).kwargs(),
        )  # fmt: skip
        drawn += [[system, f"TTFT P90 at {rate_rps:g} req/s", one.value, one.half] for rate_rps, one in known]
    late.set(xlabel="Offered, req/s", ylabel="TTFT P90, s", title="With queues", ylim=(0, None))
    late.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    paths = save(figure, folder, "capacity", ["system", "figure", "mean", "half of the 95% interval"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece("capacity", "The 1T case at capacity", measure, goals, draw, tell)
