"""Piece `bandwidth`: the link goes from 100 to 10, 5, 2, 0 and 100 Gbit/s, and there is always work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prfaas.config.case import CaseConfig, TraceLengths, load_case
from prfaas.config.experiment import Experiment, SetLink
from prfaas.config.lengths import lengths_of
from prfaas.config.policy import PolicyConfig
from prfaas.config.topology import LinkChange
from prfaas.figures import new_figure, save, series
from prfaas.planner import System
from prfaas.planner.build import system_of
from prfaas.planner.optimum import best_threshold, optimum
from prfaas.simulator.build import Simulation
from prfaas.workload.requests import TimedRequest
from prfaas_testbed.claim.judge import Goal, Mean, Piece, column, mean, ratios, table
from prfaas_testbed.claim.runs import K_TOPOLOGIES, Outcome, at_rate, parts, play, requests_of

K_STEPS_GBPS = (100.0, 10.0, 5.0, 2.0, 0.0, 100.0)
K_PREFILL = 3
K_LESS = 0.85  # arrivals before a step, of what the plan says can be carried there
K_BEFORE_S = 120.0
K_MORE = {
    100.0: 1.08,
    0.0: 1.08,
}  # the same in the step: a backlog is kept, and one step's doesn't hide the next's
K_MORE_ELSE = 1.0  # a narrow link carries some twentieth less than the plan says, for its headers
K_MORE_SPLIT = 1.08  # with the best split: at 1 half of the seeds brought less than could be carried
K_SPLIT_TOLD = "best split, best threshold"
K_GRACE_S = 30.0
K_JUDGED = 1100  # completions a step, by plan, beyond the grace
K_GOAL = 0.95
K_WHY_SPLIT = (
    "a plan knows neither headers nor the lengths that were drawn: what the threshold that it finds best "
    "carries of it is below"
)
K_NEVER = 1e9  # tokens: a threshold that nothing exceeds


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The timeline under ours, a fixed threshold, and thresholds that know each step's bandwidth."""
    ((_, experiment),) = parts("claim-bandwidth")
    case = load_case(K_TOPOLOGIES / "cases" / "case_1t_hybrid.yaml")
    assert isinstance(case, CaseConfig)  # the file's form
    lengths = case.workload.input_tokens
    assert not isinstance(lengths, TraceLengths)
    system = system_of(case, lengths_of(lengths))
    steps = _steps(system)
    rows: list[dict[str, Any]] = []
    for repetition in range(repetitions):
        rows += repeat(experiment, steps, repetition)
        mine = [row for row in rows if row["repetition"] == repetition]
        ours, best = (
            column(mine, "first_tokens_rps", policy=name) for name in ("prices-arrival", "best threshold")
        )
        say(f"#{repetition}: " + ", ".join(f"{a:.2f}/{b:.2f}" for a, b in zip(ours, best, strict=True)))
    return {"steps": steps, "rows": rows}


def repeat(
    experiment: Experiment, steps: Sequence[dict[str, float]], repetition: int
) -> list[dict[str, Any]]:
    """One repetition of all steps."""
    rows: list[dict[str, Any]] = []
    label = {"repetition": repetition, "seed": experiment.seed}
    for step in steps:
        requests = _requests(experiment, step, repetition)
        stepped = experiment.model_copy(update={"timeline": _timeline(step)})
        ours = play(stepped, repetition, requests=requests, policy=_policy("prices-arrival"))
        rows.append(_judged(ours, step, {**label, "policy": "prices-arrival"}))
        told = _told(stepped, repetition, requests, step)
        rows.append(_judged(told, step, {**label, "policy": "best threshold"}))
    # The last step is the first bandwidth again, and the best split for it the same.
    for step in steps[:-1]:
        rows += _converted(experiment, step, repetition, label)
    return rows


