"""One self-contained HTML page of runs: `write_page`."""

from fillm.report.page.writing import LARGEST, plotly_script, write_page

__all__ = ["LARGEST", "plotly_script", "write_page"]
