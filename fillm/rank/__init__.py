"""Rank parameters by second-order influence, and by the other localisation methods that share its passes."""

from importlib import import_module
from typing import Any

_HOMES = {"RankConfig": "config", "Ranking": "ranking", "rank_parameters": "command"}
__all__ = ["RankConfig", "Ranking", "rank_parameters"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fillm.rank.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fillm.rank' has no attribute {name!r}")
