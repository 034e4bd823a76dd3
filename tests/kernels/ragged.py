"""Random ragged inputs, and per-sample gradients formed outright in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Empty samples, single rows, both sides of vector widths and block sizes, primes, one long among short.
LENGTHS = ([0, 1, 2, 5, 0, 63, 64, 65], [131, 1, 1, 3, 0], [17] * 12, [0, 0], [], [1])
WIDTHS = ((1, 1), (63, 65), (64, 64), (65, 7), (131, 1100))


def ragged(
    lengths: Sequence[int], inputs: int, outputs: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, I], dy [N, O], offsets [B + 1]; a third of the rows of dy are zero, as at a vocabulary head."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    dy = torch.randn(rows, outputs, generator=generator).to(dtype)
    dy[torch.rand(rows, generator=generator) < 0.33] = -0.0
    return x, dy, torch.tensor([0, *lengths]).cumsum(0)


def gradients(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """G_b = sum_t dy_t x_t^T of every sample, [B, O, I], float64."""
    formed = torch.zeros(len(offsets) - 1, dy.shape[1], x.shape[1], dtype=torch.float64)
    for sample in range(len(offsets) - 1):
        rows = slice(int(offsets[sample]), int(offsets[sample + 1]))
        formed[sample] = torch.einsum("to,ti->oi", dy[rows].double(), x[rows].double())
    return formed


def magnitudes(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """sum_t |x_t| |dy_t| of every sample, [B], float64: what |G_b| would be without any cancellation."""
    rows = x.double().norm(dim=1) * dy.double().norm(dim=1)
    return torch.stack([part.sum() for part in rows.tensor_split(offsets[1:-1].tolist())]) if len(offsets) > 1 else rows


def precision(dtype: torch.dtype) -> float:
    """Unit roundoff of the arithmetic: float64 for float64, float32 for everything narrower, which is widened first."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """Every entry within its bound; NaN and infinity are never within."""
    excess = (got.double() - want.double()).abs() - bound
    assert bool((excess <= 0).all()), f"off by up to {float(excess.nan_to_num(nan=torch.inf).max()):.3e} too much"


def triton_device() -> str:
    """Where Triton kernels run in these tests: on a GPU if there is one, else on CPU tensors in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
