"""Masked steps beside torch's fused AdamW on every weight.

Bytes: bits; for selected weights parameter twice, gradient once, two states twice. At low density whole cache lines of
parameter and gradient move for one weight, which the count leaves out.
"""

from collections.abc import Sequence

import pytest
import torch
from fillm_kernels import Selection, masked_adamw_, masked_norm, masked_sophia_, select_bits
from fillm_kernels.top_mask import pack_bits
from torch import Tensor

from benchmarks.kernels.layers import Calls
from benchmarks.kernels.streams import parser_of, report

ENTRIES = 1 << 24
CASES = {f"{op} {density:.0%}": (op, density) for op in ("adamw", "sophia", "norm") for density in (0.01, 0.1, 1.0)}


def build(density: float) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Selection]:
    param, grad = torch.randn(2, ENTRIES)
    selection = select_bits(pack_bits(torch.rand(ENTRIES) < density), ENTRIES)
    return param, grad, selection.new_state(param), selection


def check() -> None:
    param, grad, state, selection = build(0.5)
    want = torch.nn.Parameter(param.clone())
    want.grad = grad
    torch.optim.AdamW([want]).step()
    before = param.clone()
    masked_adamw_(param, grad, state, selection, step=1)
    moved = param != before
    torch.testing.assert_close(param[moved], want.detach()[moved])


def prepare(op: str, density: float) -> tuple[Calls, float]:
    param, grad, state, selection = build(density)
    whole = torch.nn.Parameter(param.clone())
    whole.grad = grad
    optimiser = torch.optim.AdamW([whole], fused=True)
    own = {
        "adamw": lambda: masked_adamw_(param, grad, state, selection, step=5),
        "sophia": lambda: masked_sophia_(param, grad, state, selection),
        "norm": lambda: masked_norm(grad, selection),
    }[op]
    baseline = {"norm of all": grad.norm} if op == "norm" else {"fused AdamW of all": optimiser.step}
    moved = {"adamw": 28, "sophia": 24, "norm": 4}[op]  # without an estimate Sophia's h is only read
    return {op: own, **baseline}, moved * selection.count + ENTRIES / 8


@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def bench_masked_adamw(benchmark, density):
    check()
    param, grad, state, selection = build(density)
    benchmark(lambda: masked_adamw_(param, grad, state, selection, step=5))


@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def bench_masked_sophia(benchmark, density):
    param, grad, state, selection = build(density)
    benchmark(lambda: masked_sophia_(param, grad, state, selection))


@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def bench_masked_norm(benchmark, density):
    _, grad, _, selection = build(density)
    benchmark(masked_norm, grad, selection)


def main(argv: Sequence[str] | None = None) -> None:
    cases = {name: lambda case=case: prepare(*case) for name, case in CASES.items()}
    report("masked steps", cases, check, parser_of("masked steps").parse_args(argv))


if __name__ == "__main__":
    main()
