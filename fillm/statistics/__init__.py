"""Accumulators that turn per-sample gradients into what the methods need, and the store that keeps sketches of them."""

from fillm.statistics.accumulators import (
    Groups,
    MeanGradient,
    MeanPower,
    SquaredNorms,
    StepDots,
    accumulator_dtype,
    inner,
    squared_norm,
)
from fillm.statistics.exact_gram import KeptGradients, TensorGram, held_tensors, tensor_gram
from fillm.statistics.influence import BRACKET_SLACK, Scalars, relative_width, uncertified
from fillm.statistics.retain import EXPANSION_NUMEL, EXPANSION_TERMS, RetainMoments, WeightedSum
from fillm.statistics.sketches import GradientSketches
from fillm.statistics.store import SketchStore, holds_store
from fillm.statistics.store_format import StoreSettings
from fillm.statistics.store_writer import StoredSketches

__all__ = [
    "BRACKET_SLACK",
    "EXPANSION_NUMEL",
    "EXPANSION_TERMS",
    "GradientSketches",
    "Groups",
    "KeptGradients",
    "MeanGradient",
    "MeanPower",
    "RetainMoments",
    "Scalars",
    "SketchStore",
    "SquaredNorms",
    "StepDots",
    "StoreSettings",
    "StoredSketches",
    "TensorGram",
    "WeightedSum",
    "accumulator_dtype",
    "held_tensors",
    "holds_store",
    "inner",
    "relative_width",
    "squared_norm",
    "tensor_gram",
    "uncertified",
]
