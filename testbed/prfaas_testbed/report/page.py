"""index.html (and page.png) of a run: what was run on what, the checks, the table, the figures, what isn't
shown. A set of many parts is a grid with a page a cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from prfaas.config.run import CheckRow, Run, read_run
from prfaas_testbed.experiment.checks import judge
from prfaas_testbed.experiment.table import block, summary_lines
from prfaas_testbed.experiment.view import View, field
from prfaas_testbed.experiment.wire import pairs, partial
from prfaas_testbed.report.cells import axes_of, cells_of, is_grid, trouble
from prfaas_testbed.report.figures import draw_figures
from prfaas_testbed.report.grid import count_lines, draw_grid, spark
from prfaas_testbed.report.overview import draw_overview
from prfaas_testbed.report.sheet import draw_sheet
from prfaas_testbed.report.trials import draw_trials

K_PAGE, K_SHEET, K_CELLS = "index.html", "page.png", "cells"
K_UNSEEN = ("load", "watch", "accounting", "packets", "capture", "cost")


def draw_run(folder: Path) -> Path:
    """Figures and page of the run in `folder`, beside its run.json; the page's path."""
    run = read_run(folder)
    if is_grid(run):
        return _draw_set(run, folder)
    figures = draw_figures(run, folder / "figures")
    parts: list[str | None] = [*run.parts] or [None]
    for part in parts:
        models = dict.fromkeys(row.model for row in View(run, part).requests())
        for model in models:
            name = "-".join(word for word in ("overview", part, model) if word)
            figures += draw_overview(run, folder / "figures", part, model, name)
            trials = name.replace("overview", "capacity", 1)
            figures += draw_trials(run, folder / "figures", part, model, trials)
    shown = sorted((path for path in figures if path.suffix == ".png"), key=_order)
    checks = judge(run)
    draw_sheet(run, checks, shown, folder / K_SHEET)
    page = folder / K_PAGE
    page.write_text(render(run, checks, [p for p in figures if p.suffix == ".svg"], folder), encoding="utf-8")
    return page


def _draw_set(run: Run, folder: Path) -> Path:
    """The grid, a page a cell, and the grid as a picture."""
    checks = judge(run)
    cells = cells_of(run, checks)
    cases, networks = axes_of(cells)
    own = (run.model_extra or {}).get("part_runs") or {}
    definitions = run.definition.get("parts") or {}
    about_case = {c.case: trouble(definitions[c.part]) for c in reversed(cells) if c.part in definitions}
    about_network = {
        c.network: (own[c.part].get("topology") or {}).get("text", "") for c in cells if c.part in own
    }
    (folder / K_CELLS).mkdir(exist_ok=True)
    for cell in cells:
        if cell.outcome == "missing":
            continue
        figures = []
        for model in dict.fromkeys(row.model for row in View(run, cell.part).requests()):
            # One small picture a cell: with all of them a set of forty cells would be many megabytes.
            figures += draw_overview(
                run, folder / K_CELLS, cell.part, model, f"{cell.part}-{model}", cell.title, kinds=("svg",)
            )
        mine = [row for row in checks if row.name.startswith(f"{cell.part}/")]
        page = render(run, mine, figures, folder / K_CELLS, cell.part, cell.title)
        (folder / K_CELLS / f"{cell.part}.html").write_text(page, encoding="utf-8")
    text = (
        _templates()
        .get_template("grid.html")
        .render(
            run=run,
            checks=checks,
            cases=cases,
            networks=networks,
            counts=count_lines(cells),
            places={(cell.case, cell.network): cell for cell in cells},
            sparks={cell.part: Markup(spark(cell)) for cell in cells},
            about_case={case: about_case.get(case, []) for case in cases},
            about_network={network: about_network.get(network, "") for network in networks},
            part_runs={part: own[part] for part in run.parts if part in own},
            wall_s=(run.model_extra or {}).get("wall_s") or 0.0,
        )
    )
    draw_grid(run, cells, folder / K_SHEET)
    target = folder / K_PAGE
    target.write_text(text, encoding="utf-8")
    return target


def render(
    run: Run,
    checks: Sequence[CheckRow],
    figures: Sequence[Path],
    folder: Path,
    part: str | None = None,
    title: str = "",
) -> str:
    """The page of a whole run, or of one part of a set."""
    extra: dict[str, Any] = run.model_extra or {}
    own: dict[str, Any] = (extra.get("part_runs") or {}).get(part) or {}
    topology = own.get("topology") or extra.get("topology") or {}
    view = View(run, part)
    definition = run.definition if part is None else run.definition["parts"][part]
    return (
        _templates()
        .get_template("page.html")
        .render(
            run=run,
            title=f"{run.experiment}: {title}" if title else run.experiment,
            above=f"../{K_PAGE}" if part is not None else "",
            trouble=trouble(definition) if part is not None else [],
            description=run.description if part is None else definition.get("description", ""),
            started=own.get("started", run.started),
            commit=own.get("commit", run.commit),
            scale=own.get("scale", run.scale),
            repetitions=len({index for index, _ in view.repetitions()}) if part else len(run.repetitions),
            void=[row for row in run.void if part is None or field(row, "part") == part],
            calibration=view.calibration(),
            checks=checks,
            summary="\n".join(summary_lines(run) if part is None else block(view)),
            figures=[path.relative_to(folder).as_posix() for path in sorted(figures, key=_order)],
            definition=yaml.safe_dump(definition, sort_keys=False, allow_unicode=True),
            topology=yaml.safe_dump(topology, sort_keys=False, allow_unicode=True) if topology else "",
            scale_text=(topology.get("scale") or {}).get("text", ""),
            wall_s=own.get("wall_s", extra.get("wall_s")),
            events=[row for row in view.events() if row.event not in K_UNSEEN],
            accounting=[
                row.model_extra | {"at_s": row.at_s} for row in view.events("accounting") if row.model_extra
            ],
            wire=[(*pair, partial(*pair)) for pair in pairs(view)],
            costs=view.events("cost"),
            watched=view.events("watch"),
            field=field,
            order_lines=order_lines,
        )
    )


def order_lines(order: Sequence[Sequence[Any]]) -> list[str]:
    """What became of connections, a line each; what was the same again for a port isn't told again."""
    lines: list[str] = []
    last: dict[int, str] = {}
    for at_s, what, port in order:
        if last.get(port) != what:
            lines.append(f"{at_s:8.3f} s  {what}  port {port}")
        last[port] = what
    return lines


def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("prfaas_testbed.report"), autoescape=select_autoescape(), trim_blocks=True
    )


def _order(path: Path) -> tuple[int, str]:
    for place, word in enumerate(("capacity", "overview", "ttft", "links", "transfers")):
        if word in path.stem:
            return place, path.stem
    return 9, path.stem
