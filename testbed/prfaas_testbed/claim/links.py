"""Piece `links`: round trips, loss, flaps, cross-traffic and an asymmetric net, beside the best policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prfaas.config.policy import PolicyConfig
from prfaas.figures import new_figure, save
from prfaas_testbed.claim.judge import Goal, Mean, Piece, column, mean, ratios, table
from prfaas_testbed.claim.runs import Outcome, at_rate, parts, play, requests_of

K_CAPACITY_RPS = 3.2  # the plan's with a clean link
K_LOADS = {"within": 0.85, "beyond": 1.08}
K_GRACE_S = 30.0
K_GOAL = 0.95
K_OURS = ("prices-arrival", "prices")
K_WHY_COME = (
    "with cross-traffic 1.3 times as much comes as can be carried, and queues grow to the end. The estimate "
    "of the link isn't why: ours carries more there than any threshold (above). A threshold lets one site's "
    "queue grow alone while the other's requests are in time; ours shares the wait, which answers more, and "
    "later than their deadlines. Tried: whoever is late anyway goes to the queue that is lost already. Then "
    "35% are in time where 26% were (37% by the threshold; two seeds), with flaps 60% where 51% were; but "
    "once 5 Gbit/s are left 1.29 req/s are carried in place of 1.67, for short prompts fill the link, which "
    "long ones make more of (one seed). Kept to prompts that the link is best used for, it loses nothing and "
    "gains 2 points. Thirteen other costs of being late did no better. What must be in time in an overload "
    "takes service by deadline"
)


def _policies() -> dict[str, PolicyConfig]:
    fixed = {
        f"t {tokens // 1000}K": PolicyConfig(name="paper", regime="scarce", threshold_tokens=tokens)
        for tokens in (19_600, 40_000)
    }
    return {
        **fixed,
        "prices-arrival": PolicyConfig(name="prices"),
        "prices": PolicyConfig(name="prices", service="deadline"),
    }


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Each condition in and beyond capacity, under every policy."""
    rows: list[dict[str, Any]] = []
    for part, experiment in parts("claim-links"):
        for mode, load in K_LOADS.items():
            offered = at_rate(experiment, load * K_CAPACITY_RPS)
            for repetition in range(repetitions):
                requests = requests_of(offered, repetition)
                for name, policy in _policies().items():
                    if mode == "beyond" and name == "prices":
                        continue  # it answers short prompts first, which is more of them
                    found = play(offered, repetition, requests=requests, policy=policy)
                    rows.append(
                        {
                            "part": part,
                            "mode": mode,
                            "repetition": repetition,
                            "seed": experiment.seed,
                            "policy": name,
                            "first_tokens_rps": _rate_rps(found),
                            **found.figures(),
                        }
                    )
        carried, kept = _against(rows, part)
        say(f"{part}: {carried.text(3)} of the best threshold's rate, SLO {kept.text(1, percent=True)} more")
    return {"rows": rows}


def _rate_rps(outcome: Outcome) -> float:
    """First tokens a second while requests come, the beginning left out."""
    record = outcome.record
    began = (np.asarray(record.arrival_s) + np.asarray(record.ttft_s))[np.asarray(record.error) == 0]
    end_s = outcome.requests[-1].arrival_s
    return float(((began >= K_GRACE_S) & (began < end_s)).sum() / (end_s - K_GRACE_S))


def _best(rows: list[dict[str, Any]], part: str, mode: str, field: str) -> list[float]:
    """What the best of the others has, repetition by repetition."""
    names = {row["policy"] for row in rows if row["part"] == part and row["mode"] == mode} - set(K_OURS)
    found = [column(rows, field, part=part, mode=mode, policy=name) for name in sorted(names)]
    return [max(values) for values in zip(*found, strict=True)]


def _against(rows: list[dict[str, Any]], part: str) -> tuple[Mean, Mean]:
    """Ours beyond capacity, as a share of the best's rate; and what it has more within the SLO below."""
    ours = column(rows, "first_tokens_rps", part=part, mode="beyond", policy="prices-arrival")
    return ratios(ours, _best(rows, part, "beyond", "first_tokens_rps")), _more(rows, part, "prices")


def _more(rows: list[dict[str, Any]], part: str, policy: str) -> Mean:
    """Share of the requests within the SLO, less the best other's."""
    kept = column(rows, "within_slo", part=part, mode="within", policy=policy)
    best = _best(rows, part, "within", "within_slo")
    return mean(a - b for a, b in zip(kept, best, strict=True))


def _parts(data: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["part"] for row in data["rows"]))


