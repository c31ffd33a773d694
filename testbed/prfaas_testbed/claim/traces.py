"""Piece `traces`: recorded traces from end to end, with and without their bursts and link trouble."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter

from prfaas.config.experiment import CrossTraffic, Event, Experiment, SetLink
from prfaas.config.policy import PolicyConfig
from prfaas.config.topology import LinkChange, load_topology
from prfaas.config.workload import Azure, Mooncake
from prfaas.figures import new_figure, save, series
from prfaas.simulator.sweep import spread
from prfaas.workload import scaled_rate
from prfaas_testbed.claim.judge import Goal, Piece, column, table
from prfaas_testbed.claim.runs import K_TOPOLOGIES, parts, play, requests_of

K_SET = "claim-traces"
K_POLICIES = ("paper", "prices")
K_IN_PLACE = "-in-place"
"""Of a policy: where prefixes may be moved to another site, none is. At the traces' own size."""
K_SCALES = (1, 4, 10)
K_LARGER = {
    4: ("conversation", "conversation-trouble", "code", "code-trouble"),
    10: ("conversation", "code"),
}
"""What is played at the greater ones: the trace whose prompts share prefixes, the one with most bursts."""
K_FASTER = 60.0  # an hour in a minute of CPU time, at the traces' own size
K_VARIANTS = {
    "": ("as recorded", "steady"),
    "-even": ("even", "steady"),
    "-trouble": ("as recorded", "trouble"),
    "-even-trouble": ("even", "trouble"),
}


@dataclass(frozen=True)
class Run:
    """One whole trace, under one policy, at one scale."""

    part: str
    experiment: Experiment
    scale: int
    policy: str

    def __str__(self) -> str:
        return f"{self.part} x{self.scale} {self.policy}"


def scaled(experiment: Experiment, scale: int) -> Experiment:
    """So many times the instances, the requests a second and the links, for the same time.

    The trace is played `scale` times over, one round after the other; no round shares a prefix with another.
    """
    workload = experiment.workload
    assert isinstance(workload, Mooncake | Azure)  # the set's files
    network = load_topology(experiment.network, K_TOPOLOGIES / "networks")
    widened = [
        SetLink(
            do="set_link",
            at_s=0.0,
            link=name,
            set=LinkChange(rate_mbps=link.rate_mbps * scale),
        )
        for name, link in network.directed().items()
        if link.rate_mbps is not None
    ]
    return experiment.model_copy(
        update={
            "workload": scaled_rate(workload, scale).model_copy(update={"repeat": scale}),
            "instances": tuple(
                one.model_copy(update={"count": one.count * scale}) for one in experiment.instances
            ),
            "timeline": (*widened, *(_scaled_event(event, scale) for event in experiment.timeline)),
        }
    )


def _scaled_event(event: Event, scale: int) -> Event:
    if isinstance(event, SetLink) and event.set.rate_mbps is not None:
        changed = event.set.model_copy(update={"rate_mbps": event.set.rate_mbps * scale})
        return event.model_copy(update={"set": changed})
    if isinstance(event, CrossTraffic) and event.rate_mbps is not None:
        return event.model_copy(update={"rate_mbps": event.rate_mbps * scale})
    return event


