"""`soir_sweep` beside the two matrix products that it replaces; bytes: one read of the store."""

from collections.abc import Sequence

import pytest
import torch
from fillm_kernels import soir_sweep
from torch import Tensor

from benchmarks.kernels.layers import Calls
from benchmarks.kernels.streams import parser_of, report

CASES = {
    "L=32 n=512 k=4096 float32": (32, 512, 4096, torch.float32),
    "L=4 n=1024 k=16384 float32": (4, 1024, 16384, torch.float32),
    "L=32 n=512 k=4096 bfloat16": (32, 512, 4096, torch.bfloat16),
}


def build(tensors: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.randn(tensors, n, k).to(dtype)
    return s, torch.randn(tensors, k), torch.full((tensors, n), float(k))


def two_products(s: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """The weighted sums [L, k] from two passes over s [L, n, k]."""
    dots = torch.bmm(s, v.to(s.dtype)[:, :, None])[:, :, 0]
    c = dots / (0.1 * q.mean(1, keepdim=True) / s.shape[2] + q)
    return torch.bmm(c.to(s.dtype)[:, None], s)[:, 0]


def check() -> None:
    s, v, q = build(2, 50, 300, torch.float32)
    torch.testing.assert_close(soir_sweep(s, v, q, 0.1).weighted, two_products(s, v, q), rtol=1e-4, atol=1e-4)


def prepare(tensors: int, n: int, k: int, dtype: torch.dtype) -> tuple[Calls, float]:
    s, v, q = build(tensors, n, k, dtype)
    calls = {"soir_sweep": lambda: soir_sweep(s, v, q, 0.1), "two bmm": lambda: two_products(s, v, q)}
    return calls, s.nbytes


@pytest.mark.parametrize("case", CASES)
def bench_soir_sweep(benchmark, case):
    check()
    benchmark(soir_sweep, *build(*CASES[case]), 0.1)


def main(argv: Sequence[str] | None = None) -> None:
    cases = {name: lambda case=case: prepare(*case) for name, case in CASES.items()}
    report("soir_sweep", cases, check, parser_of("soir_sweep").parse_args(argv))


if __name__ == "__main__":
    main()
