"""A table as a picture."""

import textwrap
from typing import Any

from fillm.report.figures.data import WIDEST_TABLE, Table, number
from fillm.report.theme import Theme

TITLE_CHARACTER = 0.105  # inches, of the title above a picture
_CHARACTER = 0.068  # inches
_LINE = 0.17
_ROW = 0.24
_WIDEST = 22  # characters of a heading before it is broken


def draw_table(title: str, table: Table, theme: Theme) -> Any:
    """A figure with the table, turned on its side where it has more columns than a page is wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    head, body, left = _texts(table)
    heads = [textwrap.wrap(text, _WIDEST, break_long_words=True) or [""] for text in head]
    widths = [
        _CHARACTER * max(*(len(line) for line in heads[i]), *(len(row[i]) for row in body), 4) + 0.25
        for i in range(len(head))
    ]
    width = max(sum(widths) + 0.3, TITLE_CHARACTER * len(title) + 0.3, 4.0)
    notes = [line for note in table.notes for line in textwrap.wrap(note, int(width / 0.06), subsequent_indent="   ")]
    top = 0.45
    deep = _LINE * max(map(len, heads)) + 0.15
    height = top + deep + _ROW * len(body) + (_LINE * len(notes) + 0.15 if notes else 0.0) + 0.15
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(0.15, 0.25, title, fontsize=11, fontweight="bold", va="center")
    starts = [0.15 + sum(widths[:i]) for i in range(len(widths))]

    def write(i: int, y: float, text: str, **how: Any) -> None:
        x = starts[i] if left[i] else starts[i] + widths[i] - 0.15
        axes.text(x, y, text, ha="left" if left[i] else "right", va="center", **how)

    for i, lines in enumerate(heads):
        for j, line in enumerate(reversed(lines)):
            write(i, top + deep - 0.15 - _LINE * j, line, fontsize=8, fontweight="bold")
    axes.plot([0.1, width - 0.1], [top + deep, top + deep], color=theme.quiet, linewidth=1.0)
    for k, row in enumerate(body):
        y = top + deep + _ROW * (k + 0.5)
        if k % 2:
            axes.axhspan(y - _ROW / 2, y + _ROW / 2, color=theme.faint, alpha=0.6, linewidth=0)
        for i, text in enumerate(row):
            write(i, y, text, fontsize=8)
    for k, line in enumerate(notes):
        y = top + deep + _ROW * len(body) + 0.15 + _LINE * (k + 0.5)
        axes.text(0.15, y, line, fontsize=7, va="center", color=theme.quiet)
    return figure


def _texts(table: Table) -> tuple[list[str], list[list[str]], list[bool]]:
    """Headings, rows, and which columns stand to the left."""
    head = [column.text for column in table.columns]
    body = [[number(value) for value in row] for row in table.rows]
    if len(head) <= WIDEST_TABLE:
        return head, body, [not column.numeric for column in table.columns]
    turned = [list(column) for column in zip(head, *body, strict=True)]
    return turned[0], turned[1:], [True] + [False] * len(body)