def play_one(run: Run) -> dict[str, Any]:
    """A row of the record."""
    experiment = scaled(run.experiment, run.scale) if run.scale > 1 else run.experiment
    assert experiment.router is not None  # the set's files
    chosen = experiment.router.policy
    name = run.policy.removesuffix(K_IN_PLACE)
    if name != run.policy:
        door = experiment.router.model_copy(update={"move_prefixes": False})
        experiment = experiment.model_copy(update={"router": door})
    service = chosen.service if name == "prices" else "arrival"
    policy = PolicyConfig(name=name, service=service, threshold_tokens=chosen.threshold_tokens)
    requests = requests_of(experiment, 0)
    begun_s = time.process_time()
    found = play(experiment, 0, requests=requests, policy=policy)
    cpu_s = time.process_time() - begun_s
    prompts = np.array([one.prompt_tokens for one in requests])
    return {
        "part": run.part,
        "scale": run.scale,
        "policy": run.policy,
        "repetition": 0,
        "seed": experiment.seed,
        **found.figures(),
        "cached_share": float(np.sum(found.record.cached_tokens) / prompts.sum()),
        "repeated_share": float(1 - found.uncached.sum() / prompts.sum()),
        "simulated_s": requests[-1].arrival_s,
        "cpu_s": cpu_s,
        "events": found.simulation.world.agenda.events,
    }


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Every part at the trace's own size, and some at greater ones; at the greatest under ours alone.

    A whole trace is one: there is nothing to repeat, so that `repetitions` doesn't count.
    """
    found = parts(K_SET)
    runs = [
        Run(part, experiment, scale, policy)
        for scale in reversed(K_SCALES)  # the longest first, so that no core waits for one at the end
        for part, experiment in found
        for policy in K_POLICIES
        if scale == 1 or (part in K_LARGER[scale] and (scale < max(K_SCALES) or policy == "prices"))
    ]
    runs += [
        Run(part, experiment, 1, policy + K_IN_PLACE)
        for part, experiment in found
        for policy in K_POLICIES
        if experiment.router is not None and experiment.router.move_prefixes
    ]
    rows = []
    for run, row in zip(runs, spread(play_one, runs), strict=True):
        rows.append(row)
        say(
            f"{run}: {row['requests']} requests, {row['cpu_s']:.1f} s of CPU, {row['within_slo']:.1%} in time"
        )
    places = {part: place for place, (part, _) in enumerate(found)}
    rows.sort(key=lambda row: (row["scale"], places[row["part"]], row["policy"]))
    return {"repetitions": 1, "parts": [part for part, _ in found], "rows": rows}


def goals(data: dict[str, Any]) -> list[Goal]:
    rows = data["rows"]
    gains = {
        (part, scale): ours[0] - paper[0]
        for part in data["parts"]
        for scale in K_SCALES
        if (ours := column(rows, "within_slo", part=part, scale=scale, policy="prices"))
        and (paper := column(rows, "within_slo", part=part, scale=scale, policy="paper"))
    }
    least = min(gains, key=lambda key: gains[key])
    own = [row for row in rows if row["scale"] == 1]
    slowest = min(own, key=lambda row: row["simulated_s"] / row["cpu_s"])
    lost, failed = (
        sum(row[name] for row in rows if row["policy"] == "prices") for name in ("lost", "failed")
    )
    return [
        Goal(
            "whole traces: ours has at least as many requests within the SLO as the report's policy, on each",
            f"least gain {gains[least]:+.1%} ({least[0]}, x{least[1]}), most {max(gains.values()):+.1%}",
            gains[least] >= 0,
        ),
        Goal(
            "whole traces: no request lost, none answered with an error",
            f"{lost} lost, {failed} errors",
            lost + failed == 0,
        ),
        Goal(
            "a trace at its own size is simulated in a sixtieth of the time that it takes",
            f"slowest {slowest['part']} under {slowest['policy']}: {slowest['simulated_s']:.0f} s in "
            f"{slowest['cpu_s']:.1f} s of CPU time",
            all(row["simulated_s"] >= K_FASTER * row["cpu_s"] for row in own),
        ),
    ]


def tell(data: dict[str, Any]) -> str:
    """A row a run."""
    lines = []
    for row in data["rows"]:
        trace, arrivals, link = _said(row["part"])
        lines.append(
            [
                f"{trace}, {arrivals}, {link} x{row['scale']}", series(row["policy"]).label,
                f"{row['requests']:,}", f"{row['within_slo']:.1%}",
                f"{row['ttft_mean_s']:.2f} / {row['ttft_p90_s']:.2f}", f"{row['cached_share']:.1%}",
                f"{row['offloaded_share']:.1%}", f"{row['moved_share']:.1%}", f"{row['egress_gbps']:.1f}",
                f"{row['simulated_s']:.0f}",
                f"{row['cpu_s']:.0f}",
            ]
        )  # fmt: skip
    head = [
        "trace, arrivals, link, scale", "policy", "requests", "within SLO", "TTFT mean / P90, s", "cached",
        "offloaded", "moved to", "egress, Gbit/s", "simulated, s", "CPU, s",
    ]  # fmt: skip
    repeated = {
        _said(row["part"])[0]: row["repeated_share"]
        for row in data["rows"]
        if row["scale"] == 1 and row["repeated_share"] > 0
    }
    said = "; ".join(f"of {trace} {share:.1%} of the prompts' tokens" for trace, share in repeated.items())
    return (
        table(head, lines)
        + f"""
