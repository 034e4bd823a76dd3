"""The kernels on numpy arrays and on anything with `__dlpack__`, without a copy of either.

python examples/arrays.py
"""

from typing import Any

import fillm_kernels as fk
import numpy as np


class Exported:
    """All that an array of another library (JAX, CuPy) needs to have: `__dlpack__` and where it lies."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def main() -> None:
    """Norms of per-sample gradients of a layer whose activations came from numpy, and a sum into a numpy array."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 4), dtype=np.float32)
    dy = rng.standard_normal((6, 3), dtype=np.float32)
    offsets = np.array([0, 2, 6])  # two samples, of two and four rows
    norms = np.asarray(fk.ghost_norm(x, dy, offsets))
    by_hand = [np.square(dy[a:b].T @ x[a:b]).sum() for a, b in ((0, 2), (2, 6))]
    print("squared norms", norms, "by hand", np.array(by_hand, dtype=np.float32))

    total = np.zeros((3, 4), dtype=np.float32)
    fk.weighted_outer_(total, x, dy, np.array([1.0, -1.0]), offsets)  # written in place
    same = fk.ghost_norm(Exported(x), Exported(dy), Exported(offsets))
    print("the same through __dlpack__:", bool(np.array_equal(np.asarray(same), norms)))
    print("largest difference of the weighted sum", np.abs(total - (dy[:2].T @ x[:2] - dy[2:].T @ x[2:])).max())


if __name__ == "__main__":
    main()
