"""run.json and plans to PNG, SVG and CSV. `style` is shared by every figure of the project."""

from prfaas.figures.style import K_KINDS, Series, new_figure, numbered, save, series

__all__ = ["K_KINDS", "Series", "new_figure", "numbered", "save", "series"]