Every request of each trace, at 0.75 of what the plan says that the hardware carries of it, split and
threshold the plan's for the whole trace. *Even*: the same requests in the same order, but Poisson arrivals.
*Trouble*: the link down for 30 s, then 20 flaps of 5 s up and 2 s down, a minute at 3 of its 100 Gbit/s and a
minute with 95 of them taken by others; all of that is over when code has been played, and a third of the
other two. *Scale*: so many times the instances, the link and the requests a second, for the same time; the
trace is then played over and over, and no round shares a prefix with another. One cache for everything,
without end, would hold {said}; *cached* is what the instances' own caches held, some of it brought from
the other site's before (*moved to*: for how many requests); *nothing moved* is without that, where the
report's policy counts each site's cache for itself. Ours serves by deadline, the
others as requests come. Each run is one: there is no second trace of a kind, so that there are no intervals.
"""
    )


def _said(part: str) -> tuple[str, str, str]:
    """Trace, arrivals and link of a part."""
    trace, dash, rest = part.partition("-")
    return trace, *K_VARIANTS[dash + rest]


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """Within the SLO by policy, a panel a trace, at the traces' own size; and CPU time by requests."""
    rows, names = data["rows"], list(dict.fromkeys(_said(part)[0] for part in data["parts"]))
    figure, axes = new_figure(1, len(names) + 1, width=3.3, height=3.2)
    drawn: list[list[Any]] = []
    for axis, trace in zip(axes, names, strict=False):
        for place, policy in enumerate(K_POLICIES):
            values = [
                column(rows, "within_slo", part=f"{trace}{variant}", scale=1, policy=policy)[0]
                for variant in K_VARIANTS
            ]
            look = series(policy)
            at = np.arange(len(values)) + (place - 0.5) * 0.37
            axis.bar(at, values, width=0.35, color=look.colour, label=look.label)
            drawn += [
                [trace, *said, policy, 1, value]
                for said, value in zip(K_VARIANTS.values(), values, strict=True)
            ]
        axis.set(title=trace, ylim=(0, 1.03), ylabel="Requests within the SLO")
        axis.set_xticks(range(len(K_VARIANTS)), [f"{a}\n{b}" for a, b in K_VARIANTS.values()], fontsize=7)
    for policy in K_POLICIES:
        points = _points(rows, policy)
        look = series(policy)
        axes[-1].plot(
            [x for x, _ in points], [y for _, y in points],
            color=look.colour, marker=look.marker, linestyle="", label=look.label,
        )  # fmt: skip
    axes[-1].set(title="What it costs", xlabel="Requests", ylabel="CPU time, s", xscale="log", yscale="log")
    axes[-1].xaxis.set_minor_formatter(NullFormatter())
    axes[-1].legend(loc="upper left", fontsize=7)
    paths = save(figure, folder, "traces", ["trace", "arrivals", "link", "policy", "scale", "within"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


def _points(rows: Sequence[dict[str, Any]], policy: str) -> list[tuple[float, float]]:
    return sorted((row["requests"], row["cpu_s"]) for row in rows if row["policy"] == policy)


PIECE = Piece("traces", "Whole traces", measure, goals, draw, tell)
