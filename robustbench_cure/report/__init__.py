"""What records look like to people: tables, figure, HTML page, CSV, Markdown, LaTeX, terminal."""

from robustbench_cure.report.render import render_report, write_reports
from robustbench_cure.report.terminal import terminal_table

__all__ = ["render_report", "terminal_table", "write_reports"]
