"""The page of a run, its figures, and two runs side by side; all from run.json alone."""

from prfaas_testbed.report.compare import compare_lines
from prfaas_testbed.report.page import draw_run

__all__ = ["compare_lines", "draw_run"]