def _steps(system: System) -> list[dict[str, float]]:
    """Each step with its plan: at the split as it is, and at the best."""
    found: list[dict[str, float]] = []
    for place, gbps in enumerate(K_STEPS_GBPS):
        here = system.changed(egress_bps=max(gbps, 1e-6) * 1e9)
        held, free = best_threshold(here, K_PREFILL), optimum(here)
        found.append(
            {
                "step": place,
                "gbps": gbps,
                "before_gbps": K_STEPS_GBPS[max(0, place - 1)],
                "before_rps": found[-1]["planned_rps"] if found else held.throughput_rps,
                "before_threshold_tokens": found[-1]["threshold_tokens"] if found else held.threshold_tokens,
                "for_s": K_GRACE_S + K_JUDGED / held.throughput_rps,
                "planned_rps": held.throughput_rps,
                "threshold_tokens": held.threshold_tokens if gbps else K_NEVER,
                "optimum_rps": free.throughput_rps,
                "optimum_prefill": free.prefill,
                "optimum_threshold_tokens": free.threshold_tokens if gbps else K_NEVER,
            }
        )
    return found


def _requests(
    experiment: Experiment, step: dict[str, float], repetition: int, more: float | None = None
) -> list[TimedRequest]:
    """Poisson arrivals, first at what was easily carried before, then enough that work never runs out."""
    if more is None:
        more = K_MORE.get(step["gbps"], K_MORE_ELSE)
    found: list[TimedRequest] = []
    for begin_s, for_s, rate_rps in (
        (0.0, K_BEFORE_S, K_LESS * step["before_rps"]),
        (K_BEFORE_S, step["for_s"], more * step["planned_rps"]),
    ):
        workload = experiment.workload.model_copy(update={"duration_s": for_s})
        seed = experiment.seed + 101 * int(step["step"]) + (17 if begin_s else 0)
        drawn = experiment.model_copy(update={"workload": workload, "seed": seed})
        for one in requests_of(at_rate(drawn, rate_rps), repetition):
            found.append(replace(one, index=len(found), arrival_s=one.arrival_s + begin_s))
    return found


def _timeline(step: dict[str, float]) -> tuple[SetLink, ...]:
    return tuple(
        SetLink(do="set_link", at_s=at_s, link="east<->west", set=_change(gbps))
        for at_s, gbps in ((0.0, step["before_gbps"]), (K_BEFORE_S, step["gbps"]))
    )


def _change(gbps: float) -> LinkChange:
    return LinkChange(rate_mbps=gbps * 1e3, down=False) if gbps else LinkChange(down=True)


def _policy(name: str) -> PolicyConfig:
    """The report's at its fixed threshold, or ours."""
    if name == "paper":
        return PolicyConfig(name="paper", regime="scarce")
    return PolicyConfig(name="prices")


def _told(
    experiment: Experiment,
    repetition: int,
    requests: Sequence[TimedRequest],
    step: dict[str, float],
) -> Outcome:
    """The report's policy, given the threshold for the bandwidth at the moment that it changes."""

    def prepare(simulation: Simulation) -> None:
        policy, agenda = simulation.world.policy, simulation.world.agenda

        def tell(threshold: float) -> None:
            policy.config = policy.config.model_copy(update={"threshold_tokens": threshold})

        tell(step["before_threshold_tokens"])
        agenda.at(K_BEFORE_S, lambda _: tell(step["threshold_tokens"]))

    return play(experiment, repetition, requests=requests, policy=_policy("paper"), prepare=prepare)


def _judged(outcome: Outcome, step: dict[str, float], label: dict[str, Any]) -> dict[str, Any]:
    """First tokens a second in the step beyond its grace, and TTFT of those that arrived in it."""
    record = outcome.record
    arrival, ttft = np.asarray(record.arrival_s), np.asarray(record.ttft_s)
    began, good = arrival + ttft, np.asarray(record.error) == 0
    begin_s, end_s = K_BEFORE_S + K_GRACE_S, K_BEFORE_S + step["for_s"]
    count = int((good & (began >= begin_s) & (began < end_s)).sum())
    came = good & (arrival >= K_BEFORE_S)
    return {
        **label,
        "step": step["step"],
        "gbps": step["gbps"],
        "first_tokens": count,
        "first_tokens_rps": count / (end_s - begin_s),
        "ttft_p90_s": float(np.quantile(ttft[came], 0.9)),
        "lost": len(outcome.requests) - len(record),
        "failed": int((~good).sum()),
    }


