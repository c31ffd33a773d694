"""Two runs side by side: every metric that both can answer, with the spread over repetitions."""

from __future__ import annotations

import numpy as np

from prfaas.config.run import Run
from prfaas.model.errors import UsageError
from prfaas_testbed.experiment.metrics import K_METRICS, Unsupported
from prfaas_testbed.experiment.view import View


def compare_lines(a: Run, b: Run) -> list[str]:
    """A table: metric, A, B, difference. Values are over all valid rows; in brackets least and most of a
    repetition. Raises UsageError where the runs share nothing."""
    lines = [
        f"A  {a.experiment}  {a.started}  {a.commit[:12]}",
        f"B  {b.experiment}  {b.started}  {b.commit[:12]}",
        "",
    ]
    groups: list[tuple[str, str | None, str | None]] = []
    parts: list[str | None] = [*a.parts] or [None]
    for part in parts:
        if part is not None and part not in b.parts:
            continue
        models = dict.fromkeys(row.model for row in View(a, part).requests())
        known = {row.model for row in View(b, part).requests()}
        groups += [(" ".join(w for w in (part, m) if w), part, m) for m in models if m in known]
    if not groups:
        a_has, b_has = (
            ", ".join(dict.fromkeys([*run.parts, *(row.model for row in View(run).requests())])) or "none"
            for run in (a, b)
        )
        raise UsageError(
            f"nothing to compare: the runs share neither part nor model; A has {a_has}, B has {b_has}"
        )
    for title, part, model in groups:
        rows = [["", "A", "B", "B / A"]]
        for item in K_METRICS.values():
            left, right = _value(a, part, model, item.name), _value(b, part, model, item.name)
            if left is None and right is None:
                continue
            ratio = f"{right / left:.3f}" if left and right is not None else ""
            label = f"{item.name}{', ' + item.unit if item.unit else ''}"
            rows.append(
                [
                    label,
                    _shown(a, part, model, item.name, left),
                    _shown(b, part, model, item.name, right),
                    ratio,
                ]
            )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines.append(title)
        for row in rows:
            first, *others = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row))
            lines.append("  " + "  ".join([first, *others]))
        lines.append("")
    return lines


def _value(run: Run, part: str | None, model: str | None, name: str) -> float | None:
    try:
        return float(K_METRICS[name].compute(View(run, part, model)))
    except Unsupported:
        return None


def _shown(run: Run, part: str | None, model: str | None, name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if len(run.repetitions) < 2:
        return f"{value:.4g}"
    each = []
    for repetition in run.repetitions:
        alone = _value(run.model_copy(update={"repetitions": [repetition]}), part, model, name)
        if alone is not None:
            each.append(alone)
    return f"{value:.4g} ({np.min(each):.4g} … {np.max(each):.4g})" if each else f"{value:.4g}"
