"""Accumulators that turn per-sample gradients into what the methods need."""

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
    "SquaredNorms",
    "StepDots",
    "TensorGram",
    "WeightedSum",
    "accumulator_dtype",
    "held_tensors",
    "inner",
    "relative_width",
    "squared_norm",
    "tensor_gram",
    "uncertified",
]
