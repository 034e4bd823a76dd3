"""TensorSketch on the CPU: two ways to the same numbers, and which of them costs less.

    TS(G_b) = sum_t C_out dy_t * C_in x_t      (* circular convolution)        Pham and Pagh, KDD 2013
    bin (h_o + h'_i) mod k takes s_o s'_i G_b[o, i]                            the same, entry by entry

By the first a token costs two transforms of k numbers; by the second a sample costs its gradient, formed a block at a
time, and an addition an entry, for a vector of samples at once (csrc/cpu/tensorsketch.cpp).
docs/kernels/factored_sketch.md.
"""

import math

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.arguments import accumulation_dtype

SIDE_PAD = 16  # the extension pads rows to a multiple of as many numbers (csrc/cpu/factored_sketch.h)
# Nanoseconds on one core with AVX-512, measured: an entry of a gradient and token; an entry and map; a number of a
# transform and bit of its length; a coordinate of a token and map.
FORM_COST, FOLD_COST, TRANSFORM_COST, PLACE_COST = 0.016, 0.15, 0.2, 0.4


def is_cheaper_formed(lengths: Tensor, inputs: int, outputs: int, dim: int, maps: int) -> Tensor:
    """Which samples' sketches cost less from gradients than from transforms of every token.

    A choice of each sample's own length, so that the way it goes does not depend on the others; the library that
    transforms rows together may still round their last bits by how many they are.

    Args:
        lengths: tokens of each sample, [B], int64.
        inputs: I.
        outputs: O.
        dim: k.
        maps: how many sketches of each sample are wanted; gradients are formed once for all.

    Returns:
        [B], bool.
    """
    formed = inputs * outputs * (FORM_COST * lengths + FOLD_COST * maps)
    spectra = 2 * dim * math.log2(2 * dim) * TRANSFORM_COST + (inputs + outputs) * PLACE_COST
    return formed <= lengths * maps * spectra


def from_gradients(x: Tensor, dy: Tensor, offsets: Tensor, dim: int, seeds: list[int], instruction_set: str) -> Tensor:
    """TensorSketches from blocks of the gradients, each folded into the bins of all maps.

    Args:
        x: [N, I], floating, entries of a row next to each other.
        dy: [N, O], likewise.
        offsets: [B + 1], int64.
        dim: k.
        seeds: of the maps.
        instruction_set: of `native.instruction_sets()`, or "" for the fastest.

    Returns:
        [B, maps * k], float32 (float64 for float64).
    """
    out = torch.empty(offsets.shape[0] - 1, len(seeds) * dim, dtype=accumulation_dtype(x.dtype))
    native.extension.tensorsketch(
        dy=(dy.data_ptr(), dy.stride(0), dy.shape[1]),
        x=(x.data_ptr(), x.stride(0), x.shape[1]),
        offsets=offsets.data_ptr(),
        samples=out.shape[0],
        dim=dim,
        seeds=seeds,
        out=out.data_ptr(),
        dtype=native.address(x)[-1],
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    return out


def count_sketch(rows: Tensor, dim: int, seed: int, side: int, instruction_set: str) -> Tensor:
    """Count sketches of single rows by one side of a TensorSketch.

    Args:
        rows: [N, width], floating, entries of a row next to each other.
        dim: k.
        seed: of the map.
        side: 0 for rows of dy, 1 for rows of x.
        instruction_set: as above.

    Returns:
        [N, k], float32 (float64 for float64).
    """
    out = torch.empty(rows.shape[0], dim + -dim % SIDE_PAD, dtype=accumulation_dtype(rows.dtype))
    native.extension.count_sketch(
        rows=(rows.data_ptr(), rows.stride(0), rows.shape[1]),
        count=rows.shape[0],
        dim=dim,
        seed=seed,
        side=side,
        out=out.data_ptr(),
        dtype=native.address(rows)[-1],
        threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    return out[:, :dim]
