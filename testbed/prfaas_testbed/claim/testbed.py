"""Piece `testbed`: the 1T case and two sites on real pumps and an emulated link, and in the simulator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prfaas.config.experiment import Experiment
from prfaas.config.run import Run
from prfaas.figures import new_figure, save, series
from prfaas.workload.requests import TimedRequest
from prfaas_testbed.claim import worlds
from prfaas_testbed.claim.capacity import K_RATIOS, K_WITHIN
from prfaas_testbed.claim.gathering import by_hand, gathered, last_of_each, not_run, unbelieved
from prfaas_testbed.claim.judge import Goal, Mean, Piece, column, mean, ratios, table
from prfaas_testbed.claim.runs import parts

K_EXPERIMENT = "claim-testbed"
K_HALF = "hundred-gig-half"  # the network of what runs at half the 1T case's size
K_TIME_SCALE = 2.0  # there, a second of profiles, arrivals and round trip stands for so many
K_SYSTEMS = ("homogeneous", "naive", "paper", "prices")
K_LOADS = ("0.9", "1.2")
K_AGREE = 0.10
K_SIMULATED = 8
"""Runs a part: where requests choose by each other's queues, milliseconds change which go where."""
K_COMPARED = {
    "answered_rps": "answered, req/s",
    "ttft_mean_s": "TTFT mean, s",
    "ttft_p50_s": "TTFT P50, s",
    "ttft_p90_s": "TTFT P90, s",
    "egress_gbps": "egress, Gbit/s",
}
K_WHY = {
    "two-sites": "a request's way through client, router and instances takes milliseconds of a processor, "
    "which the simulator's doesn't, and which show where first tokens are quick",
}
"""By system."""
K_TROUBLES = {"gamma": "with arrivals in bursts", "loss": "with 1% loss"}
"""In the place of a part's load."""


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Raises UsageError: it takes a network, and half an hour of it."""
    raise by_hand("testbed", K_EXPERIMENT)


def gather(folders: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """The record of the last run of each part, and of the same requests simulated. Raises UsageError."""
    found = last_of_each(gathered(folders, K_EXPERIMENT))
    rows: list[dict[str, Any]] = []
    for part, one in found.items():
        fresh = both(one.run, part, one.experiment)
        say(_line(part, fresh))
        rows += fresh
    places = {part: place for place, (part, _) in enumerate(parts(K_EXPERIMENT))}
    order = {part: places.get(part, len(places)) for part in found}
    rows.sort(key=lambda row: (order[row["part"]], row["world"], row["repetition"]))
    return {"rows": rows, "runs": [one.brief for one in found.values()]}


def both(run: Run, part: str, experiment: Experiment) -> list[dict[str, Any]]:
    """Rows of one part: each repetition on the testbed, and the simulator's answer to the same requests."""
    requests = worlds.requests_of_testbed(experiment)
    time_scale = K_TIME_SCALE if experiment.network == K_HALF else 1.0
    allowed = worlds.allowed_s(experiment, requests, time_scale)
    system, _, load = part.rpartition("-")
    label = {"part": part, "system": system, "load": load, "time_scale": time_scale}
    rows = []
    for index, played in worlds.on_testbed(run, part or None):
        row = {**label, "world": "testbed", "repetition": index, **played.figures(allowed)}
        rows.append({**row, "cores": worlds.costs(run, part or None, index), "requests_rows": played.plain()})
    return rows + _simulated(experiment, requests, allowed, label)


def _simulated(
    experiment: Experiment, requests: Sequence[TimedRequest], allowed_s: np.ndarray, label: dict[str, Any]
) -> list[dict[str, Any]]:
    """The same row for each of K_SIMULATED runs of the same requests, sent some milliseconds apart."""
    rows = []
    for index in range(K_SIMULATED):
        found = worlds.simulated(experiment, worlds.sent_late(requests, index))
        row = {**label, "world": "simulator", "repetition": index, **found.figures(allowed_s)}
        rows.append({**row, **({"requests_rows": found.plain()} if not index else {})})
    return rows


