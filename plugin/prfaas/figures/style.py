"""The look of all figures, and the way each is written: PNG, SVG and the CSV of what is drawn."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

K_MARKERS = "osD^vPX*"
K_DPI = 150
K_KINDS = ("png", "svg", "csv")
K_RC: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "svg.hashsalt": "prfaas",  # the same figure gives the same file
}
# For the whole process: matplotlib reads these while drawing, not only when an axis is made.
cast(Any, matplotlib.rcParams).update(K_RC)


@dataclass(frozen=True)
class Series:
    """How one series looks."""

    label: str
    colour: str
    marker: str
    line: str

    def kwargs(self, *, markers: bool = True, label: str | None = None) -> dict[str, Any]:
        """Arguments for Axes.plot."""
        return {
            "label": self.label if label is None else label,
            "color": self.colour,
            "linestyle": self.line,
            "marker": self.marker if markers else "",
        }


@cache
def _style() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(files("prfaas.figures").joinpath("style.yaml").read_text())
    return loaded


def series(name: str) -> Series:
    """The look of a series by name. One that style.yaml doesn't list gets a colour, always the same."""
    listed = _style()["series"].get(name)
    if listed is not None:
        return Series(**listed)
    return numbered(sum(name.encode()), name)


def numbered(place: int, label: str) -> Series:
    """The look of the place-th of several series that have no names of their own."""
    colours = _style()["others"]
    return Series(label, colours[place % len(colours)], K_MARKERS[place % len(K_MARKERS)], "-")


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 4.6, height: float = 3.2, **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    """A figure in our look and its axes, row by row; `width` and `height` of one panel, inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def save(
    figure: Figure,
    folder: Path,
    name: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    kinds: Sequence[str] = K_KINDS,
) -> list[Path]:
    """Write NAME.png, NAME.svg and NAME.csv, the last with the numbers that are drawn; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in kinds]
    # Lay out once, not once a file: it is most of the time.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for path in paths:
        if path.suffix == ".png":
            figure.savefig(path, dpi=K_DPI, metadata={"Software": None})
        elif path.suffix == ".svg":
            figure.savefig(path, metadata={"Date": None})
        else:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(["" if value is None else value for value in row] for row in rows)
    return paths
