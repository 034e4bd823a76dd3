"""The kernels on numpy arrays and on anything with `__dlpack__`, without a copy of either.

python examples/arrays.py
"""

import fillm_kernels as fk
import numpy as np


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
    print("largest difference of the weighted sum", np.abs(total - (dy[:2].T @ x[:2] - dy[2:].T @ x[2:])).max())


if __name__ == "__main__":
    main()
