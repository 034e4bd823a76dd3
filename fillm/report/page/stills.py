"""Still pictures of a figure: for the printer, and for browsers in which plotly does not run."""

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO

from fillm.report.drawing import draw
from fillm.report.figures.data import FigureData
from fillm.report.theme import LIGHT

_PIXEL = 96 / 150  # of a page, in pixels of a picture
_COLOURS = 128  # of a picture without a matrix: eight series and their blends with the ground


@dataclass(frozen=True)
class Still:
    """A picture on a light ground.

    Attributes:
        source: `data:` address of a PNG.
        width, height: on the page, in its pixels.
        text: what stands in its place for those who cannot see it.
    """

    source: str
    width: int
    height: int
    text: str


def stills(figure: FigureData) -> list[Still]:
    """One picture of all series; of matrices one each, which a sheet of paper has room for."""
    found = []
    for text, part in _parts(figure):
        file = BytesIO()
        draw(replace(part, title=""), file, LIGHT, kind="png")  # the page has the title
        picture = file.getvalue() if any(panel.matrix is not None for panel in part.panels) else _palette(file)
        width, height = struct.unpack(">II", picture[16:24])  # PNG, IHDR
        source = f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
        found.append(Still(source, round(width * _PIXEL), round(height * _PIXEL), text))
    return found


def _palette(file: BytesIO) -> bytes:
    """The same picture in a third of the bytes: lines and letters have few colours, which a matrix has not."""
    from PIL import Image

    few, smaller = Image.open(file).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE), BytesIO()
    few.save(smaller, "png", optimize=True)
    return smaller.getvalue()


def _parts(figure: FigureData) -> Iterator[tuple[str, FigureData]]:
    if any(panel.matrix is not None for panel in figure.panels) and len(figure.panels) > 1:
        for panel in figure.panels:
            yield f"{figure.title}: {panel.title}", replace(figure, panels=(panel,), columns=1)
    elif figure.panels:
        yield figure.title, figure
