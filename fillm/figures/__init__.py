"""Pictures that more than one room draws."""

from fillm.figures.heatmap import layer_grid, score_heatmap

__all__ = ["layer_grid", "score_heatmap"]
