"""Every op on small odd arguments in every element type, for the correctness that comes before any timing."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import fillm_kernels as fk
import torch
from fillm_kernels.sides import KINDS as FACTORED
from fillm_kernels.sketch import DENSE, SKETCHES
from torch import Tensor

from benchmarks.kernels.gpu_calls import Call, Given, name_of, random_layer, random_selection

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lengths, I and O: empty samples and both sides of tiles; long among short; several short in a tile; and one row of
# one number, where nothing averages out and a float32 product rounded to a narrower type shows.
LAYERS: tuple[tuple[list[int], int, int], ...] = (
    ([0, 1, 2, 5, 0, 63, 64, 65], 65, 131),
    ([517, 1, 1, 403, 3, 0], 128, 192),
    ([17] * 12, 256, 64),
    ([1, 1, 1], 1, 1),
)


def checks(device: torch.device, few: bool = False) -> Iterator[Call]:
    """Every op, element type and odd shape on a device; with `few` one odd layer alone, for a trial without a GPU."""
    for dtype in DTYPES:
        for lengths, inputs, outputs in LAYERS[: 1 if few else None]:
            layer = partial(random_layer, device, dtype, lengths, inputs, outputs)
            label = f"T={max(lengths)} B={len(lengths)} I={inputs} O={outputs} {name_of(dtype)}"
            yield from _on_layers(device, dtype, label, layer, inputs, outputs)
        yield from _on_vectors(device, dtype)
        yield from _on_masks(device, dtype)


def pair_of(layer: Callable[[], Given]) -> Given:
    """Arguments of `gram` from two draws of a layer."""
    return {f"{name}{i}": value for i in (1, 2) for name, value in layer().items()}


def gram(**given: Any) -> Tensor:
    """`ghost_gram` of arguments by name."""
    return fk.ghost_gram(*(given[name] for name in ("x1", "dy1", "offsets1", "x2", "dy2", "offsets2")))


def _on_layers(
    device: torch.device, dtype: torch.dtype, label: str, layer: Callable[[], Given], inputs: int, outputs: int
) -> Iterator[Call]:
    def matrix(narrow: bool = False) -> Tensor:
        return torch.randn(outputs, inputs, device=device).to(dtype if narrow else torch.float32)

    def weighted() -> Given:
        given = layer()
        return {**given, "out": matrix(), "weights": torch.randn(len(given["offsets"]) - 1, device=device)}

    def everything() -> Given:
        return {**layer(), "v": matrix(), "second": matrix().square(), "absolute": matrix().abs()}

    one = partial(Call, dtype=dtype)
    for form in ("auto", "gram", "explicit"):
        yield one(op="ghost_norm", label=f"{form}, {label}", inputs=layer, run=partial(fk.ghost_norm, form=form))
    for narrow in {False, dtype != torch.float32}:
        kind = name_of(dtype if narrow else torch.float32)
        yield one(op="ghost_dot", label=f"v {kind}, {label}", run=fk.ghost_dot,
                  inputs=lambda narrow=narrow: {**layer(), "v": matrix(narrow)})  # fmt: skip
    yield one(op="weighted_outer_", label=label, inputs=weighted, run=fk.weighted_outer_, written=("out",))
    yield one(op="ghost_gram", label=label, inputs=lambda: pair_of(layer), run=gram)
    yield one(op="sample_moments", label=f"norm alone, {label}", inputs=layer, run=fk.sample_moments)
    yield one(op="sample_moments", label=f"everything, {label}", inputs=everything, written=("second", "absolute"),
              run=partial(fk.sample_moments, rows=True, sketch_dim=64, alpha=0.5))  # fmt: skip
    # A dense kind is a product on top of the same blocks of gradients: one layer is enough.
    for kind in SKETCHES if inputs == 1 else [kind for kind in SKETCHES if kind not in DENSE]:
        yield one(op="outer_sketch", label=f"{kind} to 96, {label}", inputs=layer,
                  run=partial(fk.outer_sketch, dim=96, kind=kind, seed=5))  # fmt: skip
    for kind in FACTORED:
        dims = 96 if kind == "tensorsketch" else (12, 8)
        yield one(op="factored_sketch", label=f"{kind} to 96, {label}", inputs=layer,
                  run=partial(fk.factored_sketch, dims=dims, kind=kind, seed=5))  # fmt: skip


def _on_vectors(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    one = partial(Call, dtype=dtype)
    for kind in SKETCHES:
        for count, dim in ((1, 64), (4097, 100)) if kind in DENSE else ((1, 64), (4097, 100), (100_003, 4096)):
            yield one(
                op="sketch", label=f"{kind}, 3 x {count} to {dim} {name_of(dtype)}",
                inputs=lambda count=count: {"g": torch.randn(3, count, device=device).to(dtype)},
                run=partial(fk.sketch, dim=dim, kind=kind, seed=5, offset=7),
            )  # fmt: skip
    for shape in ((37, 1001), (3, 64, 128), (5, 1, 1)):
        yield one(
            op="soir_sweep", label=f"{'x'.join(map(str, shape))} {name_of(dtype)}",
            inputs=lambda shape=shape: {
                "s": torch.randn(shape, device=device).to(dtype),
                "v": torch.randn(*shape[:-2], shape[-1], device=device).to(dtype),
                "norms": shape[-1] * (0.5 + torch.rand(shape[:-1], device=device)),
            },
            run=partial(fk.soir_sweep, damping=0.1, numel=10 * shape[-1]),
        )  # fmt: skip
    sizes = (100_003, 0, 1, 4096)
    for budget in (0, 1, 5000, sum(sizes)):
        # Rounded, so that many scores tie at the threshold.
        yield one(
            op="top_mask", label=f"{budget} of {sum(sizes)} with ties {name_of(dtype)}",
            inputs=lambda: {"scores": [(8 * torch.randn(n, device=device)).round().to(dtype) for n in sizes]},
            run=lambda scores, budget=budget: tuple(fk.top_mask(scores, budget)),
        )  # fmt: skip


def step_of(
    device: torch.device, dtype: torch.dtype, count: int, density: float, state: bool = True, estimate: bool = False
) -> Given:
    """Arguments of a masked step on random weights, with states that earlier steps left."""
    mask = random_selection(device, count, density)
    given: Given = {"param": torch.randn(count, device=device).to(dtype), "mask": mask}
    given["grad"] = torch.randn(count, device=device).to(dtype)
    if estimate:
        given["estimate"] = torch.randn(count, device=device).square().to(dtype)
    if state:
        first, second = mask.new_state(given["param"])
        given["state"] = (first.normal_(), second.normal_().square_())
    return given


def norm_of(param: Tensor, grad: Tensor, mask: fk.Selection) -> Tensor:
    """`masked_norm` of the arguments of `step_of`."""
    return fk.masked_norm(grad, mask)


def _on_masks(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    one = partial(Call, dtype=dtype)
    written = ("param", "state")
    for count, density in ((5003, 0.3), (2 * 2048, 1.0), (1, 1.0)):
        label = f"{density:.0%} of {count} {name_of(dtype)}"
        step = partial(step_of, device, dtype, count, density)
        # A large learning rate, so that a wrong step of a narrow parameter is more than a unit in its last place.
        yield one(op="masked_adamw_", label=label, inputs=step, written=written,
                  run=partial(fk.masked_adamw_, step=3, lr=0.5, clip=0.7))  # fmt: skip
        yield one(op="masked_sophia_", label=label, inputs=step, written=written,
                  run=partial(fk.masked_sophia_, lr=0.5, clip=0.7))  # fmt: skip
        yield one(op="masked_sophia_", label=f"with estimate, {label}", inputs=partial(step, estimate=True),
                  written=written, run=partial(fk.masked_sophia_, lr=0.5))  # fmt: skip
        yield one(op="masked_norm", label=label, inputs=partial(step, state=False), run=norm_of)
