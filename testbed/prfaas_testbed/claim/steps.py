"""Piece `steps`: two of the bandwidth steps on the testbed, beside the simulator and the best threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prfaas.config.case import CaseConfig, TraceLengths, load_case
from prfaas.config.experiment import Experiment, SetLink
from prfaas.config.lengths import lengths_of
from prfaas.config.policy import PolicyConfig
from prfaas.config.run import Run
from prfaas.figures import new_figure, save
from prfaas.planner.build import system_of
from prfaas.planner.optimum import best_threshold
from prfaas.workload.requests import TimedRequest
from prfaas_testbed.claim import worlds
from prfaas_testbed.claim.bandwidth import K_GRACE_S, K_PREFILL
from prfaas_testbed.claim.gathering import by_hand, gathered, last_of_each, not_run, unbelieved
from prfaas_testbed.claim.judge import Goal, Mean, Piece, mean, table
from prfaas_testbed.claim.runs import K_TOPOLOGIES, parts
from prfaas_testbed.claim.testbed import K_TIME_SCALE

K_EXPERIMENT = "claim-steps"
K_GOAL = 0.95
K_TOKENS = 16  # of the case, that each token of the experiment stands for
K_BATCHES = 8  # stretches of equal length whose means give the interval
K_OURS = ("testbed", "simulator")
K_BEST = "best threshold, simulated"
K_BEST_REAL = "best threshold, testbed"
K_BEST_PART = "-best"
"""Ends the name of the part that plays the same step by that threshold."""
K_LEAST = 1000  # first tokens that a step is judged on


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Raises UsageError: it takes a network."""
    raise by_hand("steps", K_EXPERIMENT)