def _converted(
    experiment: Experiment, step: dict[str, float], repetition: int, label: dict[str, Any]
) -> list[dict[str, Any]]:
    """A link that stays as it is, with the split that the plan finds best for it: ours, and the threshold
    that the plan finds best with it.
    """
    prefill = int(step["optimum_prefill"])
    counts = {"near": prefill, "decode": sum(one.count for one in experiment.instances[1:]) - prefill}
    instances = [
        one.model_copy(update={"count": counts.get(one.name, one.count)}) for one in experiment.instances
    ]
    rate_rps = step["optimum_rps"]
    still = {
        **step, "before_gbps": step["gbps"], "before_rps": rate_rps, "planned_rps": rate_rps,
        "for_s": K_GRACE_S + K_JUDGED / rate_rps,
        "threshold_tokens": step["optimum_threshold_tokens"],
        "before_threshold_tokens": step["optimum_threshold_tokens"],
    }  # fmt: skip
    held = experiment.model_copy(update={"instances": instances, "timeline": _timeline(still)})
    requests = _requests(held, still, repetition, K_MORE_SPLIT)
    ours = play(held, repetition, requests=requests, policy=_policy("prices-arrival"))
    told = _told(held, repetition, requests, still)
    return [
        _judged(ours, still, {**label, "policy": "best split"}),
        _judged(told, still, {**label, "policy": K_SPLIT_TOLD}),
    ]


def _against(data: dict[str, Any], policy: str, place: int) -> Mean:
    wanted = {"step": place}
    return ratios(
        column(data["rows"], "first_tokens_rps", policy=policy, **wanted),
        column(data["rows"], "first_tokens_rps", policy="best threshold", **wanted),
    )


def _of_optimum(data: dict[str, Any], step: dict[str, float], policy: str = "best split") -> Mean:
    found = column(data["rows"], "first_tokens_rps", policy=policy, step=step["step"])
    return ratios(found, [step["optimum_rps"]] * len(found))


def goals(data: dict[str, Any]) -> list[Goal]:
    steps = data["steps"]
    shares = [_against(data, "prices-arrival", place) for place in range(len(steps))]
    alone_rps = min(step["planned_rps"] for step in steps)
    ours = [
        mean(column(data["rows"], "first_tokens_rps", policy="prices-arrival", step=place))
        for place in range(len(steps))
    ]
    mine = [row for row in data["rows"] if row["policy"] in ("prices-arrival", "best split")]
    split = [_of_optimum(data, step) for step in steps[:-1]]
    least = min(row["first_tokens"] for row in mine)
    return [
        Goal(
            "30 s after each step, ours carries at least 0.95 of the best threshold for that bandwidth",
            "; ".join(
                f"{step['gbps']:g}: {share.text(3)}" for step, share in zip(steps, shares, strict=True)
            ),
            all(share.value >= K_GOAL for share in shares),
        ),
        Goal(
            "never less than 0.95 of what the plan says of the local cluster alone",
            f"least {min(one.value for one in ours):.2f} req/s; alone {alone_rps:.2f}",
            min(one.value for one in ours) >= K_GOAL * alone_rps,
        ),
        Goal("every step is judged on at least 1,000 answers", f"least {least}", least >= 1000),
        Goal(
            "no request lost, none answered with an error",
            f"{sum(row['lost'] for row in mine)} lost, {sum(row['failed'] for row in mine)} errors",
            not any(row["lost"] or row["failed"] for row in mine),
        ),
        Goal(
            "with the split that is best for the bandwidth, ours carries 0.95 of the full optimum by plan",
            "; ".join(
                f"{step['gbps']:g}: {share.text(3)}" for step, share in zip(steps[:-1], split, strict=True)
            ),
            all(share.value >= K_GOAL for share in split),
            K_WHY_SPLIT,
        ),
    ]


