"""Rank parameters by second-order influence, and by the other localisation methods that share its passes."""

from fillm.lazy import lazy_names

__all__ = ["RankConfig", "Ranking", "rank_parameters"]

__getattr__ = lazy_names(__name__, {"RankConfig": "config", "Ranking": "ranking", "rank_parameters": "command"})
