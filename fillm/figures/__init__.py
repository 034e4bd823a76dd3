"""Pictures that more than one room draws."""

from fillm.figures.heatmap import score_heatmap

__all__ = ["score_heatmap"]
