"""Masks: which weights of a model may change, their files, and their choice from scores and a budget."""

from fillm.masks.choice import Choice, chosen_units, make_choice, parse_select
from fillm.masks.elements import PIECE, ElementScores, ScoredTensor, element_masks
from fillm.masks.layouts import LAYOUT_SCHEMA, TensorLayout, layout_table, read_layouts
from fillm.masks.mask import Mask
from fillm.masks.tensor_mask import TensorMask

__all__ = [
    "LAYOUT_SCHEMA",
    "PIECE",
    "Choice",
    "ElementScores",
    "Mask",
    "ScoredTensor",
    "TensorLayout",
    "TensorMask",
    "chosen_units",
    "element_masks",
    "layout_table",
    "make_choice",
    "parse_select",
    "read_layouts",
]
