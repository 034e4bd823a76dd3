"""The layers that `python -m benchmarks.gpu` times: fresh inputs, floors, and torch's calls beside every op."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import fillm_kernels as fk
import torch
from torch import Tensor

from benchmarks.kernels.gpu_calls import Beside, Case, Given, name_of, random_layer, reference, relative, tensors
from benchmarks.kernels.gpu_checks import gram, pair_of
from benchmarks.kernels.gpu_streams import stream_cases

SPOTS = 4  # samples of a spot check: of one alone an inner product may be near 0, and its relative error large
HALF, WHOLE = torch.bfloat16, torch.float32


def cases(device: torch.device, shrink: int = 1, reduced: bool = False) -> Iterator[Case]:
    """Every case on a device, always in the same order.

    Args:
        device: where the arguments lie.
        shrink: divides widths and counts, for a trial without a GPU.
        reduced: the same cases in the same code paths, small enough for a float64 reference of the whole result.
    """
    for dtype in (HALF, WHOLE):
        for tokens, samples in ((64, 128), (512, 16)):
            yield from _all_ops(_Layer.of(device, dtype, tokens, samples, shrink, reduced))
        for tokens, samples in ((32, 256), (128, 64), (256, 32)):
            yield _norm(_Layer.of(device, dtype, tokens, samples, shrink, reduced))
        yield _ragged_norm(device, dtype, shrink, reduced)
    yield from stream_cases(device, shrink, reduced)


@dataclass(frozen=True)
class _Layer:
    """Samples of as many tokens each at a square layer."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    samples: int
    width: int

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, tokens: int, samples: int, shrink: int, reduced: bool):
        """Sizes divided by `shrink`; reduced ones leave more than T columns, so that a norm keeps its Gram form."""
        width, samples = max(32, 4096 // shrink), max(2, samples // shrink)
        if reduced:
            width, samples = min(width, max(2 * tokens, 256)), min(samples, 4)
        return cls(device, dtype, tokens, samples, width)

    def __str__(self) -> str:
        return f"T={self.tokens} B={self.samples} I=O={self.width} {name_of(self.dtype)}"

    @property
    def rows(self) -> int:
        return self.tokens * self.samples

    @property
    def product(self) -> float:
        """FLOP of one product the size of the weight gradient."""
        return 2.0 * self.rows * self.width**2

    @property
    def read(self) -> float:
        """Bytes of x and dy."""
        return 2.0 * self.rows * self.width * self.dtype.itemsize

    def inputs(self) -> Given:
        return random_layer(self.device, self.dtype, [self.tokens] * self.samples, self.width, self.width)

    def matrix(self) -> Tensor:
        return torch.randn(self.width, self.width, device=self.device)

    def blocks(self, given: Given, side: str = "") -> tuple[Tensor, Tensor]:
        """The rows of `x` and `dy`, of one side of a pair if there are two, by sample: [B, T, I] and [B, T, O]."""
        x, dy = (given[name + side].view(self.samples, self.tokens, self.width) for name in ("x", "dy"))
        return x, dy


def last_samples(run: Callable[..., Any], given: Given) -> float:
    """Error of what an op returns for its last samples, whose rows lie furthest, beside the reference on them alone."""
    got = tensors(run(**given))
    bounds = given["offsets"][-SPOTS - 1 :]
    rows = {name: given[name][int(bounds[0]) :] for name in ("x", "dy")}
    alone = {**given, **rows, "offsets": bounds - bounds[0], "second": None, "absolute": None}
    want = tensors(reference(lambda: run(**{name: alone[name] for name in given})))
    return max(relative(a[-SPOTS:], b) for a, b in zip(got, want, strict=True))


def _grams(x: Tensor, dy: Tensor) -> Tensor:
    return ((x @ x.mT) * (dy @ dy.mT)).sum((1, 2))


def _norm(layer: _Layer) -> Case:
    """At T = 64 the target is a ratio to torch, from T = 512 a fraction of the matrix units; else there is none."""
    return Case(
        op="ghost_norm", label=str(layer), dtype=layer.dtype, inputs=layer.inputs, run=fk.ghost_norm,
        flop=2.0 * layer.samples * layer.tokens**2 * layer.width, bytes=layer.read,
        target=0.6 if layer.tokens >= 512 else None,
        beside=(Beside("two bmm", lambda given: _grams(*layer.blocks(given)), 3.0 if layer.tokens == 64 else None),),
        spot=partial(last_samples, fk.ghost_norm),
    )  # fmt: skip


def _ragged_norm(device: torch.device, dtype: torch.dtype, shrink: int, reduced: bool) -> Case:
    """A few long samples behind many short ones: the rest of the machine must not wait for the long ones."""
    width = max(32, 4096 // shrink)
    long, short = (2, 8) if reduced else (4, max(4, 512 // shrink))
    lengths = [32] * short + [2048] * long

    def by_length(given: Given) -> tuple[Tensor, ...]:
        parts = [(0, 32 * short, 32), (32 * short, 32 * short + 2048 * long, 2048)]
        cut = [[given[name][a:b].view(-1, t, width) for name in ("x", "dy")] for a, b, t in parts]
        return tuple(_grams(x, dy) for x, dy in cut)

    pairs = sum(min(t**2 * 2 * width, 2 * t * width**2) for t in lengths)
    return Case(
        op="ghost_norm", label=f"{long} of T=2048 behind {short} of T=32, I=O={width} {name_of(dtype)}", dtype=dtype,
        inputs=lambda: random_layer(device, dtype, lengths, width, width), run=fk.ghost_norm, flop=float(pairs),
        bytes=2.0 * sum(lengths) * width * dtype.itemsize, beside=(Beside("two bmm a length", by_length),),
        spot=partial(last_samples, fk.ghost_norm),
    )  # fmt: skip


def _gemm(given: Given) -> Tensor:
    return given["dy"].T @ given["x"]


def _all_ops(layer: _Layer) -> Iterator[Case]:
    yield _norm(layer)
    yield from _products(layer)
    yield from _moments(layer)
    yield from _sketches(layer)


def _products(layer: _Layer) -> Iterator[Case]:
    def weighted() -> Given:
        return {**layer.inputs(), "out": layer.matrix(), "weights": torch.randn(layer.samples, device=layer.device)}

    def corner(given: Given) -> float:
        columns = slice(-16, None)
        scale = given["weights"].double().repeat_interleave(layer.tokens)[:, None]
        added = (given["dy"][:, columns].double() * scale).T @ given["x"][:, columns].double()
        want = given["out"][columns, columns].double() + added
        return relative(fk.weighted_outer_(**given)[columns, columns], want)

    def last_pairs(given: Given) -> float:
        sides = [[part[-SPOTS:].double() for part in layer.blocks(given, str(i))] for i in (1, 2)]
        g, h = ((dy.mT @ x).flatten(1) for x, dy in sides)
        return relative(gram(**given)[-SPOTS:, -SPOTS:], g @ h.T)

    one = partial(Case, label=str(layer), dtype=layer.dtype)
    matrix = 4.0 * layer.width**2
    yield one(
        op="ghost_dot", inputs=lambda: {**layer.inputs(), "v": layer.matrix()}, run=fk.ghost_dot, flop=layer.product,
        bytes=layer.read + matrix, beside=(Beside("gemm", _gemm, 0.8),), spot=partial(last_samples, fk.ghost_dot),
    )  # fmt: skip
    yield one(
        op="weighted_outer_", inputs=weighted, run=fk.weighted_outer_, written=("out",), flop=layer.product,
        bytes=layer.read + 2 * matrix, beside=(Beside("gemm", _gemm, 0.8),), spot=corner,
    )  # fmt: skip
    yield one(
        op="ghost_gram", inputs=lambda: pair_of(layer.inputs), run=gram, flop=4.0 * layer.rows**2 * layer.width,
        bytes=2 * layer.read, spot=last_pairs,
    )  # fmt: skip


def _moments(layer: _Layer) -> Iterator[Case]:
    """`sample_moments` with norm and dot, with the second moment, and with all there is."""

    def formed(given: Given) -> Tensor:
        second = torch.zeros_like(given["second"])
        for a, b in zip(*layer.blocks(given), strict=True):
            second += (b.T @ a).float().square()
        return second

    def corner(given: Given) -> float:
        columns = slice(-16, None)
        x, dy = (part[..., columns].double() for part in layer.blocks(given))
        want = given["second"][columns, columns].double() + (dy.mT @ x).square().sum(0)
        fk.sample_moments(**given)
        return relative(given["second"][columns, columns], want)

    def everything() -> Given:
        return {**layer.inputs(), "v": layer.matrix(), "second": layer.matrix().square(),
                "absolute": layer.matrix().abs()}  # fmt: skip

    one = partial(Case, op="sample_moments", dtype=layer.dtype, flop=layer.product)
    matrix, gemm = 4.0 * layer.width**2, Beside("gemm", _gemm, 0.6)
    yield one(
        label=f"norm and dot, {layer}", inputs=lambda: {**layer.inputs(), "v": layer.matrix()}, run=fk.sample_moments,
        bytes=layer.read + matrix, beside=(gemm,), spot=partial(last_samples, fk.sample_moments),
    )  # fmt: skip
    yield one(
        label=f"second moment, {layer}", inputs=lambda: {**layer.inputs(), "second": layer.matrix().square()},
        run=fk.sample_moments, written=("second",), bytes=layer.read + 2 * matrix,
        beside=(gemm, Beside("formed one by one", formed, 4.0)), spot=corner,
    )  # fmt: skip
    all_of_it = partial(fk.sample_moments, rows=True, sketch_dim=1024)
    yield one(
        label=f"everything, {layer}", inputs=everything, run=all_of_it, written=("second", "absolute"),
        bytes=layer.read + 5 * matrix, beside=(Beside("gemm", _gemm), Beside("formed one by one", formed)),
        spot=partial(last_samples, all_of_it),
    )  # fmt: skip


def _sketches(layer: _Layer) -> Iterator[Case]:
    """Sketches of gradients that are never formed, from either side."""

    def formed(given: Given) -> Tensor:
        x, dy = layer.blocks(given)
        parts = [fk.sketch((b.T @ a).reshape(1, -1), 4096) for a, b in zip(x, dy, strict=True)]
        return torch.cat(parts)

    one = partial(Case, dtype=layer.dtype, inputs=layer.inputs)
    for kind in ("oporp", "sjlt"):
        run = partial(fk.outer_sketch, dim=4096, kind=kind)
        beside = (Beside("gemm", _gemm), *([Beside("formed, then sketched", formed)] if kind == "oporp" else []))
        yield one(
            op="outer_sketch", label=f"{kind} to 4096, {layer}", run=run, flop=layer.product,
            bytes=layer.read + 4.0 * layer.samples * 4096, beside=beside, spot=partial(last_samples, run),
        )  # fmt: skip
    k = 64
    for kind, dims, flop in (
        ("factored", (k, k), 2.0 * layer.rows * (2 * layer.width * k + k * k)),
        ("factored-sjlt", (k, k), 2.0 * layer.rows * k * k),
        ("tensorsketch", 4096, 2.0 * layer.rows * (layer.width + 4096 * 12)),
    ):
        run = partial(fk.factored_sketch, dims=dims, kind=kind)
        yield one(
            op="factored_sketch", label=f"{kind} to 4096, {layer}", run=run, flop=flop,
            bytes=layer.read + 4.0 * layer.samples * 4096, beside=(Beside("gemm", _gemm),),
            spot=partial(last_samples, run),
        )  # fmt: skip
