"""run.json and plans to PNG, SVG and CSV. `style` is shared by every figure of the project."""

from prfaas.figures.style import Series, new_figure, numbered, save, series

__all__ = ["Series", "new_figure", "numbered", "save", "series"]
