"""The two themes as the page needs them: plotly templates, colours of the legend, and its small pictures."""

from typing import Any

from markupsafe import Markup

from fillm.report.figures.data import Series
from fillm.report.theme import DARK, LIGHT, MARKERS, STYLES, THEMES, Theme

# plotly's names for matplotlib's markers.
_SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross",
            "X": "x", "<": "triangle-left", ">": "triangle-right"}  # fmt: skip
# The same markers around (16, 7), for the legend.
_SHAPES = {
    "o": '<circle cx="16" cy="7" r="4.5"/>',
    "s": '<path d="M12 3h8v8h-8z"/>',
    "^": '<path d="M16 2l5 9h-10z"/>',
    "D": '<path d="M16 1.5l5.5 5.5l-5.5 5.5l-5.5-5.5z"/>',
    "v": '<path d="M16 12l5-9h-10z"/>',
    "P": '<path d="M14.3 2h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z"/>',
    "X": '<path d="M13 1.6l3 3l3-3l2.4 2.4l-3 3l3 3l-2.4 2.4l-3-3l-3 3l-2.4-2.4l3-3l-3-3z"/>',
    "<": '<path d="M11 7l9-5v10z"/>',
    ">": '<path d="M21 7l-9-5v10z"/>',
}


def looks() -> dict[str, Any]:
    """By the name of a theme: a template of plotly, and what the page itself puts into traces."""
    return {name: _look(theme) for name, theme in THEMES.items()}


def mark_colour(series: Series) -> str:
    """CSS: the colour of a series, in either theme."""
    return f"light-dark({LIGHT.colour(series.style)}, {DARK.colour(series.style)})"


def special_colour(cell: str) -> str:
    """CSS: the colour of `zero` or `infinite` cells, in either theme."""
    return f"light-dark({getattr(LIGHT, cell)}, {getattr(DARK, cell)})"


def glyph(series: Series) -> Markup:
    """A line and a marker as a plot shows them, in the colour `--mark`."""
    fill = "none" if series.hollow else "var(--mark)"
    dashes = ' stroke-dasharray="4 3"' if series.dashed else ""
    line = f'<path d="M1 7h30"{dashes}/>' if series.line else ""
    shape = _SHAPES[LIGHT.marker(series.style)]
    return Markup(
        '<svg viewBox="0 0 32 14" width="32" height="14" aria-hidden="true" fill="none" stroke="var(--mark)" '
        f'stroke-width="1.6">{line}<g fill="{fill}">{shape}</g></svg>'
    )


def _look(theme: Theme) -> dict[str, Any]:
    axis = {
        "gridcolor": theme.faint,
        "linecolor": theme.quiet,
        "zerolinecolor": theme.quiet,
        "tickcolor": theme.quiet,
        "zerolinewidth": 1,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
    }
    line = {"color": theme.quiet}
    bar = {"outlinewidth": 0, "tickcolor": theme.quiet, "ticks": "outside", "ticklen": 3}
    font = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", "size": 12, "color": theme.ink}
    layout = {
        "font": font,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {
            "bgcolor": theme.ground,
            "bordercolor": theme.quiet,
            "font": {"color": theme.ink},
            "align": "left",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": theme.quiet, "activecolor": theme.ink},
        "shapedefaults": {"line": line},
        "annotationdefaults": {"font": line, "bgcolor": f"{theme.ground}b3"},
    }
    return {
        "template": {"layout": layout, "data": {"heatmap": [{"type": "heatmap", "colorbar": bar}]}},
        "colours": [theme.colour(i) for i in range(STYLES)],
        "symbols": [_SYMBOLS[marker] for marker in MARKERS],
        "scales": {"sequential": theme.sequential.capitalize(), "signed": theme.signed.capitalize()},
        "special": {"zero": theme.zero, "infinite": theme.infinite},
    }
