"""A capacity search as a picture: what share of each trial kept the SLO, by rate."""

from __future__ import annotations

from pathlib import Path

from prfaas.config.run import Run
from prfaas.figures import new_figure, numbered, save
from prfaas_testbed.experiment.view import View, number


def draw_trials(run: Run, folder: Path, part: str | None, model: str, name: str) -> list[Path]:
    """Nothing where no capacity was searched for."""
    view = View(run, part, model)
    trials = view.events("capacity")
    if not trials:
        return []
    definition = run.definition if part is None else run.definition["parts"][part]
    wanted = float((definition.get("capacity") or {}).get("slo_share", 0.9))
    rows = [(number(row, "rate_rps") or 0.0, number(row, "slo_share") or 0.0) for row in trials]
    held, broken = (number(trials[-1], key) for key in ("held_rps", "broken_rps"))
    figure, (ax,) = new_figure()
    good, bad = numbered(2, "a trial that held"), numbered(1, "a trial that didn't")
    for look, points in (
        (good, [point for point in rows if point[1] >= wanted]),
        (bad, [point for point in rows if point[1] < wanted]),
    ):
        if points:
            ax.plot(*zip(*points, strict=True), **look.kwargs() | {"linestyle": ""})
    ax.axhline(wanted, color="#5a6472", linewidth=0.9, linestyle="--", label=f"wanted: {wanted:g}")
    if held is not None and broken is not None:
        ax.axvspan(held, broken, color="#e6e9ee", label=f"capacity: {held:.3g} to {broken:.3g} requests/s")
    ax.set(title=model, xlabel="requests/s", ylabel="share within the SLO", xlim=(0, None), ylim=(0, 1.05))
    ax.legend(loc="lower left")
    return save(figure, folder, name, ["rate_rps", "slo_share"], rows)
