"""The report of evaluated runs as one page, and figures from results."""

from eat_dist.report.page import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
