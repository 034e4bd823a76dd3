"""`top_mask` beside `torch.topk` on the scores joined in one tensor; bytes: three reads of the scores (two of bf16)."""

import pytest
import torch
from fillm_kernels import top_mask
from torch import Tensor

from benchmarks.kernels.layers import Calls
from benchmarks.kernels.streams import report

ENTRIES = 1 << 25
CASES = {
    "normal float32 1%": (torch.float32, 0.01),
    "normal float32 50%": (torch.float32, 0.5),
    "normal bfloat16 10%": (torch.bfloat16, 0.1),
}


def scores_of(dtype: torch.dtype) -> list[Tensor]:
    return [part.clone() for part in torch.randn(ENTRIES).to(dtype).split([ENTRIES // 2, ENTRIES // 4, ENTRIES // 4])]


def check() -> None:
    scores = torch.randn(10_000)
    assert float(top_mask([scores], 700).threshold) == float(scores.topk(700).values[-1])


def prepare(dtype: torch.dtype, fraction: float) -> tuple[Calls, float]:
    scores, budget = scores_of(dtype), int(fraction * ENTRIES)
    calls = {
        "top_mask": lambda: top_mask(scores, budget),
        "cat + topk": lambda: torch.cat(scores).topk(budget, sorted=False),
    }
    size = torch.empty(0, dtype=dtype).element_size()
    return calls, (3 if size == 4 else 2) * size * ENTRIES + ENTRIES / 8


@pytest.mark.parametrize("case", CASES)
def bench_top_mask(benchmark, case):
    check()
    dtype, fraction = CASES[case]
    benchmark(top_mask, scores_of(dtype), int(fraction * ENTRIES))


if __name__ == "__main__":
    report("top_mask", {name: lambda case=case: prepare(*case) for name, case in CASES.items()}, check)
