"""The report that a person reads: one HTML file that needs nothing else, and the same in Markdown."""

from fcos_deploy.report.data import ReportData, ReportFile, ReportVariant
from fcos_deploy.report.render import write_report

__all__ = ["ReportData", "ReportFile", "ReportVariant", "write_report"]
