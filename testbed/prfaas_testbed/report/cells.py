"""The cells of a set's grid: which case on which network, how it ended, and the few figures that a cell has
room for; all from the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prfaas.config.run import CheckRow, Run
from prfaas_testbed.experiment.metrics import K_METRICS, Unsupported
from prfaas_testbed.experiment.view import View, field
from prfaas_testbed.report.figures import first_links_and_events

K_GRID_PARTS = 6  # a set of more parts than this is shown as a grid
K_BIN_S = 0.5
K_FIGURES = (
    ("goodput_mbps", "goodput", "{:.1f} Mbit/s"),
    ("payload_bytes", "moved", "{:.1f} MB"),
    ("wire_goodput_mbps", "on the wire", "{:.1f} Mbit/s"),
    ("ttft_p50_s", "TTFT median", "{:.2f} s"),
    ("ttft_p99_s", "p99", "{:.2f} s"),
)


@dataclass(frozen=True)
class Cell:
    """One part of a set."""

    part: str
    case: str
    network: str
    outcome: str
    """`failed` where any check failed, `unsupported` where none could be judged, `passed`, or `missing`."""
    faults: tuple[str, ...]
    """What failed or could not be judged, and why."""
    answered: str
    figures: tuple[tuple[str, str], ...]
    """(what, value with its unit)."""
    edges_s: tuple[float, ...] = ()
    mbps: tuple[float, ...] = ()
    """The busiest direction's throughput in each bin of `edges_s`."""
    events: tuple[tuple[float, str], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.case} over {self.network}"


def is_grid(run: Run) -> bool:
    return len(_planned(run)) > K_GRID_PARTS


def cells_of(run: Run, checks: Sequence[CheckRow]) -> list[Cell]:
    """A cell for every part that was to be run, in the set's order."""
    return [
        _cell(run, part, [row for row in checks if row.name.startswith(f"{part}/")]) for part in _planned(run)
    ]


def axes_of(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """(cases, networks), each in the order of its first cell."""
    return list(dict.fromkeys(c.case for c in cells)), list(dict.fromkeys(c.network for c in cells))


def _planned(run: Run) -> list[str]:
    return list((run.model_extra or {}).get("parts_planned") or run.parts)


def _cell(run: Run, part: str, checks: Sequence[CheckRow]) -> Cell:
    definition = (run.definition.get("parts") or {}).get(part)
    network = str(definition["network"]) if definition else _guess(run, part)
    case = part.removeprefix(f"{network}-")
    faults = tuple(
        f"{row.name.partition('/')[2]}: {row.reason or f'{row.value}, wanted {row.wanted}'}"
        for row in checks
        if row.outcome != "passed"
    )
    if part in ((run.model_extra or {}).get("stopped_parts") or {}):
        # What its rows would have said isn't known: why it was stopped is all there is to say.
        faults = faults[:1]
    if part not in run.parts:
        return Cell(part, case, network, "missing", faults, "", ())
    outcomes = {row.outcome for row in checks}
    outcome = "failed" if "failed" in outcomes else "passed" if "passed" in outcomes else "unsupported"
    view = View(run, part)
    rows = view.requests()
    answered = f"{sum(row.error is None and row.e2e_s is not None for row in rows)}/{len(rows)}"
    edges, mbps, events = _busiest(view)
    return Cell(part, case, network, outcome, faults, answered, _figures(view), edges, mbps, events)


def _guess(run: Run, part: str) -> str:
    """The network of a part that hasn't run: its definition isn't in the record, its neighbours' are."""
    known = {str(d["network"]) for d in (run.definition.get("parts") or {}).values()}
    return next((name for name in sorted(known, key=len, reverse=True) if part.startswith(f"{name}-")), "")


def _figures(view: View) -> tuple[tuple[str, str], ...]:
    found = []
    for name, label, form in K_FIGURES:
        try:
            value = float(K_METRICS[name].compute(view))
        except Unsupported:
            continue
        if not value:
            continue
        found.append((label, form.format(value / 1e6 if name.endswith("_bytes") else value)))
    return tuple(found)


def _busiest(view: View) -> tuple[tuple[float, ...], tuple[float, ...], tuple[tuple[float, str], ...]]:
    models = list(dict.fromkeys(row.model for row in view.requests()))
    if not models:
        return (), (), ()
    links, events = first_links_and_events(view, models[0])
    marks = tuple((row.at_s, row.event) for row in events if not field(row, "skipped"))
    total: dict[str, int] = {}
    for row in links:
        total[row.link] = total.get(row.link, 0) + row.bytes
    if not total:
        return (), (), marks
    name = max(total, key=lambda link: total[link])
    points = [row for row in links if row.link == name and row.at_s >= 0]
    if not points:
        return (), (), marks
    edges = np.arange(0.0, points[-1].at_s + K_BIN_S, K_BIN_S)
    if len(edges) < 2:
        return (), (), marks
    bits, _ = np.histogram([row.at_s for row in points], edges, weights=[row.bytes * 8.0 for row in points])
    return tuple(edges.tolist()), tuple((bits / K_BIN_S / 1e6).round(2).tolist()), marks


def trouble(definition: Mapping[str, Any]) -> list[str]:
    """What an experiment does to its network and servers, a line an event."""
    lines = []
    for event in definition.get("timeline") or ():
        words = dict(event)
        what, at_s, for_s = (
            str(words.pop("do")).replace("_", " "),
            words.pop("at_s"),
            words.pop("for_s", None),
        )
        change = words.pop("set", None)
        details = [*_words(words), *(_words(change) if change else ())]
        length = f" for {for_s:g} s" if for_s is not None else ""
        lines.append(f"{what} at {at_s:g} s{length}: {', '.join(details)}")
    return lines or ["nothing: the load alone"]


def _words(fields: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found.append(f"{name.replace('_', ' ')} {', '.join(_words(value))}")
        else:
            found.append(
                f"{name.replace('_', ' ')} {value:g}"
                if isinstance(value, float)
                else f"{name.replace('_', ' ')} {value}"
            )
    return found