def goals(data: dict[str, Any]) -> list[Goal]:
    found = {part: _against(data["rows"], part) for part in _parts(data)}
    as_they_come = {part: _more(data["rows"], part, "prices-arrival") for part in _parts(data)}
    mine = [row for row in data["rows"] if row["policy"] in K_OURS]
    lost, failed = sum(row["lost"] for row in mine), sum(row["failed"] for row in mine)
    return [
        Goal(
            "beyond capacity, ours carries at least 0.95 of the best threshold for each condition",
            "; ".join(f"{part} {carried.text(3)}" for part, (carried, _) in found.items()),
            all(carried.value >= K_GOAL for carried, _ in found.values()),
        ),
        Goal(
            "at 0.85 of the clean link's capacity, ours has at least as many requests within the SLO as the "
            "best policy for each condition, served by deadline",
            "; ".join(f"{part} {kept.value:+.1%}" for part, (_, kept) in found.items()),
            all(kept.value >= 0 for _, kept in found.values()),
        ),
        Goal(
            "at 0.85, ours has at least as many requests within the SLO as the best policy, all as they come",
            "; ".join(f"{part} {kept.value:+.1%}" for part, kept in as_they_come.items()),
            all(kept.value >= 0 for kept in as_they_come.values()),
            K_WHY_COME,
        ),
        Goal(
            "no request lost, none answered with an error",
            f"{lost} lost, {failed} errors",
            lost + failed == 0,
        ),
    ]


def tell(data: dict[str, Any]) -> str:
    rows, lines = data["rows"], []
    for part in _parts(data):
        carried, _ = _against(rows, part)
        lines.append(
            [
                part,
                mean(_best(rows, part, "beyond", "first_tokens_rps")).text(),
                mean(column(rows, "first_tokens_rps", part=part, mode="beyond", policy=K_OURS[0])).text(),
                carried.text(3),
                mean(_best(rows, part, "within", "within_slo")).text(1, percent=True),
                *(
                    mean(column(rows, "within_slo", part=part, mode="within", policy=name)).text(
                        1, percent=True
                    )
                    for name in K_OURS
                ),
            ]
        )
    head = [
        "condition", "best other, req/s", "ours, as they come", "ours / best",
        "best other within SLO", "ours, as they come", "ours, by deadline",
    ]  # fmt: skip
    return (
        table(head, lines)
        + f"""
The 1T case over 15 Gbit/s and 20 ms, a little more than it needs, each condition from the start (flaps: 5 s
up, 2 s down). First tokens a second at {K_LOADS["beyond"]:g}, requests within the SLO at
{K_LOADS["within"]:g} of what the plan says with a clean link. *Best other* is, for each condition and seed,
the best of the report's policy at thresholds of 19.6K and 40K: nobody could choose it beforehand. Bursty loss
isn't told from random loss by the simulator's links, and isn't played. The
rate is judged in order of arrival, as the thresholds are. Loss is a ceiling on what four streams reach here,
and at a transfer's end the mean wait for what is lost of its last round trip, of that which their queue drops
as well; cross-traffic takes half the link; in *three-sites* the nearer PrfaaS site has H20 and the farther
one H200.

While the link is down what is under way waits, as pumps do: streams find it back with their next
retransmission, or are replaced after 1.5 s, and the door gives an attempt up after 10 s or four times what it
predicted. Held against the six outages of the testbed's matrix (1 and 2 s, three networks, 30 requests each,
no router): all are answered in both worlds; the simulator's TTFT mean is off by -27 to +15%, by 6% or less
in three of them, and its P90 by 4% or less in four, and by a third up and down in two.
"""
    )


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """Rates and shares within the SLO by condition."""
    figure, (rate, slo) = new_figure(1, 2, width=5.2, height=3.4)
    rows, names = data["rows"], _parts(data)
    place = np.arange(len(names))
    drawn: list[list[Any]] = []
    for axis, mode, field, label in (
        (rate, "beyond", "first_tokens_rps", "First tokens, req/s"),
        (slo, "within", "within_slo", "Requests within the SLO"),
    ):
        for shift, (name, said, colour) in enumerate(
            (("", "best other", "#56B4E9"), (K_OURS[0], "ours, as they come", "#D55E00"),
             (K_OURS[1], "ours, by deadline", "#0072B2"))
        ):  # fmt: skip
            if (name, mode) == ("prices", "beyond"):
                continue
            means = [
                mean(
                    column(rows, field, part=part, mode=mode, policy=name)
                    if name
                    else _best(rows, part, mode, field)
                )
                for part in names
            ]
            axis.bar(
                place + 0.27 * (shift - 1), [one.value for one in means], 0.26, label=said, color=colour,
                yerr=[one.half for one in means], error_kw={"linewidth": 0.8},
            )  # fmt: skip
            drawn += [[part, said, mode, one.value, one.half] for part, one in zip(names, means, strict=True)]
        axis.set_xticks(place, names, rotation=40, ha="right")
        axis.set(ylabel=label)
    rate.set(title="Beyond capacity")
    slo.set(title="At 0.85 of the clean link's capacity", ylim=(0, 1.03))
    slo.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    paths = save(figure, folder, "links", ["condition", "policy", "load", "mean", "half"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece("links", "Unhealthy links", measure, goals, draw, tell)
