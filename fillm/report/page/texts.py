"""Texts inside plots, in which plotly reads tags and entities; names in tables. Those of runs are shown as they are."""

import math
import re
from collections.abc import Iterable

from markupsafe import Markup, escape

from fillm.report.figures.data import Axis, Matrix, number

_LONGEST_TICK = 33  # characters; what is pointed at says the whole name
SHORT_TICK = 16  # characters on a narrow page


def escaped(text: str) -> str:
    """A text that plotly shows as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")


def breakable(text: str) -> Markup:
    """A name as HTML that may be broken after its underscores and full stops, where lines may be broken at all."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[_.])(?=.)", text))


def shortened(text: str, most: int = _LONGEST_TICK) -> str:
    """A text without its middle where it is longer than a plot has room for beside an axis, `most` characters."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def last_part(text: str) -> str:
    """The last part of a tensor's name, for a narrow page."""
    text = text.removesuffix(".weight")
    return text if len(text) <= SHORT_TICK else f"…{text[1 - SHORT_TICK :]}"


def said(axis: Axis, value: float) -> str:
    """`label: value unit`."""
    if axis.scale == "category":
        whole = 0 <= value < len(axis.categories) and value == int(value)
        return f"{escaped(axis.label)}: {escaped(axis.categories[int(value)])}" if whole else escaped(axis.label)
    return escaped(f"{axis.label}: {number(value)} {axis.unit}".rstrip())


def colour_text(matrix: Matrix) -> str:
    """What the colours of a matrix stand for, with unit and scale."""
    return matrix.colour.text + {"log": ", log scale", "symlog": ", symmetric log scale"}.get(matrix.colour.scale, "")


def plain(values: Iterable[float]) -> list[float | None]:
    """Seven digits of every value, which is more than a plot shows; JSON knows no NaN and no infinity."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values]
