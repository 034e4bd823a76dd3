"""`outer_sketch`: sketches of per-sample weight gradients that are never in memory.

    S vec(G_b),    G_b = dy_b^T x_b,    E <S vec(G), S vec(H)> = <G, H>        docs/method.md section 5; docs/kernels/outer_sketch.md

The map is that of `sketch`, so these sketches and those of gradients that were formed go together. It is `sample_moments`
with the sketch alone: 2 N I O FLOP, a tile of G_b goes into its bins while it is in the first-level cache.
"""  # noqa: E501

from typing import Any

from torch import Tensor

from fillm_kernels.errors import DtypeError
from fillm_kernels.sample_moments import sample_moments


def outer_sketch(
    x: Tensor | Any,
    dy: Tensor | Any,
    offsets: Tensor | Any,
    dim: int,
    kind: str = "oporp",
    seed: int = 0,
    *,
    nonzeros: int = 4,
) -> Tensor:
    """Sketch every sample's weight gradient as `sketch` would sketch `G_b.flatten()`.

    docs/method.md section 5; which kind when: docs/kernels/sketch.md. `sample_moments(..., sketch_dim=dim)` finds norms
    and other moments of the same gradients in the same visit.

    Args:
        x: layer inputs of all samples, packed, [N, I], float32 | bfloat16 | float16 | float64.
        dy: loss gradients at the layer's output, [N, O], same dtype and device.
        offsets: first row of each sample and N at the end, [B + 1], int64.
        dim: k, numbers a gradient becomes; a multiple of `nonzeros` for `sjlt`.
        kind: `oporp`, `countsketch`, `sjlt`, `rademacher` or `gaussian`.
        seed: the map's seed, in [0, 2^63); `seed_law.tensor_seed` makes one for every tensor of a model.
        nonzeros: bins a coordinate of `sjlt` goes into.

    Returns:
        [B, dim], float32 (float64 for float64 inputs), in the unit of the gradients, zeros for an empty sample; not
        differentiable. The bins and signs of `sketch` to the bit, the values within rounding.

    Raises:
        ShapeError: if sizes do not fit, offsets do not run from 0 to N, or there is no such map.
        DtypeError: if an argument is no array, dtypes do not go together, or `dim` is no integer.
        DeviceError: if the tensors lie on different devices.
        BackendError: if `FILLM_BACKEND` asks for a backend that cannot run here.
    """
    found = sample_moments(x, dy, offsets, sketch_dim=dim, kind=kind, seed=seed, nonzeros=nonzeros).sketch
    if found is None:
        raise DtypeError("dim must be an integer; got None")
    return found