def resimulated(data: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The record with the simulator's rows made anew, by the experiment's file. Where that draws other
    requests than the testbed had, a part's rows stay.
    """
    rows: list[dict[str, Any]] = []
    known = dict(parts(K_EXPERIMENT))
    for part in _parts(data["rows"]):
        ours = [row for row in data["rows"] if row["part"] == part]
        real = [row for row in ours if row["world"] == "testbed"]
        experiment = known.get(part)
        requests = worlds.requests_of_testbed(experiment) if experiment is not None else []
        if experiment is None or not worlds.alike(requests, real[0]["requests_rows"]["prompt_tokens"]):
            say(f"{part}: the file has other requests by now; its simulated rows stay")
            rows += ours
            continue
        label = {name: real[0][name] for name in ("part", "system", "load", "time_scale")}
        allowed_s = worlds.allowed_s(experiment, requests, label["time_scale"])
        fresh = real + _simulated(experiment, requests, allowed_s, label)
        say(_line(part, fresh))
        rows += sorted(fresh, key=lambda row: (row["world"], row["repetition"]))
    return {**data, "rows": rows}


def _line(part: str, rows: list[dict[str, Any]]) -> str:
    found = [f"{name} {gap:+.1%}" for name in K_COMPARED if (gap := _gap(rows, part, name)) is not None]
    return f"{part}: testbed against simulator: {', '.join(found)}"


def _gap(rows: list[dict[str, Any]], part: str, name: str) -> float | None:
    """Testbed over simulator, less 1; None where there is nothing to compare."""
    real, virtual = (mean(column(rows, name, part=part, world=w)) for w in ("testbed", "simulator"))
    if not real.count or not virtual.count or not virtual.value:
        return None
    return real.value / virtual.value - 1


def _parts(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["part"] for row in rows))


def goals(data: dict[str, Any]) -> list[Goal]:
    """Agreement of the worlds, the published ratios on the testbed, ours and the report's policy."""
    rows = data["rows"]
    found = []
    for name, label in K_COMPARED.items():
        gaps = {part: gap for part in _parts(rows) if (gap := _gap(rows, part, name)) is not None}
        if gaps:
            worst = max(gaps, key=lambda part: abs(gaps[part]))
            found.append(
                Goal(
                    f"testbed and simulator agree within {K_AGREE:.0%}: {label.partition(',')[0]}",
                    f"{sum(abs(gap) <= K_AGREE for gap in gaps.values())} of {len(gaps)}, "
                    f"furthest {worst} {gaps[worst]:+.1%}",
                    all(abs(gap) <= K_AGREE for gap in gaps.values()),
                    K_WHY.get(worst.rpartition("-")[0], ""),
                )
            )
    for below, published in K_RATIOS.items():
        ratio = ratio_of(rows, "paper", below, "answered_rps", "1.2")
        if ratio.count:
            off = ratio.value / published - 1
            found.append(
                Goal(
                    f"on the testbed, the published ratio {published:g} to {below} within 5%",
                    f"{ratio.text(3)} ({off:+.1%})",
                    abs(off) <= K_WITHIN,
                )
            )
    for load, name, text in (
        (
            "1.2",
            "answered_rps",
            "beyond capacity, ours answers at least as much as the report's policy (within 1%)",
        ),
        ("0.9", "within_slo", "at 0.9, ours has at least as many requests within the SLO (within 1%)"),
    ):
        ratio = ratio_of(rows, "prices", "paper", name, load)
        if ratio.count:
            found.append(Goal(f"on the testbed, {text}", f"{ratio.text(3)} of it", ratio.value >= 0.99))
    for trouble, text in K_TROUBLES.items():
        ratio = ratio_of(rows, "prices", "paper", "within_slo", trouble)
        if ratio.count:
            found.append(
                Goal(
                    f"on the testbed, {text} at 0.85, ours has at least as many requests within the SLO "
                    "(within 1%)",
                    f"{ratio.text(3)} of it",
                    ratio.value >= 0.99,
                )
            )
    return found


def ratio_of(rows: list[dict[str, Any]], above: str, below: str, name: str, load: str) -> Mean:
    values = [column(rows, name, system=system, load=load, world="testbed") for system in (above, below)]
    return ratios(*values) if len(values[0]) == len(values[1]) else mean([])


def tell(data: dict[str, Any]) -> str:
    """Both worlds side by side, at the 1T case's own scale; then what the testbed's processes cost."""
    rows = data["rows"]
    lines = []
    for part, world in itertools.product(_parts(rows), ("testbed", "simulator")):
        chosen = {"part": part, "world": world}
        scale = column(rows, "time_scale", **chosen)[0]

        def shown(name: str, digits: int, factor: float = 1.0, chosen: dict[str, str] = chosen) -> str:
            return mean([factor * value for value in column(rows, name, **chosen) if value is not None]).text(
                digits
            )

        system, _, load = part.rpartition("-")
        lines.append(
            [
                f"{series(system).label}, {load}", world, shown("answered_rps", 2, 1 / scale),
                shown("ttft_mean_s", 2, scale), shown("ttft_p50_s", 2, scale), shown("ttft_p90_s", 2, scale),
                shown("egress_gbps", 2), shown("offloaded_share", 1, 100), shown("within_slo", 1, 100),
            ]
        )  # fmt: skip
    head = ["system, load", "world", "answered, req/s", "TTFT mean, s", "P50", "P90", "egress, Gbit/s",
            "offloaded, %", "within SLO, %"]  # fmt: skip
    text = table(head, lines)
    once = max(row["repetition"] for row in rows if row["world"] == "testbed") == 0
    told = unbelieved(data["runs"]) + not_run(K_EXPERIMENT, data["runs"])
    return text + K_SCALE + (K_ONCE if once else "") + told + _costs(rows) + K_SHARED


def _costs(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["world"] == "testbed" and row["repetition"] == 0:
            cores = row["cores"]
            each = 1e3 / row["offered_rps"]
            lines.append(
                [
                    row["part"],
                    *(
                        f"{100 * cores[role]:.0f}"
                        for role in ("router", "pump", "prefill", "decode", "client")
                    ),
                    f"{each * cores['router']:.1f}",
                    f"{each * cores['pump']:.1f}",
                ]
            )
    head = ["% of a core", "router", "pumps", "prefill", "decode", "client", "router, ms a request",
            "pumps, ms a request"]  # fmt: skip
    return table(head, lines) + (
        "\nOf all processes of a role together, over the whole load with its end. The router "
        "sends on prompts of 1,700 tokens on average as JSON, and relays 128 events a request.\n\n"
    )


K_SCALE = """
At the 1T case's own scale: what ran has times, bytes and the round trip of half the size, so that a second
of the table is half a second that passed; rates and bytes on the emulated link are divided by 500 besides.
Sixteen tokens of a prompt are one, eight of an answer: what prompts of the true length cost a CPU isn't seen
here. *two-sites* is as it is, with profiled instances in place of its servers, through the router. Both
worlds got the same requests. The simulator's figures are means of eight runs whose requests are sent up to 3
ms late, as the testbed's client sends them, with the interval of their mean: one run of ours in bursts is off
by some percents either way, and the testbed's as well. *Answered*: between the first fifth and the last of
the arrivals. *Load*: of what the plan says a system carries.

Where the worlds are known to differ: a request's way through client, router and instances is some
milliseconds of one processor, which others use as well. Served by deadline, requests waited at the
testbed's door 0.2 s (of the table) longer than at the simulator's, in bursts and with loss: the router took
its own requests whose KV was still crossing for others' prefill, and instances that were free for busy
ones. A simulator whose door was made to do so waits as long (in bursts 2.4 s in both, 2.2 s where it
doesn't; with loss 0.8 s, and 0.6 s; it isn't in the record). The router has told the two apart since
3ad18a1; the runs here are older. As they come, a site's backlog still counts what is crossing: at 0.9 that
sends out 4 points fewer, and costs 4% at P90, nothing in the mean, by the same simulator, and the testbed
shows as much. What is lost at a transfer's end takes its own number of round trips, where the simulator
adds the mean. With 1% loss BBR's four streams fill the queue before the link, which then drops 13% more
(15% in the simulator, from BBR's own gains).

"""
K_ONCE = """\
Each part ran once on the testbed, over some hundreds of requests: it has no intervals there, and a ratio of
two parts is uncertain by some percents.

"""
K_SHARED = """\
Code that both worlds share: the policies with their prices and queues (routing/), the profiles' curves, the
drawing of requests (workload/), and on the link the order of sending (transfer/order). Not shared: the
router's picture of its servers, the instances' scheduler and cache (the testbed has its own), the protocol,
HTTP, sockets, TLS. The link's ledger, which the simulator asks, isn't asked on the testbed.
"""


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """TTFT's distribution in both worlds, a panel a part."""
    rows = data["rows"]
    names = _parts(rows)
    across = min(4, len(names))
    figure, axes = new_figure(-(-len(names) // across), across, width=3.2, height=2.6)
    drawn: list[list[Any]] = []
    for part, panel in zip(names, axes, strict=False):
        for world, colour in (("testbed", "#0072B2"), ("simulator", "#E69F00")):
            row = next(
                (
                    one
                    for one in rows
                    if one["part"] == part and one["world"] == world and one.get("requests_rows")
                ),
                None,
            )
            if row is None:
                continue
            ttft = worlds.Played.of_plain(row["requests_rows"])["ttft_s"] * row["time_scale"]
            ttft = np.sort(ttft[~np.isnan(ttft)])
            share = np.arange(1, len(ttft) + 1) / len(ttft)
            panel.plot(ttft, share, color=colour, label=world)
            for q in (0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
                drawn.append([part, world, q, round(float(np.quantile(ttft, q)), 4)])
        panel.set(title=part, xlabel="TTFT, s", ylim=(0, 1), xlim=(0, None))
    for panel in axes[len(names) :]:
        panel.set_visible(False)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(loc="lower right")
    paths = save(figure, folder, "testbed", ["part", "world", "quantile", "TTFT, s"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece(
    "testbed",
    "On the testbed, and in the simulator",
    measure,
    goals,
    draw,
    tell,
    gather,
    resimulated=resimulated,
)
