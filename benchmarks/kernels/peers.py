"""Public implementations that run on the CPU, where they are installed: none is a dependency.

    pip install --no-deps traker opacus scipy scikit-learn joblib cloudpickle loky threadpoolctl narwhals

(opacus brings a package called `examples`, which hides this repository's from its tests: use an environment apart.)

Each maker returns what can be called, or None where its package is missing; `missing` says in words what is.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PACKAGES = {"traker": "trak.projectors", "scipy": "scipy.sparse", "scikit-learn": "sklearn.random_projection",
            "opacus": "opacus.grad_sample.linear"}  # fmt: skip
Call = Callable[[], object]


def imported(package: str) -> Any | None:
    """The module of a package that is compared with, or None."""
    try:
        return import_module(PACKAGES[package])
    except ImportError:
        return None


def missing(*packages: str) -> str:
    """Which of these packages are not installed, in words; empty if all are."""
    lacking = [name for name in packages if imported(name) is None]
    return f"not compared, not installed: {', '.join(lacking)}" if lacking else ""


def trak_basic(g: Tensor, dim: int) -> Call | None:
    """TRAK's projector of the CPU (arXiv 2303.14186): blocks of 100 dense columns, made anew at every call."""
    projectors = imported("traker")
    if projectors is None:
        return None
    kind = projectors.ProjectionType.rademacher
    made = projectors.BasicProjector(g.shape[1], dim, 0, kind, "cpu", block_size=100)
    return lambda: made.project(g, 0)


def scipy_sparse(g: Tensor, bins: Tensor, signs: Tensor, dim: int) -> Call | None:
    """A stored sparse matrix of one nonzero a coordinate, and scipy's product."""
    sparse = imported("scipy")
    if sparse is None or g.dtype != torch.float32:
        return None
    count = g.shape[1]
    matrix = sparse.csr_matrix((signs.numpy(), bins.numpy(), np.arange(count + 1)), shape=(count, dim))
    array = g.numpy()
    return lambda: array @ matrix


def sklearn_sparse(g: Tensor, dim: int) -> Call | None:
    """scikit-learn's sparse random projection, one nonzero a coordinate on average; its matrix is drawn beforehand."""
    projections = imported("scikit-learn")
    if projections is None or g.dtype != torch.float32:
        return None
    array = g.numpy()
    made = projections.SparseRandomProjection(dim, density=1 / dim, random_state=0).fit(array[:1])
    return lambda: made.transform(array)


def opacus_norms(x: Tensor, dy: Tensor, samples: int) -> Call | None:
    """Opacus's ghost norms of a linear layer, [B]: two Gram matrices of padded samples."""
    linear = imported("opacus")
    if linear is None:
        return None
    layer = nn.Linear(x.shape[1], dy.shape[1], bias=False)
    rows = [part.view(samples, -1, part.shape[1]) for part in (x, dy)]
    return lambda: linear.compute_linear_norm_sample(layer, [rows[0]], rows[1])[layer.weight]
