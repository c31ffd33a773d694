"""page.png: the page as one picture, for places that show no HTML: what was run, its checks, its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from prfaas.config.run import CheckRow, Run
from prfaas_testbed.experiment.table import check_lines, summary_lines

K_WIDTH_PX = 1400
K_DPI = 120
K_LINE_INCHES = 0.165
K_MOST_LINES = 90
K_GAP_PX = 16


def draw_sheet(run: Run, checks: Sequence[CheckRow], figures: Sequence[Path], target: Path) -> Path:
    """Stack the text and the PNGs of `figures`, all of one width."""
    text = target.with_name(".sheet-text.png")
    _text(run, checks, text)
    try:
        images = [_fitted(path) for path in (text, *figures)]
    finally:
        text.unlink(missing_ok=True)
    height = sum(image.height + K_GAP_PX for image in images)
    sheet = Image.new("RGB", (K_WIDTH_PX, height), "white")
    at = 0
    for image in images:
        sheet.paste(image, ((K_WIDTH_PX - image.width) // 2, at))
        at += image.height + K_GAP_PX
    sheet.save(target, optimize=True)
    return target


def _fitted(path: Path) -> Image.Image:
    """Never wider than the sheet; small figures keep their size."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image.width > K_WIDTH_PX:
        image = image.resize((K_WIDTH_PX, round(image.height * K_WIDTH_PX / image.width)))
    return image


def _text(run: Run, checks: Sequence[CheckRow], target: Path) -> None:
    lines = [*summary_lines(run), "", *check_lines(checks)]
    if len(lines) > K_MOST_LINES:
        lines = [*lines[:K_MOST_LINES], f"… and {len(lines) - K_MOST_LINES} lines more, in index.html"]
    inches = K_WIDTH_PX / K_DPI
    height = 0.9 + K_LINE_INCHES * len(lines)
    figure = Figure(figsize=(inches, height))
    figure.text(0.02, 1 - 0.3 / height, run.experiment, fontsize=15, fontweight="bold", va="top")
    about = f"{run.started}   {run.emulation} emulation, scale {run.scale:g}   commit {run.commit[:12]}"
    figure.text(0.02, 1 - 0.6 / height, about, fontsize=8.5, color="#5a6472", va="top")
    figure.text(
        0.02, 1 - 0.9 / height, "\n".join(lines), fontsize=8, family="monospace", va="top", linespacing=1.2
    )
    figure.savefig(target, dpi=K_DPI, metadata={"Software": None})
