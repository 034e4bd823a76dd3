"""What `python -m benchmarks.gpu` runs: for every op fresh inputs, its floor, and a library call to compare with."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import fillm_kernels as fk
import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: its name.
        label: sizes and element type.
        inputs: makes fresh random arguments, by name; called for every check.
        run: the op; returns what is compared, and may write to arguments named in `written`.
        flop: floating-point operations that the op's algorithm needs.
        bytes: each input read once, each output written once.
        library: a call of the same shape from torch, and its name.
        target: fraction of the ceiling, or of the library call for a `ratio`, that docs/kernels.md aims at.
        bound: `matrix`, `bandwidth`, or `ratio`, what `target` is a fraction of.
        written: arguments the op writes to.
    """

    op: str
    label: str
    inputs: Callable[[], dict[str, Any]]
    run: Callable[..., Any]
    flop: float
    bytes: float
    target: float
    bound: str
    library: tuple[str, Callable[[dict[str, Any]], Any]] | None = None
    written: tuple[str, ...] = field(default=())


def cases(device: torch.device, shrink: int = 1) -> Iterator[Case]:
    """Every case on a device; widths and counts are divided by `shrink`, for a trial without a GPU."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, samples in ((64, 128), (512, 16)):
            yield from _layer_cases(device, dtype, tokens, max(2, samples // shrink), max(32, 4096 // shrink))
    yield from _vector_cases(device, shrink)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layer_cases(device: torch.device, dtype: torch.dtype, tokens: int, samples: int, width: int) -> Iterator[Case]:
    rows = tokens * samples

    def layer() -> dict[str, Any]:
        return {
            "x": torch.randn(rows, width, device=device).to(dtype),
            "dy": torch.randn(rows, width, device=device).to(dtype),
            "offsets": torch.arange(samples + 1) * tokens,
        }

    def matrix(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(width, width, device=device)

    label = f"T={tokens} B={samples} I=O={width} {_name(dtype)}"
    size = torch.finfo(dtype).bits // 8
    product, read = 2.0 * rows * width * width, 2.0 * rows * width * size

    def bmm(given: Mapping[str, Any]) -> Tensor:
        x, dy = (given[name].view(samples, tokens, width) for name in ("x", "dy"))
        return ((x @ x.mT) * (dy @ dy.mT)).sum((1, 2))

    def gemm(given: Mapping[str, Any]) -> Tensor:
        return given["dy"].T @ given["x"]

    def formed(given: Mapping[str, Any]) -> Tensor:
        x, dy = (given[name].view(samples, tokens, width) for name in ("x", "dy"))
        return torch.stack([(b.T @ a).float().square().sum() for a, b in zip(x, dy, strict=True)])

    short = tokens < 512
    norms = 2.0 * samples * tokens**2 * width  # half of each of two Gram matrices
    yield Case("ghost_norm", label, layer, fk.ghost_norm, norms, read, 3.0 if short else 0.6,
               "ratio" if short else "matrix", ("two bmm", bmm))  # fmt: skip
    yield Case("ghost_dot", label, lambda: {**layer(), "v": matrix()}, fk.ghost_dot, product, read + 4.0 * width**2,
               0.8, "ratio", ("gemm", gemm))  # fmt: skip
    yield Case(
        "weighted_outer_", label,
        lambda: {**layer(), "out": matrix(), "weights": torch.randn(samples, device=device)},
        fk.weighted_outer_, product, read + 8.0 * width**2, 0.8, "ratio", ("gemm", gemm), ("out",),
    )  # fmt: skip
    yield Case("sample_moments", f"norm and dot, {label}", lambda: {**layer(), "v": matrix()}, fk.sample_moments,
               product, read + 4.0 * width**2, 0.6, "ratio", ("gemm", gemm))  # fmt: skip
    yield Case("sample_moments", f"second moment, {label}", lambda: {**layer(), "second": matrix().square()},
               fk.sample_moments, product, read + 8.0 * width**2, 4.0, "ratio", ("formed one by one", formed),
               ("second",))  # fmt: skip

    def pair() -> dict[str, Any]:
        one, other = layer(), layer()
        return {f"{name}{i}": value for i, given in ((1, one), (2, other)) for name, value in given.items()}

    def ordered(**given: Any) -> Tensor:
        names = ("x1", "dy1", "offsets1", "x2", "dy2", "offsets2")
        return fk.ghost_gram(*(given[name] for name in names))

    yield Case("ghost_gram", label, pair, ordered, 4.0 * rows**2 * width, 2 * read, 0.6, "matrix")


def _vector_cases(device: torch.device, shrink: int) -> Iterator[Case]:
    n, k = max(8, 4096 // shrink), max(64, 65536 // shrink)

    def store() -> dict[str, Any]:
        return {"s": torch.randn(n, k, device=device), "v": torch.randn(k, device=device),
                "norms": 1.0 + torch.rand(n, device=device), "damping": 0.1}  # fmt: skip

    def sweep(**given: Any) -> Any:
        return fk.soir_sweep(**given, numel=10 * k)

    yield Case("soir_sweep", f"{n} x {k} float32", store, sweep, 4.0 * n * k, 4.0 * n * k, 0.8, "bandwidth",
               ("two products", lambda given: (given["s"] @ given["v"]) @ given["s"]))  # fmt: skip
    count = (1 << 28) // shrink**2

    def scores() -> dict[str, Any]:
        return {"scores": [torch.randn(count // 2, device=device), torch.randn(count - count // 2, device=device)],
                "budget": count // 10}  # fmt: skip

    yield Case("top_mask", f"10 % of {count} float32", scores, lambda **given: fk.top_mask(**given).bits, 0.0,
               4.0 * count, 0.8, "bandwidth",
               ("topk of all", lambda g: torch.cat(g["scores"]).topk(g["budget"]).values[-1]))  # fmt: skip

    def step() -> dict[str, Any]:
        mask = fk.select_bits(fk.top_mask([torch.randn(count, device=device)], count // 10).bits[0], count)
        chosen = count // 10
        return {"param": torch.randn(count, device=device), "grad": torch.randn(count, device=device),
                "state": (torch.zeros(chosen, device=device), torch.zeros(chosen, device=device)), "mask": mask,
                "step": 1}  # fmt: skip

    # Bits of all weights; parameter, gradient and two moments of a tenth, the first and the moments also written.
    yield Case("masked_adamw_", f"10 % of {count} float32", step, lambda **given: fk.masked_adamw_(**given), 0.0,
               count / 8 + 0.1 * count * 7 * 4.0, 0.8, "bandwidth", None, ("param",))  # fmt: skip
