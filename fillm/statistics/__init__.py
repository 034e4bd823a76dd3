"""Accumulators that turn per-sample gradients into what the methods need."""

from fillm.statistics.absolute_sums import mean_absolute
from fillm.statistics.accumulators import (
    CombinedMeans,
    Groups,
    MeanGradient,
    MeanPower,
    SquaredNorms,
    StepDots,
    Together,
    accumulator_dtype,
    any_entry,
    inner,
    squared_norm,
    total,
)
from fillm.statistics.estimates import (
    BAR,
    LEAST_SPREAD,
    Estimate,
    explained,
    measured_noise,
    sketched_products,
    top_set_confidence,
    widened,
)
from fillm.statistics.exact_gram import KeptGradients, TensorGram, held_tensors, tensor_gram
from fillm.statistics.gram import DenseGram, Gram, RowsGram
from fillm.statistics.gram_form import InnerProducts, Step, datainf_step, woodbury_step
from fillm.statistics.influence import BRACKET_SLACK, Scalars, relative_width, uncertified
from fillm.statistics.retain import EXPANSION_NUMEL, EXPANSION_TERMS, RetainMoments, WeightedSum
from fillm.statistics.sketches import GradientSketches
from fillm.statistics.steps import UNEVEN, curved_step
from fillm.statistics.store import SketchStore, holds_store
from fillm.statistics.store_block import OpenBatch
from fillm.statistics.store_format import DTYPES, StoreSettings
from fillm.statistics.store_writer import StoredSketches, refuse_foreign, refuse_read_only

__all__ = [
    "BAR",
    "BRACKET_SLACK",
    "DTYPES",
    "EXPANSION_NUMEL",
    "EXPANSION_TERMS",
    "LEAST_SPREAD",
    "UNEVEN",
    "CombinedMeans",
    "DenseGram",
    "Estimate",
    "GradientSketches",
    "Gram",
    "Groups",
    "InnerProducts",
    "KeptGradients",
    "MeanGradient",
    "MeanPower",
    "OpenBatch",
    "RetainMoments",
    "RowsGram",
    "Scalars",
    "SketchStore",
    "SquaredNorms",
    "Step",
    "StepDots",
    "StoreSettings",
    "StoredSketches",
    "TensorGram",
    "Together",
    "WeightedSum",
    "accumulator_dtype",
    "any_entry",
    "curved_step",
    "datainf_step",
    "explained",
    "held_tensors",
    "holds_store",
    "inner",
    "mean_absolute",
    "measured_noise",
    "refuse_foreign",
    "refuse_read_only",
    "relative_width",
    "sketched_products",
    "squared_norm",
    "tensor_gram",
    "top_set_confidence",
    "total",
    "uncertified",
    "widened",
    "woodbury_step",
]
