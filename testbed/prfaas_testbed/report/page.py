"""index.html (and page.png) of a run: what was run on what, the checks, the table, the figures, what isn't
shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape

from prfaas.config.run import Run, read_run
from prfaas_testbed.experiment.checks import judge
from prfaas_testbed.experiment.table import summary_lines
from prfaas_testbed.experiment.view import View, field
from prfaas_testbed.report.figures import draw_figures
from prfaas_testbed.report.overview import draw_overview
from prfaas_testbed.report.sheet import draw_sheet

K_PAGE, K_SHEET = "index.html", "page.png"


def draw_run(folder: Path) -> Path:
    """Figures and page of the run in `folder`, beside its run.json; the page's path."""
    run = read_run(folder)
    figures = draw_figures(run, folder / "figures")
    parts: list[str | None] = [*run.parts] or [None]
    for part in parts:
        models = dict.fromkeys(row.model for row in View(run, part).requests())
        for model in models:
            name = "-".join(word for word in ("overview", part, model) if word)
            figures += draw_overview(run, folder / "figures", part, model, name)
    shown = sorted((path for path in figures if path.suffix == ".png"), key=_order)
    draw_sheet(run, judge(run), shown, folder / K_SHEET)
    page = folder / K_PAGE
    page.write_text(render(run, [p for p in figures if p.suffix == ".svg"], folder), encoding="utf-8")
    return page


def render(run: Run, figures: list[Path], folder: Path) -> str:
    environment = Environment(
        loader=PackageLoader("prfaas_testbed.report"), autoescape=select_autoescape(), trim_blocks=True
    )
    extra: dict[str, Any] = run.model_extra or {}
    topology = extra.get("topology") or {}
    return environment.get_template("page.html").render(
        run=run,
        checks=judge(run),
        summary="\n".join(summary_lines(run)),
        figures=[path.relative_to(folder).as_posix() for path in sorted(figures, key=_order)],
        definition=yaml.safe_dump(run.definition, sort_keys=False, allow_unicode=True),
        topology=yaml.safe_dump(topology, sort_keys=False, allow_unicode=True) if topology else "",
        scale_text=(topology.get("scale") or {}).get("text", ""),
        wall_s=extra.get("wall_s"),
        events=[row for row in View(run).events() if row.event not in ("load", "watch", "accounting")],
        accounting=[
            row.model_extra | {"at_s": row.at_s} for row in View(run).events("accounting") if row.model_extra
        ],
        watched=View(run).events("watch"),
        field=field,
    )


def _order(path: Path) -> tuple[int, str]:
    for place, word in enumerate(("overview", "ttft", "links", "transfers")):
        if word in path.stem:
            return place, path.stem
    return 9, path.stem
