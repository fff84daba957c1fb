"""The report of evaluated runs or of a sweep as one page, and figures from results."""

from eat_dist.report.page import ReportFiles, write_report
from eat_dist.report.sweeps.page import sweep_figures

__all__ = ["ReportFiles", "sweep_figures", "write_report"]
