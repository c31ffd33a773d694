"""The table that ends a run, and the lines of its checks; all from the run's record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prfaas.config.run import CheckRow, RequestRow, Run
from prfaas_testbed.experiment.metrics import K_METRICS, Unsupported, crossed, equal_tokens
from prfaas_testbed.experiment.view import View, field, number

K_MARKS = {"passed": "pass", "failed": "FAIL", "unsupported": "n/a "}


def check_lines(rows: Sequence[CheckRow]) -> list[str]:
    width = max((len(row.name) for row in rows), default=0)
    lines = []
    for row in rows:
        value = "" if row.value is None else str(row.value)
        value = f"{row.value:g}" if isinstance(row.value, float) else value
        mark, reason = K_MARKS[row.outcome], f"  {row.reason}" if row.reason else ""
        lines.append(f"  {mark}  {row.name:<{width}}  {value:>10}  wanted {row.wanted}{reason}")
    return lines


def summary_lines(run: Run) -> list[str]:
    """Models side by side with their plain server; a set has a block a part."""
    if run.parts:
        lines = []
        for part in run.parts:
            lines += [f"{part}:", *block(View(run, part))]
        return lines
    return block(View(run))


def block(view: View) -> list[str]:
    """The models of one experiment, or of one part of a set."""
    models = list(dict.fromkeys(row.model for row in view.requests()))
    columns: list[tuple[str, View, list[RequestRow]]] = []
    for model in models:
        narrowed = View(view.run, view.part, model)
        columns.append((model, narrowed, narrowed.requests()))
        plain = list(narrowed.baseline().values())
        if plain:
            columns.append((f"{model} plain", narrowed, plain))
    rows: list[tuple[str, Callable[[View, list[RequestRow], bool], str]]] = [
        ("requests answered", lambda v, r, p: f"{sum(not x.error for x in r)}/{len(r)}"),
        ("tokens equal", lambda v, r, p: "" if p else _equal(v)),
        ("TTFT median, s", lambda v, r, p: _quantile([x.ttft_s for x in r], 0.5)),
        ("TTFT p90, s", lambda v, r, p: _quantile([x.ttft_s for x in r], 0.9)),
        ("end to end median, s", lambda v, r, p: _quantile([x.e2e_s for x in r], 0.5)),
        ("transfer median, s", lambda v, r, p: "" if p else _quantile([_transfer_s(x) for x in r], 0.5)),
        (
            "KV and state, MB",
            lambda v, r, p: "" if p else f"{sum(x.kv_bytes or 0 for x in crossed(r)) / 1e6:.2f}",
        ),
        ("goodput while moving, Mbit/s", lambda v, r, p: "" if p else _goodput(v)),
        ("WAN bytes / accounted", lambda v, r, p: "" if p else _accounted(v)),
        ("retransmitted, kB", lambda v, r, p: "" if p else _retransmitted(v)),
    ]
    cells = [["", *(name for name, _, _ in columns)]]
    for label, compute in rows:
        cells.append([label, *(compute(v, r, name.endswith(" plain")) for name, v, r in columns)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        first, *others = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row))
        lines.append("  " + "  ".join([first, *others]))
    return lines + missed_lines(view) + kept_lines(view)


def missed_lines(view: View) -> list[str]:
    """The steps of the timeline that did not happen: without that trouble the checks say less than they seem
    to, whether or not one of them is `events_missed`."""
    lines = []
    for row in view.events():
        why = field(row, "failed") or field(row, "skipped")
        if why:
            planned_s = number(row, "planned_s")
            when = f" at {planned_s:g} s" if planned_s is not None else ""
            lines.append(f"  not done: {row.event}{when}: {why}")
    return lines


def kept_lines(view: View) -> list[str]:
    """What is counted though the emulation wasn't faithful (`spoilt: keep`, or rounds)."""
    last = {row.direction: row for row in view.calibration()}  # the second time is the one that counts
    lines = [f"  {row.direction} is outside its calibration" for row in last.values() if not row.inside]
    watched = view.events("watch")
    spoilt = [row for row in watched if field(row, "spoilt") is True]
    if not spoilt:
        return lines
    reasons = field(spoilt[0], "reasons")
    why = f", the first: {reasons[0]}" if isinstance(reasons, list) and reasons else ""
    return [*lines, f"  {len(spoilt)} of {len(watched)} passes counted though the emulator spoilt them{why}"]


def _quantile(values: Sequence[float | None], q: float) -> str:
    known = [value for value in values if value is not None]
    return f"{np.quantile(known, q):.3f}" if known else "-"


def _transfer_s(row: RequestRow) -> float | None:
    start, end = number(row, "transfer_start_s"), number(row, "transfer_end_s")
    return None if start is None or end is None else end - start


def _goodput(view: View) -> str:
    try:
        return f"{K_METRICS['goodput_mbps'].compute(view):.1f}"
    except Unsupported:
        return "-"


def _equal(view: View) -> str:
    plain = view.baseline()
    if not plain:
        return "-"
    rows = view.requests()
    good = sum(equal_tokens(row, plain.get((row.model, row.id))) is True for row in rows)
    return f"{good}/{len(rows)}"


def _accounted(view: View) -> str:
    rows = view.events("accounting")
    counted = sum(number(row, "wan_bytes") or 0 for row in rows)
    accounted = sum(number(row, "accounted_bytes") or 0 for row in rows)
    return f"{counted / accounted:.4f}" if accounted else "-"


def _retransmitted(view: View) -> str:
    rows = view.events("accounting")
    found = [value for row in rows if (value := number(row, "retransmitted_bytes")) is not None]
    return f"{sum(found) / 1e3:.1f}" if found else "-"
