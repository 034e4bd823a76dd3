"""Any figure as PNG or SVG, the same bytes for the same data."""

from fillm.report.drawing.draw import draw

__all__ = ["draw"]
