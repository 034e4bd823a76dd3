"""One HTML file that shows runs: tables and plots to work with, still pictures behind them, nothing from a network."""

import base64
import gzip
import hashlib
import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

import fillm
from fillm.config import to_yaml
from fillm.errors import UsageError
from fillm.report.figures.data import FigureData
from fillm.report.figures.study_names import claim_of
from fillm.report.page.looks import looks
from fillm.report.page.overview import cards, lead, run_table
from fillm.report.page.sections import FigureSection, figure_section
from fillm.report.page.tables import PageTable, page_table
from fillm.report.page.texts import breakable
from fillm.report.runs import Run

LARGEST = 5_000_000  # bytes of a page
# Rows of a table, tried in this order until the page is small enough.
_MOST_ROWS = (1000, 400, 150, 50, 15)
_LEAST_ROWS = 150  # of a table that is a figure
_LONGEST_RECORD = 20_000  # characters of a run.yaml
_TITLES = {"ranking": "Ranking", "samples": "Samples", "log": "Log", "rows": "Rows", "per_sample": "Scores by sample"}
_NOT_SHOWN = ("tensors",)  # for programs


def write_page(
    path: str | os.PathLike[str],
    runs: Sequence[Run],
    figures: Sequence[FigureData],
    title: str,
    theme: Literal["auto", "light", "dark"] = "auto",
) -> None:
    """Writes the page; the same bytes for the same arguments.

    The page works from a file and asks for nothing: plotly is inside, packed, and a Content-Security-Policy forbids
    every request and every script but the two that belong to it. Long tables are cut to their first rows, as far as it
    takes to stay below `LARGEST`, and say so.

    Args:
        path: the file to write.
        runs: what is shown; at least one.
        figures: drawn in this order.
        title: heading and name of the page.
        theme: at first; `auto` follows the system. A button on the page changes it.

    Raises:
        UsageError: if plotly is not installed, or not even short tables make the page small enough.
        OSError: if the disk refuses.
    """
    plotly = plotly_script() if any(figure.panels for figure in figures) else None
    sections = [figure_section(figure, i) for i, figure in enumerate(figures, 1)]
    for most in _MOST_ROWS:
        page = _page(runs, sections, title, theme, plotly, most).encode("utf-8")
        if len(page) < LARGEST:
            Path(path).write_bytes(page)
            return
    raise UsageError(
        f"{os.fspath(path)}: {len(runs)} runs make a page of {len(page) / 1e6:.1f} MB, above {LARGEST / 1e6:.0f} MB; "
        "give fewer runs"
    )


def _page(
    runs: Sequence[Run], figures: list[FigureSection], title: str, theme: str, plotly: bytes | None, most: int
) -> str:
    script = _asset("page.js")
    tables, shown = _tables(runs, most), cards(runs)
    parts = [*([("summary", "Summary")] if shown else []), ("runs", "Runs"),
             *([("figures", "Figures")] if figures else []), *([("tables", "Tables")] if tables else []),
             ("provenance", "Provenance")]  # fmt: skip
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["breakable"] = breakable
    return environment.from_string(_asset("page.html")).render(
        title=title,
        theme=theme,
        version=fillm.__version__,
        policy=_policy(script.encode("utf-8"), plotly),
        style=Markup(_asset("page.css")),
        script=Markup(script),
        looks=Markup(htmlsafe_json_dumps(looks(), allow_nan=False, separators=(",", ":"))),
        plotly=None if plotly is None else Markup(base64.b64encode(gzip.compress(plotly, 9, mtime=0)).decode("ascii")),
        lead=lead(runs),
        parts=[{"id": name, "title": text} for name, text in parts],
        cards=shown,
        runs=run_table(runs),
        figures=[replace(one, table=one.table.first(most if one.plots else max(most, _LEAST_ROWS))) for one in figures],
        tables=tables,
        provenance=[{"name": run.name, "command": run.command, "record": _record(run)} for run in runs],
    )


def _policy(script: bytes, plotly: bytes | None) -> str:
    """No request to anywhere, no script but these; plotly styles what it draws, and saves pictures as blobs."""
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode('ascii')}'"
              for text in (script, plotly) if text is not None]  # fmt: skip
    return (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )


def _asset(name: str) -> str:
    return importlib.resources.files("fillm.report.page").joinpath(name).read_text(encoding="utf-8")


def plotly_script() -> bytes:
    """The JavaScript of the installed plotly.

    Raises:
        UsageError: if there is none.
    """
    try:
        return importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    except ModuleNotFoundError:
        raise UsageError(
            "--format html: needs the package plotly; pip install 'fillm[report]', or give --format png,svg"
        ) from None


def _tables(runs: Sequence[Run], most: int) -> list[PageTable]:
    found = []
    for run in runs:
        for name, table in run.tables.items():
            if name in _NOT_SHOWN or not table.num_rows:
                continue
            title = f"{_TITLES[name]} of {run.name}" if name in _TITLES else run.name if name == run.path.stem else (
                f"{name} of {run.name}")  # fmt: skip
            source = run.path.name if run.path.is_file() else f"{name}.parquet"
            if "title" in run.study:
                title = f"{run.study['title']} ({title})"
            shown = page_table(table, title, most, name, source)
            found.append(replace(shown, about=claim_of(run)))
    return found


def _record(run: Run) -> str:
    record: dict[str, Any] = run.record
    text = to_yaml(record)
    if len(text) <= _LONGEST_RECORD:
        return text
    return f"{text[:_LONGEST_RECORD]}\n[...] cut here; the whole record is in the run's folder\n"
