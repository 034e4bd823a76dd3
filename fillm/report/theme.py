"""Colours and markers that a colour-blind person can tell apart, on light and on dark ground.

The eight colours are those of Okabe and Ito (2008, jfly.uni-koeln.de/color), the one that the ground would swallow
replaced; every series also has a marker of its own. Matrices are viridis (ordered values) or cividis (-1 to 1).
"""

from dataclasses import dataclass

STYLES = 8
# matplotlib's names; nine, so that a colour that comes again has another marker.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


@dataclass(frozen=True)
class Theme:
    """What every picture of a report shares.

    Attributes:
        name: `light` or `dark`.
        ground, ink: background, and text and axes.
        faint: grid lines.
        quiet: reference lines and what is secondary.
        colours: of series, `STYLES` of them.
        absent, zero, infinite: cells of a matrix without a value, and with one that its scale cannot show.
        sequential, signed: colour maps of matplotlib, of plotly by the same names.
    """

    name: str
    ground: str
    ink: str
    faint: str
    quiet: str
    colours: tuple[str, ...]
    absent: str
    zero: str
    infinite: str = "#d81b60"
    sequential: str = "viridis"
    signed: str = "cividis"

    def colour(self, style: int) -> str:
        """Of a series."""
        return self.colours[style % STYLES]

    def marker(self, style: int) -> str:
        """Of a series, matplotlib's name."""
        return MARKERS[style % len(MARKERS)]


_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

LIGHT = Theme(
    name="light",
    ground="#ffffff",
    ink="#1a1a1a",
    faint="#e3e3e3",
    quiet="#6b6b6b",
    colours=(*_HUES, "#1a1a1a", "#882255"),  # their yellow is too light on white
    absent="#ffffff",
    zero="#d9d9d9",
)
DARK = Theme(
    name="dark",
    ground="#16181d",
    ink="#e8e8e8",
    faint="#33363d",
    quiet="#a0a4ad",
    colours=("#4ea3e0", "#f07c2a", "#1fc396", "#e08fbf", "#e69f00", "#8fd0f5", "#f2f2f2", "#f0e442"),
    absent="#16181d",
    zero="#4a4d55",
)
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}
