"""A set as a grid, cases by networks: small multiples for the picture, small lines for the page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prfaas.config.run import Run
from prfaas_testbed.report.cells import Cell, axes_of

K_DPI = 110
K_LONGEST = 2.0  # times the median cell
K_ROOM = 1.4  # of the time axis: the text stands right of the data
K_CELL_INCHES = (3.9, 1.28)
K_COLOURS = {"passed": "#1a7f37", "failed": "#b02a30", "unsupported": "#8a6d00", "missing": "#8a94a3"}
K_TINTS = {"passed": "#f1f8f3", "failed": "#fdecec", "unsupported": "#fbf6e5", "missing": "#f5f7fa"}
K_LINE = "#2f6db3"
K_SPARK = (150.0, 26.0)  # pixels


def draw_grid(run: Run, cells: Sequence[Cell], target: Path) -> Path:
    """One PNG: a panel a cell with its busiest link over time, marked where something was done to it."""
    cases, networks = axes_of(cells)
    width, height = K_CELL_INCHES[0] * len(networks), K_CELL_INCHES[1] * len(cases) + 1.0
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(cases), len(networks), squeeze=False)
    by_place = {(cell.case, cell.network): cell for cell in cells}
    lengths_s = [_busy_s(cell) for cell in cells if cell.edges_s] or [1.0]
    # One time axis for all; a cell that took very much longer is cut, and hides no other.
    most_s = min(max(lengths_s), K_LONGEST * statistics.median(lengths_s))
    for i, case in enumerate(cases):
        for j, network in enumerate(networks):
            ax = axes[i, j]
            cell = by_place.get((case, network))
            if cell is None:
                ax.set_axis_off()
                continue
            _panel(ax, cell)
            ax.set_xlim(0, K_ROOM * most_s)
            if i == len(cases) - 1:
                ax.set_xlabel("since the load's start, s", fontsize=7.5)
            if j == 0:
                ax.set_ylabel("Mbit/s", fontsize=7.5)
    counts = count_lines(cells)
    about = f"{run.started}   {run.emulation} emulation   commit {run.commit}"
    figure.suptitle(f"{run.experiment}: {counts}\n", x=0.01, ha="left", fontsize=14, fontweight="bold")
    figure.text(0.011, 1 - 0.42 / height, about[:170], fontsize=8, color="#5a6472", va="top")
    figure.savefig(target, dpi=K_DPI, metadata={"Software": None})
    return target


def _busy_s(cell: Cell) -> float:
    """Until when something went on: links are watched for a while longer."""
    moved = [
        right
        for right, mbps in zip(cell.edges_s[1:], cell.mbps, strict=False)
        if mbps > 0.01 * max(cell.mbps)
    ]
    return max([*moved, *(at_s for at_s, _ in cell.events)], default=cell.edges_s[-1])


def count_lines(cells: Sequence[Cell]) -> str:
    """For example `34 passed, 2 failed of 36`."""
    counts = [(sum(c.outcome == outcome for c in cells), outcome) for outcome in K_COLOURS]
    return ", ".join(f"{n} {outcome}" for n, outcome in counts if n) + f" of {len(cells)} cells"


def _panel(ax: Axes, cell: Cell) -> None:
    colour = K_COLOURS[cell.outcome]
    ax.set_facecolor(K_TINTS[cell.outcome])
    if cell.edges_s:
        ax.stairs(cell.mbps, cell.edges_s, color=K_LINE, fill=True, alpha=0.75)
    for at_s, name in cell.events:
        ax.axvline(at_s, color="#b02a30", linewidth=0.8, linestyle=":" if name.endswith("_end") else "--")
    ax.set_title(cell.title, fontsize=8.5, pad=3)
    figures = "  ".join(f"{label} {value}" for label, value in cell.figures[:1] + cell.figures[2:])
    ax.text(
        1.0,
        1.03,
        cell.outcome,
        transform=ax.transAxes,
        fontsize=8.5,
        fontweight="bold",
        color=colour,
        ha="right",
    )
    ax.text(
        0.99, 0.95, f"{cell.answered} answered\n" + figures.replace("  ", "\n"), transform=ax.transAxes,
        fontsize=6.5, color="#1c2430", ha="right", va="top", linespacing=1.15,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip
    ax.tick_params(labelsize=6.5, length=2)
    ax.set_ylim(0, None)
    ax.grid(alpha=0.5)


def spark(cell: Cell) -> str:
    """The cell's throughput as the points of an SVG polyline, with its events; empty where it has no rows."""
    if not cell.edges_s:
        return ""
    width, height = K_SPARK
    most, end_s = max(max(cell.mbps), 1e-9), cell.edges_s[-1]
    points = " ".join(
        f"{width * (left + right) / 2 / end_s:.1f},{height - (height - 2) * value / most:.1f}"
        for left, right, value in zip(cell.edges_s, cell.edges_s[1:], cell.mbps, strict=False)
    )
    marks = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:g}" stroke="#b02a30" stroke-dasharray="2 2"/>'
        for at_s, _ in cell.events
        if 0 <= (x := width * at_s / end_s) <= width
    )
    return (
        f'<svg width="{width:g}" height="{height:g}" role="img" aria-label="throughput over time">{marks}'
        f'<polyline points="{points}" fill="none" stroke="{K_LINE}" stroke-width="1.3"/></svg>'
    )
