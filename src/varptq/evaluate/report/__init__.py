"""The report: what was measured, as one HTML file that needs nothing else to be read."""

from varptq.evaluate.report.gallery import choose_pairs
from varptq.evaluate.report.page import render, write_report

__all__ = ["choose_pairs", "render", "write_report"]