def tell(data: dict[str, Any]) -> str:
    rows, lines = data["rows"], []
    for place, step in enumerate(data["steps"]):
        wanted = {"step": place}
        lines.append(
            [
                f"{step['gbps']:g} Gbit/s, {step['for_s']:.0f} s",
                f"{step['planned_rps']:.2f}",
                *(
                    mean(column(rows, "first_tokens_rps", policy=name, **wanted)).text()
                    for name in ("best threshold", "prices-arrival")
                ),
                _against(data, "prices-arrival", place).text(3),
                *(
                    mean(column(rows, "ttft_p90_s", policy=name, **wanted)).text(0)
                    for name in ("best threshold", "prices-arrival")
                ),
            ]
        )
    head = [
        "step", "plan", "best t", "ours",
        "ours / best t",
        "P90 TTFT, best t", "P90 TTFT, ours",
    ]  # fmt: skip
    carried = [
        mean(column(rows, "first_tokens_rps", policy="best split", step=step["step"]))
        for step in data["steps"]
    ]
    splits = "; ".join(
        f"{step['gbps']:g} Gbit/s {found.text()}"
        f" of {step['optimum_rps']:.2f} (N_p = {step['optimum_prefill']})"
        for step, found in zip(data["steps"][:-1], carried, strict=False)
    )
    told = "; ".join(
        f"{step['gbps']:g} Gbit/s {share.text(3)}"
        for step in data["steps"][:-1]
        if (share := _of_optimum(data, step, K_SPLIT_TOLD)).count
    )
    told = told and (
        f" The threshold that the plan finds best with that split carries, of the same optimum: {told}: what "
        "a plan promises for a mean isn't carried of every thousand prompts."
    )
    return (
        table(head, lines)
        + f"""
First tokens a second, from 30 s after a step to its end, at 3 prefill and 5 decode instances. Each step is
a run of its own: two minutes at the bandwidth before, at {K_LESS:g} of what the plan carries there, then the
step with more arrivals than can be carried, so that there is always work; TTFTs are those of an overload.
*Best t* is the report's policy whose threshold is set, at the moment of the change, to the plan's best for
the new bandwidth: it knows what ours has to find out. Ours serves in order of arrival here, as the threshold
does: by deadline, short prompts go first in an overload, which answers more requests and isn't a better use
of the link.

One timeline of all steps, with a backlog kept through them, was tried first, once, at 1.1 of capacity: ours
then carried 0.82 of a threshold that is told the bandwidth at 2 Gbit/s and 0.90 at 0. A backlog taken along
from the steps before is mixed into those two figures; they were not pursued, and aren't in the record.

Roles don't change in these runs (`one-t-roles` plays that). With the split that the plan finds best for each
bandwidth held from the start, and {K_MORE_SPLIT:g} of that optimum arriving, ours carries of it:
{splits}.{told}
"""
    )


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """First tokens a second by step."""
    figure, (axis,) = new_figure(1, 1, width=7.5, height=3.2)
    steps = data["steps"]
    count = len(steps)
    place = np.arange(count)
    drawn: list[list[Any]] = []
    looks = (
             ("best threshold", "best t for each bandwidth", "#009E73"),
             ("prices-arrival", "ours, as they come", "#D55E00"))  # fmt: skip
    for shift, (name, label, colour) in enumerate(looks):
        means = [
            mean(column(data["rows"], "first_tokens_rps", policy=name, step=one)) for one in range(len(steps))
        ]
        axis.bar(
            place + 0.4 * (shift - 0.5), [one.value for one in means], 0.38, label=label, color=colour,
            yerr=[one.half for one in means], error_kw={"linewidth": 1.0},
        )  # fmt: skip
        drawn += [[step["gbps"], name, one.value, one.half] for step, one in zip(steps, means, strict=True)]
    axis.plot(place, [step["planned_rps"] for step in steps], **series("plan").kwargs() | {"linestyle": ""})
    axis.set_xticks(place, [f"{step['gbps']:g}" for step in steps])
    axis.set(
        xlabel="Link in this step, Gbit/s",
        ylabel="First tokens, req/s",
        title="Bandwidth steps, with a backlog",
    )
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    paths = save(figure, folder, "bandwidth", ["gbps", "policy", "mean", "half"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece("bandwidth", "Bandwidth steps", measure, goals, draw, tell)