def gather(folders: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """The record of the last run of each part. Raises UsageError."""
    found = last_of_each(gathered(folders, K_EXPERIMENT))
    rows: list[dict[str, Any]] = []
    for part, one in found.items():
        fresh = _rows(part, one.run, one.experiment)
        for row in fresh:
            planned = f"plan {row['planned_rps']:.2f}"
            say(f"{part} Gbit/s, {row['world']}: {_rate(row).text()} req/s, {planned}")
        rows += fresh
    return {"rows": rows, "runs": [one.brief for one in found.values()]}


def _rows(part: str, run: Run, experiment: Experiment) -> list[dict[str, Any]]:
    """The testbed's answers, the simulator's, and those of the best fixed threshold."""
    label, told = _label(part.removesuffix(K_BEST_PART), experiment)
    by_threshold = part.endswith(K_BEST_PART)
    rows = [
        {
            **label, "world": K_BEST_REAL if by_threshold else K_OURS[0], "repetition": index,
            "requests_rows": played.plain(),
            "cores": worlds.costs(run, part, index),
        }
        for index, played in worlds.on_testbed(run, part)
    ]  # fmt: skip
    if by_threshold:
        return rows
    return rows + _simulated(experiment, worlds.requests_of_testbed(experiment), label, told)


def _label(part: str, experiment: Experiment) -> tuple[dict[str, Any], PolicyConfig]:
    """What all rows of a step say, and the best threshold's policy."""
    (event,) = experiment.timeline
    assert isinstance(event, SetLink)  # the file says it
    case = load_case(K_TOPOLOGIES / "cases" / "case_1t_hybrid.yaml")
    assert isinstance(case, CaseConfig)  # the file's form
    lengths = case.workload.input_tokens
    assert not isinstance(lengths, TraceLengths)
    system = system_of(case, lengths_of(lengths)).changed(egress_bps=float(part) * 1e9)
    plan = best_threshold(system, K_PREFILL)
    told = PolicyConfig(name="paper", regime="scarce", threshold_tokens=plan.threshold_tokens / K_TOKENS)
    label = {
        "part": part, "step_s": event.at_s, "until_s": experiment.workload.duration_s,
        "planned_rps": plan.throughput_rps, "threshold_tokens": plan.threshold_tokens,
    }  # fmt: skip
    return label, told


def _simulated(
    experiment: Experiment, requests: Sequence[TimedRequest], label: dict[str, Any], told: PolicyConfig
) -> list[dict[str, Any]]:
    rows = []
    for world, policy in (("simulator", None), (K_BEST, told)):
        played = worlds.simulated(experiment, requests, policy)
        rows.append({**label, "world": world, "repetition": 0, "requests_rows": played.plain()})
    return rows


def resimulated(data: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The record with the simulator's rows made anew, by the experiment's file. Where that draws other
    requests than the testbed had, a step's rows stay.
    """
    rows: list[dict[str, Any]] = []
    known = dict(parts(K_EXPERIMENT))
    for part in _parts(data):
        ours = [row for row in data["rows"] if row["part"] == part]
        real = [row for row in ours if row["world"] in (K_OURS[0], K_BEST_REAL)]
        requests = worlds.requests_of_testbed(known[part]) if part in known else []
        if not worlds.alike(requests, real[0]["requests_rows"]["prompt_tokens"]):
            say(f"{part} Gbit/s: the file has other requests by now; its simulated rows stay")
            rows += ours
            continue
        fresh = real + _simulated(known[part], requests, *_label(part, known[part]))
        for row in fresh:
            say(f"{part} Gbit/s, {row['world']}: {_rate(row).text()} req/s")
        rows += fresh
    return {**data, "rows": rows}


def _window_s(row: dict[str, Any]) -> tuple[float, float]:
    """From the grace's end to the last arrivals."""
    return row["step_s"] + K_GRACE_S / K_TIME_SCALE, row["until_s"]


def _first_s(row: dict[str, Any]) -> np.ndarray:
    """When first tokens came, beyond the grace."""
    played = worlds.Played.of_plain(row["requests_rows"])
    came = (played["sent_s"] + played["ttft_s"])[played.answered]
    begin_s, end_s = _window_s(row)
    return np.sort(came[(came >= begin_s) & (came < end_s)])


def _rate(row: dict[str, Any]) -> Mean:
    """First tokens a second at the 1T case's own scale, with the interval of its stretches."""
    begin_s, end_s = _window_s(row)
    counts, _ = np.histogram(_first_s(row), bins=K_BATCHES, range=(begin_s, end_s))
    return mean((counts / ((end_s - begin_s) / K_BATCHES) / K_TIME_SCALE).tolist())


def _of(data: dict[str, Any], part: str, world: str) -> dict[str, Any] | None:
    return next((row for row in data["rows"] if (row["part"], row["world"]) == (part, world)), None)


def _parts(data: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["part"] for row in data["rows"]))


def goals(data: dict[str, Any]) -> list[Goal]:
    """Ours on the testbed at least 0.95 of the best threshold, there where that ran, else simulated; and both
    worlds of ours within a tenth.
    """
    shares, gaps, judged = {}, {}, {}
    for part in _parts(data):
        real, virtual = (_of(data, part, world) for world in K_OURS)
        best = _of(data, part, K_BEST_REAL) or _of(data, part, K_BEST)
        if real is not None and virtual is not None and best is not None:
            shares[part] = _rate(real).value / _rate(best).value
            gaps[part] = _rate(real).value / _rate(virtual).value - 1
            judged[part] = min(len(_first_s(row)) for row in (real, virtual, best))
    played = [row for row in data["rows"] if row["world"] in (K_OURS[0], K_BEST_REAL)]
    lost = sum(int((~worlds.Played.of_plain(row["requests_rows"]).answered).sum()) for row in played)
    return [
        Goal(
            "on the testbed, beyond 30 s after a step, ours carries at least 0.95 of the best threshold",
            "; ".join(f"{part} Gbit/s: {share:.3f}" for part, share in shares.items()),
            all(share >= K_GOAL for share in shares.values()),
        ),
        Goal(
            "testbed and simulator agree within 10% there",
            "; ".join(f"{part} Gbit/s: {gap:+.1%}" for part, gap in gaps.items()),
            all(abs(gap) <= 0.1 for gap in gaps.values()),
        ),
        Goal(
            f"each of two steps is judged on at least {K_LEAST:,} first tokens",
            "; ".join(f"{part} Gbit/s: {count:,}" for part, count in judged.items()),
            len(judged) >= 2 and min(judged.values()) >= K_LEAST,
        ),
        Goal("on the testbed, no request lost or answered with an error", f"{lost}", lost == 0),
    ]


def tell(data: dict[str, Any]) -> str:
    """A table of all that played the steps."""
    lines = []
    for row in data["rows"]:
        played = worlds.Played.of_plain(row["requests_rows"])
        came = played.answered & (played["sent_s"] >= row["step_s"])
        lines.append(
            [
                f"{row['part']} Gbit/s, {row['world']}", f"{row['planned_rps']:.2f}", _rate(row).text(),
                f"{len(_first_s(row))}", f"{100 * (played['wan_bytes'][came] > 0).mean():.0f}",
                f"{K_TIME_SCALE * np.quantile(played['ttft_s'][came], 0.9):.1f}",
            ]
        )  # fmt: skip
    head = ["step to, by", "plan, req/s", "first tokens, req/s", "judged on", "offloaded, %", "TTFT P90, s"]
    more = unbelieved(data["runs"]) + not_run(K_EXPERIMENT, data["runs"])
    return table(head, lines) + K_TOLD + (f"\n{more}" if more else "")


K_TOLD = f"""
At the 1T case's own scale; what ran is half its size. The interval is that of {K_BATCHES} stretches of
one run, as if they owed one another nothing. On the testbed the pumps estimate their links and the
router asks them twice a second; the simulator's door hears of its links at once. Arrivals are as many
as the plan says the narrow link carries. The best threshold is that of the plan for the narrow link, held
from the beginning: nobody tells ours. Each ran once there.
"""


K_COLOURS = {K_OURS[0]: "#0072B2", K_OURS[1]: "#E69F00", K_BEST_REAL: "#000000", K_BEST: "#999999"}


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """First tokens a second over time, ours in both worlds and the best threshold."""
    names = _parts(data)
    figure, axes = new_figure(1, len(names), width=4.2, height=3.0)
    drawn: list[list[Any]] = []
    for part, panel in zip(names, axes, strict=True):
        for world, colour in K_COLOURS.items():
            row = _of(data, part, world)
            if row is None:
                continue
            played = worlds.Played.of_plain(row["requests_rows"])
            came = (played["sent_s"] + played["ttft_s"])[played.answered]
            edges = np.arange(0.0, row["until_s"] + 1e-9, 10.0)
            rates = np.histogram(came, bins=edges)[0] / 10.0 / K_TIME_SCALE
            panel.plot(K_TIME_SCALE * (edges[:-1] + 5.0), rates, color=colour, label=world)
            drawn += [[part, world, K_TIME_SCALE * a, b] for a, b in zip(edges[:-1], rates, strict=True)]
            panel.axvline(K_TIME_SCALE * row["step_s"], color="black", linewidth=0.8)
        panel.set(title=f"100 to {part} Gbit/s", xlabel="Time, s", ylim=(0, None))
    axes[0].set_ylabel("First tokens, req/s")
    axes[0].legend(loc="lower right")
    paths = save(figure, folder, "steps", ["part", "world", "from s", "first tokens, req/s"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece(
    "steps",
    "Bandwidth steps on the testbed",
    measure,
    goals,
    draw,
    tell,
    gather,
    resimulated=resimulated,
)
